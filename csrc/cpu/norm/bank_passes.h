// The loops of bank_norm.cpp over rows and tiles of similarities.
#pragma once

#include "../exponential.h"
#include "../strips.h"

namespace solera {

// Rows of a tile folded into the running maximum and sum of its columns, [begin, end) of them.
struct BankFold {
  const void* tile;
  int64_t stride, rows, begin, end;
  void *maximum, *total;  // in A, of column 0
  double beta;
};
// The k largest of each row so far: values (in A) and columns, descending; `offset` is the tile's
// first column.
struct BankTop {
  const void* tile;
  int64_t stride, columns, offset, k;
  void* values;
  int64_t* indices;
};
struct BankRow {
  const void* in;
  void* out;
  const void *shift, *shift2;  // in A, may be null
  int64_t columns;
  double scale;
};

struct BankTable {
  void (*fold[4])(const BankFold&);
  void (*top[4])(const BankTop&, int64_t first_row, int64_t last_row);
  void (*apply[4])(const BankRow&);
  // d = beta dL_j exp(beta s - L_j)
  void (*weights[4])(const void* s, const void* lse, const void* dlse, void* out, int64_t columns,
                     double beta);
  void (*finish[2])(const void* maximum, const void* total, void* lse, int64_t n, double beta);
  void (*merge[2])(const BankTop& into, const void* values, const int64_t* indices);
};

namespace SOLERA_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634074;

// 2^x. For float the one that is exact at 0, where a column's largest term lies: fast_exp2
// is 7.5e-8 off there, which a sum of a few terms would show.
SOLERA_INLINE vf exponential_of(vf x) { return exp2v(x); }
SOLERA_INLINE vd exponential_of(vd x) { return fast_exp2(x); }

template <class V, class S>
SOLERA_INLINE V finite_or_zero(V v, S) {
  return v - v == 0 ? v : V{};
}

template <class T, int R>
SOLERA_INLINE void fold_rows(const BankFold& p, int64_t row) {
  typedef A<T> Real;
  typedef AccVec<T> V;
  const T* tile = (const T*)p.tile + row * p.stride;
  Real *maximum = (Real*)p.maximum, *total = (Real*)p.total;
  const Real kappa = Real(p.beta * kLog2E);
  strips<kLanes<T>>(p.end - p.begin, [&](int64_t i, int n) {
    const int64_t j = p.begin + i;
    const V old = get(maximum + j, n);
    V v[R], top = old;
    for (int r = 0; r < R; ++r) {
      v[r] = get(tile + r * p.stride + j, n);
      top = vmax(top, v[r]);
    }
    // An infinite maximum is not subtracted: its own exponential then is infinite or 0, not NaN.
    const V base = finite_or_zero(top, Real(0)), before = finite_or_zero(old, Real(0));
    const V factor = exponential_of(at_most(Real(0), kappa * (before - base)));
    const V held = get(total + j, n);
    V sum = before == base ? held : held * factor;
    for (int r = 0; r < R; ++r) sum += exponential_of(kappa * (v[r] - base));
    put(total + j, sum, n);
    put(maximum + j, top, n);
  });
}
template <class T>
void fold(const BankFold& p) {
  int64_t row = 0;
  for (; row + 16 <= p.rows; row += 16) fold_rows<T, 16>(p, row);
  for (; row + 4 <= p.rows; row += 4) fold_rows<T, 4>(p, row);
  for (; row < p.rows; ++row) fold_rows<T, 1>(p, row);
}

SOLERA_INLINE float log_of(float x) { return __builtin_logf(x); }
SOLERA_INLINE double log_of(double x) { return __builtin_log(x); }

template <class Real>
void finish(const void* maximum, const void* total, void* lse, int64_t n, double beta) {
  for (int64_t j = 0; j < n; ++j) {
    const Real top = ((const Real*)maximum)[j], sum = ((const Real*)total)[j];
    const Real base = top - top == 0 ? top : Real(0);
    Real value = Real(beta * double(base) + double(log_of(sum)));
    // Of doubles what underflows is not quite 0.
    if (top < 0 && top - top != 0 && sum == sum) value = top;
    ((Real*)lse)[j] = value;
  }
}

// Whether any lane of one of four vectors is above x; NaN is not.
template <class V, class S>
SOLERA_INLINE bool any_above(V a, V b, V c, V d, S x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    const __m512 least = _mm512_set1_ps(x);
    return _mm512_cmp_ps_mask((__m512)a, least, _CMP_GT_OQ) |
           _mm512_cmp_ps_mask((__m512)b, least, _CMP_GT_OQ) |
           _mm512_cmp_ps_mask((__m512)c, least, _CMP_GT_OQ) |
           _mm512_cmp_ps_mask((__m512)d, least, _CMP_GT_OQ);
  } else {
    const __m512d least = _mm512_set1_pd(x);
    return _mm512_cmp_pd_mask((__m512d)a, least, _CMP_GT_OQ) |
           _mm512_cmp_pd_mask((__m512d)b, least, _CMP_GT_OQ) |
           _mm512_cmp_pd_mask((__m512d)c, least, _CMP_GT_OQ) |
           _mm512_cmp_pd_mask((__m512d)d, least, _CMP_GT_OQ);
  }
#else
  const auto above = (a > x) | (b > x) | (c > x) | (d > x);
  constexpr int n = sizeof(V) / sizeof(S);
  for (int i = 0; i < n; ++i)
    if (above[i]) return true;
  return false;
#endif
}

// v at column j into a row's list, behind what is equal.
template <class Real>
SOLERA_INLINE void insert(Real* values, int64_t* indices, int64_t k, Real v, int64_t j) {
  if (!(v > values[k - 1])) return;
  int64_t at = k - 1;
  for (; at > 0 && v > values[at - 1]; --at) {
    values[at] = values[at - 1];
    indices[at] = indices[at - 1];
  }
  values[at] = v;
  indices[at] = j;
}

template <class T>
void top(const BankTop& p, int64_t first_row, int64_t last_row) {
  typedef A<T> Real;
  constexpr int L = kLanes<T>;
  for (int64_t row = first_row; row < last_row; ++row) {
    const T* s = (const T*)p.tile + row * p.stride;
    Real* values = (Real*)p.values + row * p.k;
    int64_t* indices = p.indices + row * p.k;
    int64_t j = 0;
    for (; j + 4 * L <= p.columns; j += 4 * L) {
      const AccVec<T> v[4] = {load(s + j), load(s + j + L), load(s + j + 2 * L),
                              load(s + j + 3 * L)};
      if (!any_above(v[0], v[1], v[2], v[3], values[p.k - 1])) continue;
      for (int i = 0; i < 4 * L; ++i)
        insert<Real>(values, indices, p.k, v[i / L][i % L], p.offset + j + i);
    }
    strips<L>(p.columns - j, [&](int64_t i, int n) {
      const AccVec<T> v = get(s + j + i, n);
      for (int c = 0; c < n; ++c) insert<Real>(values, indices, p.k, v[c], p.offset + j + i + c);
    });
  }
}

// One row's list into another's, the later columns second.
template <class Real>
void merge(const BankTop& into, const void* values, const int64_t* indices) {
  for (int64_t i = 0; i < into.k; ++i)
    insert<Real>((Real*)into.values, into.indices, into.k, ((const Real*)values)[i], indices[i]);
}

template <class T>
void apply(const BankRow& p) {
  const A<T>*shift = (const A<T>*)p.shift, *shift2 = (const A<T>*)p.shift2;
  const A<T> scale = A<T>(p.scale);
  strips<kLanes<T>>(p.columns, [&](int64_t j, int n) {
    AccVec<T> v = get((const T*)p.in + j, n) * scale;
    if (shift) v -= get(shift + j, n);
    if (shift2) v -= get(shift2 + j, n);
    put((T*)p.out + j, v, n);
  });
}

template <class T>
void weights(const void* s, const void* lse, const void* dlse, void* out, int64_t columns,
             double beta) {
  typedef A<T> Real;
  const Real b = Real(beta);
  strips<kLanes<T>>(columns, [&](int64_t j, int n) {
    AccVec<T> t = get((const T*)s + j, n) * b - get((const Real*)lse + j, n);
    t *= Real(kLog2E);
    AccVec<T> e = exponential_of(t);
    e = t < Real(Exponents<Real>::smallest) ? AccVec<T>{} : e;
    put((T*)out + j, e * (get((const Real*)dlse + j, n) * b), n);
  });
}

}  // namespace

extern const BankTable bank_table;
const BankTable bank_table = {
    {fold<float>, fold<double>, fold<bf16>, fold<f16>},
    {top<float>, top<double>, top<bf16>, top<f16>},
    {apply<float>, apply<double>, apply<bf16>, apply<f16>},
    {weights<float>, weights<double>, weights<bf16>, weights<f16>},
    {finish<float>, finish<double>},
    {merge<float>, merge<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera
