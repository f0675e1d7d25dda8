// Uncertainties of logit rows, windows over them, rows that come back; the formulas are in
// python/solera/ensemble/routing.py.
//
// Bytes a row of C logits: scores and windows read it once from memory (the maximum, the sums and
// the columns of the two largest are three passes, the later ones from cache while a row fits
// there); backward reads it and writes one row. A merge reads and writes the rows it names.
#include "../exponential.h"
#include "../strips.h"

namespace solera {

struct RoutingRows {
  const void* logits;
  void* scores;  // (4, rows) in A, or null
  int64_t* top;  // (2, rows), or null
  bool* exit;    // or null
  int64_t rows, width;
  double low, high;
  int kind;
};
struct RoutingGradient {
  const void *dscores, *logits, *scores;
  const int64_t* top;
  void* dlogits;
  int64_t rows, width;
};
struct RoutingMerge {
  void* out;
  const void* compact;
  const int64_t* index;
  int64_t width;
  double weight;
};

struct RoutingTable {
  void (*scores[4])(const RoutingRows&, int64_t begin, int64_t end);
  void (*gradient[4])(const RoutingGradient&, int64_t begin, int64_t end);
  void (*merge[4])(const RoutingMerge&, int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

SOLERA_INLINE float log1p_of(float x) { return __builtin_log1pf(x); }
SOLERA_INLINE double log1p_of(double x) { return __builtin_log1p(x); }
SOLERA_INLINE float expm1_of(float x) { return __builtin_expm1f(x); }
SOLERA_INLINE double expm1_of(double x) { return __builtin_expm1(x); }
SOLERA_INLINE float log_of(float x) { return __builtin_logf(x); }
SOLERA_INLINE double log_of(double x) { return __builtin_log(x); }

template <class T>
SOLERA_INLINE A<T> logit_of(const T* x, int64_t j) {
  return get(x + j, 1)[0];
}

// Below it e^d is 0 in every precision; it keeps 0 * inf out of the sums.
template <class Real>
constexpr Real kLowestGap = Real(-1000);

// The two largest values of a row, equal ones counted apart; false if it holds a NaN.
template <class T>
SOLERA_INLINE bool two_largest(const T* x, int64_t width, A<T>& first, A<T>& second) {
  constexpr int L = kLanes<T>;
  typedef AccVec<T> V;
  const A<T> least = A<T>(-__builtin_inf());
  V m[2] = {splat(least), splat(least)}, s[2] = {splat(least), splat(least)}, wrong{};
  const auto take = [&](V v, int k) {
    wrong += v == v ? V{} : splat(A<T>(1));
    s[k] = v > m[k] ? m[k] : vmax(s[k], v);
    m[k] = vmax(m[k], v);
  };
  int64_t j = 0;
  for (; j + 2 * L <= width; j += 2 * L) {
    take(load(x + j), 0);
    take(load(x + j + L), 1);
  }
  for (; j < width; j += L) {
    const int n = int(width - j < L ? width - j : L);
    V v = get(x + j, n);
    for (int i = n; i < L; ++i) v[i] = least;
    take(v, 0);
  }
  s[0] = m[0] > m[1] ? vmax(s[0], m[1]) : vmax(s[1], m[0]);
  m[0] = vmax(m[0], m[1]);
  first = second = least;
  for (int i = 0; i < L; ++i) {
    const A<T> a = m[0][i], b = s[0][i];
    if (a > first) {
      second = first > b ? first : b;
      first = a;
    } else if (a > second) {
      second = a;
    }
  }
  return lane_sum(wrong) == 0;
}

// The first column from `begin` on that holds this value.
template <class T>
SOLERA_INLINE int64_t column_of(const T* x, int64_t begin, int64_t width, A<T> value) {
  constexpr int L = kLanes<T>;
  int64_t j = begin;
  for (; j + 4 * L <= width; j += 4 * L) {
    AccVec<T> found{};
    for (int k = 0; k < 4; ++k)
      found += load(x + j + k * L) == value ? splat(A<T>(1)) : AccVec<T>{};
    if (lane_sum(found) != 0) break;
  }
  for (; j < width; ++j)
    if (logit_of(x, j) == value) return j;
  return 0;
}

template <class T>
void scores(const RoutingRows& p, int64_t begin, int64_t end) {
  typedef AccVec<T> V;
  typedef A<T> Real;
  const Real nan = Real(__builtin_nan(""));
  Real* out = (Real*)p.scores;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)p.logits + row * p.width;
    Real best, next, score[4] = {nan, nan, nan, nan};
    // Of infinities only one largest is a row like others.
    const bool usual = two_largest(x, p.width, best, next) && !(best == next && best - best != 0) &&
                       best != Real(-__builtin_inf());
    if (usual) {
      // Terms equal to the largest are counted, so that a small sum beside it keeps its digits.
      V s[2] = {}, w[2] = {}, same{};
      int side = 0;
      strips<kLanes<T>>(p.width, [&](int64_t j, int n) {
        const V v = get(x + j, n), d = at_least(kLowestGap<Real>, v - best);
        const V equal = v == best ? splat(Real(1)) : V{};
        const V e = v == best ? V{} : expv(d);
        same += keep<T>(equal, n);
        s[side] += keep<T>(e, n);
        w[side] += keep<T>(v == best ? V{} : e * d, n);
        side ^= 1;
      });
      const Real others = (lane_sum(same) - 1) + lane_sum(s[0] + s[1]);
      const Real weighted = lane_sum(w[0] + w[1]), rest = log1p_of(others);
      score[0] = 1 / (1 + others);
      score[1] = rest - weighted * score[0];
      score[2] = -(best + rest);
      score[3] = -expm1_of(next - best) * score[0];
    }
    for (int k = 0; out && k < 4; ++k) out[k * p.rows + row] = score[k];
    if (p.top) {
      const int64_t first = usual ? column_of(x, 0, p.width, best) : 0;
      int64_t second = usual ? column_of(x, best == next ? first + 1 : 0, p.width, next) : 1;
      if (second == first) second = first == 0;
      p.top[row] = first;
      p.top[p.rows + row] = second;
    }
    if (p.exit) p.exit[row] = score[p.kind] > Real(p.high) || score[p.kind] < Real(p.low);
  }
}

template <class T>
void gradient(const RoutingGradient& p, int64_t begin, int64_t end) {
  typedef AccVec<T> V;
  typedef A<T> Real;
  const auto of = [&](const void* q, int k, int64_t row) {
    return ((const Real*)q)[k * p.rows + row];
  };
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)p.logits + row * p.width;
    T* dx = (T*)p.dlogits + row * p.width;
    const int64_t first = p.top[row], second = p.top[p.rows + row];
    const Real best = logit_of(x, first), msp = of(p.scores, 0, row), h = of(p.scores, 1, row);
    const Real gm = of(p.dscores, 0, row), gh = of(p.dscores, 1, row);
    const Real gg = of(p.dscores, 3, row);
    const Real fixed =
        gh * (-log_of(msp) - h) - of(p.dscores, 2, row) - gm * msp - gg * of(p.scores, 3, row);
    const auto slope = [&](int64_t j, int n, V extra) {
      const V v = get(x + j, n), d = at_least(kLowestGap<Real>, v - best);
      const V p_j = (v == best ? splat(Real(1)) : expv(d)) * msp;
      return p_j * (fixed - gh * d + extra);
    };
    strips<kLanes<T>>(p.width, [&](int64_t j, int n) { put(dx + j, slope(j, n, V{}), n); });
    put(dx + first, slope(first, 1, splat(gm + gg)), 1);
    put(dx + second, slope(second, 1, splat(-gg)), 1);
  }
}

template <class T>
void merge(const RoutingMerge& p, int64_t begin, int64_t end) {
  const A<T> with = A<T>(p.weight), without = A<T>(1 - p.weight);
  for (int64_t j = begin; j < end; ++j) {
    if (p.index[j] < 0) continue;
    T* out = (T*)p.out + p.index[j] * p.width;
    const T* in = (const T*)p.compact + j * p.width;
    if (p.weight == 1) {
      memcpy((void*)out, in, size_t(p.width) * sizeof(T));
      continue;
    }
    strips<kLanes<T>>(p.width, [&](int64_t i, int n) {
      put(out + i, get(out + i, n) * without + get(in + i, n) * with, n);
    });
  }
}

}  // namespace

extern const RoutingTable routing_table;
const RoutingTable routing_table = {
    {scores<float>, scores<double>, scores<bf16>, scores<f16>},
    {gradient<float>, gradient<double>, gradient<bf16>, gradient<f16>},
    {merge<float>, merge<double>, merge<bf16>, merge<f16>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "../parallel.h"

namespace solera {

SOLERA_PICK(RoutingTable, routing_table)

namespace {

void check_rows(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 2,
                  "solera: logits must be (B, C) with at least 2 classes");
}

void run_scores(const Tensor& x, RoutingRows p) {
  p.logits = x.const_data_ptr();
  p.rows = x.size(0);
  p.width = x.size(1);
  const auto kernel = pick_routing_table().scores[dtype_of(x)];
  parallel_for(0, p.rows, grain_for(p.width * x.element_size()),
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

std::tuple<Tensor, Tensor> uncertainty_scores(const Tensor& logits) {
  check_rows(logits);
  const Tensor x = dense(logits);
  Tensor scores = empty_like(x, {4, x.size(0)}, accumulate_type(x));
  Tensor top = empty_like(x, {2, x.size(0)}, ScalarType::Long);
  RoutingRows p{};
  p.scores = scores.mutable_data_ptr();
  p.top = static_cast<int64_t*>(top.mutable_data_ptr());
  run_scores(x, p);
  return {scores, top};
}

Tensor uncertainty_scores_backward(const Tensor& dscores_in, const Tensor& logits,
                                   const Tensor& scores_in, const Tensor& top_in) {
  check_rows(logits);
  const Tensor x = dense(logits), dscores = dense(dscores_in), scores = dense(scores_in);
  const Tensor top = dense(top_in);
  const int64_t rows = x.size(0);
  STD_TORCH_CHECK(scores.scalar_type() == accumulate_type(x) &&
                      dscores.scalar_type() == accumulate_type(x) && scores.numel() == 4 * rows &&
                      dscores.numel() == 4 * rows && top.numel() == 2 * rows &&
                      top.scalar_type() == ScalarType::Long,
                  "solera: scores must be (4, B) and top (2, B)");
  Tensor dlogits = empty_like(x, x.sizes());
  const RoutingGradient p{dscores.const_data_ptr(),
                          x.const_data_ptr(),
                          scores.const_data_ptr(),
                          static_cast<const int64_t*>(top.const_data_ptr()),
                          dlogits.mutable_data_ptr(),
                          rows,
                          x.size(1)};
  const auto kernel = pick_routing_table().gradient[dtype_of(x)];
  parallel_for(0, rows, grain_for(2 * p.width * x.element_size()),
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return dlogits;
}

std::tuple<Tensor, Tensor, Tensor> window_exit(const Tensor& logits, double low, double high,
                                               int64_t kind) {
  check_rows(logits);
  STD_TORCH_CHECK(kind >= 0 && kind < 4, "solera: kind must be 0 to 3");
  const Tensor x = dense(logits);
  const int64_t rows = x.size(0);
  Tensor exit = empty_like(x, {rows}, ScalarType::Bool);
  Tensor index = empty_like(x, {rows}, ScalarType::Long),
         count = empty_like(x, {}, ScalarType::Long);
  RoutingRows p{};
  p.exit = static_cast<bool*>(exit.mutable_data_ptr());
  p.low = low;
  p.high = high;
  p.kind = int(kind);
  run_scores(x, p);
  int64_t *to = static_cast<int64_t*>(index.mutable_data_ptr()), n = 0;
  for (int64_t row = 0; row < rows; ++row) {
    to[n] = row;
    n += !p.exit[row];
  }
  *static_cast<int64_t*>(count.mutable_data_ptr()) = n;
  for (; n < rows; ++n) to[n] = -1;
  return {exit, index, count};
}

void cascade_merge_(const Tensor& out_in, const Tensor& compact_in, const Tensor& index_in,
                    double weight) {
  Tensor out = dense(out_in);
  const Tensor compact = dense(compact_in), index = dense(index_in);
  const int64_t rows = out.dim() > 0 ? out.size(0) : 0, n = index.numel();
  STD_TORCH_CHECK(out.dim() > 0 && compact.dim() == out.dim() && compact.size(0) == n &&
                      compact.scalar_type() == out.scalar_type() && index.dim() == 1 &&
                      index.scalar_type() == ScalarType::Long,
                  "solera: compact must hold one row of out's dtype for each of index");
  const int64_t width = rows > 0 ? out.numel() / rows : 0;
  STD_TORCH_CHECK(compact.numel() == n * width || rows == 0,
                  "solera: compact's rows must be out's");
  const int64_t* at = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t j = 0; j < n; ++j)
    STD_TORCH_CHECK(at[j] < rows, "index: expected rows below ", rows, ", got ", at[j]);
  const RoutingMerge p{out.mutable_data_ptr(), compact.const_data_ptr(), at, width, weight};
  const auto kernel = pick_routing_table().merge[dtype_of(out)];
  parallel_for(0, n, grain_for(3 * width * out.element_size()),
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  if (!out_in.is_contiguous())
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(out_in.get(), out.get(), 0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("uncertainty_scores", TORCH_BOX(&uncertainty_scores));
  m.impl("uncertainty_scores_backward", TORCH_BOX(&uncertainty_scores_backward));
  m.impl("window_exit", TORCH_BOX(&window_exit));
  m.impl("cascade_merge_", TORCH_BOX(&cascade_merge_));
}

}  // namespace solera
#endif  // SOLERA_FRONT
