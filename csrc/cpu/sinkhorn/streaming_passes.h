// Soft minima over points whose cost matrix is never stored, for one instruction set. Included by
// streaming.cpp and streaming_apply.cpp.
//
// In base 2, K = log2(e) / epsilon: with u_ij a quantity of the pair and alpha a factor,
//   E_ij = 2^(F_i + G_j + alpha u_ij).
// u is the inner product <x_i, y_j> where the cost is a square or a product: alpha = 2 K for
// |x - y|^2, and the potentials have K |x_i|^2 and K |y_j|^2 taken out of them ("lifted"). For the
// other costs, and for squares in a few dimensions, u is the cost itself, from differences, and
// alpha = -K.
//
// A strip of rows goes through the columns in stages. With all columns in one tile, kWhole does for
// four rows at a time what the dense core does: w_ij = 2^(F_i + G_j + alpha u_ij) of the *old* F
// into a buffer, its weighted sum (hence the new F), and from the same w the column sums. With more
// tiles the sums come first (kSum), the column sums from a second look (kColumns).
//
// The old potential is the shift; where that is a bad one, the rows are done again with their true
// maximum (kTop first). An iteration on n x m takes 2 n m d flops of products (d from 9 on) and n m
// exponentials, and touches O((n + m) d) memory besides a strip of rows.
#pragma once

#include "../exponential.h"

namespace solera {

enum StreamingStage : int { kWhole, kTop, kSum, kFinish, kColumns };

// How u comes about: from a tile of products (as it is, or made a distance), or from differences.
enum StreamingSource : int {
  kProduct,
  kProductDistance,
  kSquare2,
  kSquare3,
  kSquare,
  kDistance2,
  kDistance3,
  kDistance,
  kCity,
  kStreamingSources
};

// One problem; elements are float or double. Everything of length m is padded to `stride` by values
// that give no weight.
struct StreamingProblem {
  const void *x, *yt;         // (n, d) and, transposed, (d, stride)
  const void* y;              // (m, d)
  const void *xx, *yy;        // squared lengths
  const void *a, *b, *log_b;  // a may be null: then nothing but the potential is asked for
  const void *f_old, *g;
  void* f_new;
  int64_t n, m, d, stride;
  double kappa, alpha, lift;         // K; exponent per u; what xx times unlifts F
  double damping, tilt, relaxation;  // 1 / (1 + epsilon / rho), epsilon / rho, omega
  bool jacobi;                       // column sums with the old F
};

// A strip of rows and a tile of columns of it. `tile` is what the product gave, rows by `step`;
// `buffer` holds four rows of w, or `step` rows of densities.
struct StreamingStrip {
  void *tile, *buffer;
  void *shift, *sum, *scale;  // [rows]
  void* partial;              // column sums of this block, or null
  int64_t step, row, rows, column, columns;
  int stage;
  bool exact;
  double error, mass;
  int64_t bad, dead;
};
constexpr int kStreamingGroup = 4;

struct StreamingTable {
  void (*rows[kStreamingSources])(const StreamingProblem&, StreamingStrip&, bool begin);
  int64_t (*columns)(const StreamingProblem&, const void* partial, int64_t blocks, double low_sum,
                     void* g_new, int64_t first, int64_t last, int64_t* redo, int64_t* dead);
  int64_t lanes;
};

namespace SOLERA_ISA {
namespace {

template <class T>
using V = AccVec<T>;

// Where a sum computed with the old potential as its shift is believed.
template <class T>
struct Range;
template <>
struct Range<float> {
  static constexpr float row_low = 1e-10f, row_high = 1e10f, column_low = 1e-20f,
                         column_high = 1e20f;
  static constexpr float biggest = 3.4028234e38f;
};
template <>
struct Range<double> {
  static constexpr double row_low = 1e-100, row_high = 1e100, column_low = 1e-150,
                          column_high = 1e150;
  static constexpr double biggest = 1.7976931348623157e308;
};

SOLERA_INLINE float log2_of(float x) { return __builtin_log2f(x); }
SOLERA_INLINE double log2_of(double x) { return __builtin_log2(x); }
SOLERA_INLINE float exp2_of(float x) { return __builtin_exp2f(x); }
SOLERA_INLINE double exp2_of(double x) { return __builtin_exp2(x); }
SOLERA_INLINE vf root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = square_root(x[i]);
  return x;
#endif
}
SOLERA_INLINE vd root(vd x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = square_root(x[i]);
  return x;
}

// ---- where u comes from: get(j, u) fills the vectors of the group's rows at tile column j ----

template <class T>
struct Product {
  const T* at[kStreamingGroup];
  SOLERA_INLINE Product(const StreamingProblem&, const StreamingStrip& s, const int64_t* row) {
    for (int r = 0; r < kStreamingGroup; ++r) at[r] = (const T*)s.tile + row[r] * s.step;
  }
  SOLERA_INLINE void get(int64_t j, V<T>* u) const {
    for (int r = 0; r < kStreamingGroup; ++r) u[r] = load(at[r] + j);
  }
};

// The distance from |x|^2 + |y|^2 - 2 <x, y>; where nearly all of it cancels, from differences.
template <class T>
struct ProductDistance {
  const T *at[kStreamingGroup], *x[kStreamingGroup], *yy, *y;
  T xx[kStreamingGroup];
  int64_t d, left;
  SOLERA_INLINE ProductDistance(const StreamingProblem& p, const StreamingStrip& s,
                                const int64_t* row) {
    for (int r = 0; r < kStreamingGroup; ++r) {
      at[r] = (const T*)s.tile + row[r] * s.step;
      x[r] = (const T*)p.x + (s.row + row[r]) * p.d;
      xx[r] = ((const T*)p.xx)[s.row + row[r]];
    }
    yy = (const T*)p.yy + s.column;
    y = (const T*)p.y + s.column * p.d;
    d = p.d;
    left = p.m - s.column;
  }
  __attribute__((noinline)) V<T> again(int r, int64_t j, V<T> square, V<T> scale) const {
    for (int k = 0; k < kLanes<T>; ++k) {
      if (j + k >= left || square[k] > scale[k]) continue;
      T sum = 0;
      for (int64_t i = 0; i < d; ++i) {
        const T t = x[r][i] - y[(j + k) * d + i];
        sum += t * t;
      }
      square[k] = sum;
    }
    return square;
  }
  SOLERA_INLINE void get(int64_t j, V<T>* u) const {
    const V<T> norm = load(yy + j);
    for (int r = 0; r < kStreamingGroup; ++r) {
      const V<T> both = norm + xx[r];
      V<T> square = both - T(2) * load(at[r] + j);
      const V<T> small = both * T(sizeof(T) == 4 ? 1e-3 : 1e-6);
      if (lane_max(V<T>(small - square)) >= 0) square = again(r, j, square, small);
      u[r] = root(at_least(T(0), square));
    }
  }
};

// D coordinates (0: any number) of differences: their squares, the root of that, or absolute
// values.
enum Norm : int { kSquared, kRoot, kAbsolute };
template <class T, int D, Norm N>
struct Differences {
  const T *x[kStreamingGroup], *yt;
  int64_t d, stride;
  SOLERA_INLINE Differences(const StreamingProblem& p, const StreamingStrip& s,
                            const int64_t* row) {
    for (int r = 0; r < kStreamingGroup; ++r) x[r] = (const T*)p.x + (s.row + row[r]) * p.d;
    yt = (const T*)p.yt + s.column;
    d = D == 0 ? p.d : D;
    stride = p.stride;
  }
  SOLERA_INLINE void get(int64_t j, V<T>* u) const {
    for (int r = 0; r < kStreamingGroup; ++r) u[r] = V<T>{};
    for (int64_t k = 0; k < (D == 0 ? d : D); ++k) {
      const V<T> y = load(yt + k * stride + j);
      for (int r = 0; r < kStreamingGroup; ++r) {
        const V<T> t = y - x[r][k];
        if (N == kAbsolute)
          u[r] += vmax(t, -t);
        else
          u[r] += t * t;
      }
    }
    if (N == kRoot)
      for (int r = 0; r < kStreamingGroup; ++r) u[r] = root(u[r]);
  }
};

// ---- the stages ----

template <class T, class S>
struct Group {
  static constexpr int R = kStreamingGroup, L = kLanes<T>;
  const StreamingProblem& p;
  StreamingStrip& s;
  const int64_t first;
  const int count;
  int64_t row[R];

  SOLERA_INLINE Group(const StreamingProblem& p, StreamingStrip& s, int64_t first)
      : p(p), s(s), first(first), count(int(s.rows - first < R ? s.rows - first : R)) {
    for (int r = 0; r < R; ++r) row[r] = first + (r < count ? r : count - 1);
  }
  SOLERA_INLINE T& at(void* list, int r) const { return ((T*)list)[row[r]]; }

  // -(largest b_j 2^(G_j + alpha u)) so far, as a shift.
  SOLERA_INLINE void tops(const S& source, bool begin) const {
    const T *G = (const T*)p.g + s.column, *log_b = (const T*)p.log_b + s.column;
    const T alpha = T(p.alpha);
    V<T> top[R];
    for (int r = 0; r < R; ++r) top[r] = splat(-T(__builtin_inf()));
    for (int64_t j = 0; j < s.columns; j += L) {
      V<T> u[R];
      source.get(j, u);
      const V<T> h = load(G + j) + load(log_b + j);
      for (int r = 0; r < R; ++r) top[r] = vmax(h + alpha * u[r], top[r]);
    }
    for (int r = 0; r < count; ++r) {
      const T shift = -lane_max(top[r]);
      T& held = at(s.shift, r);
      held = begin || shift < held ? shift : held;
    }
  }

  // w into the buffer where it is wanted, and its weighted sum.
  template <bool kKeep, bool kCapped>
  SOLERA_INLINE void sums(const S& source, bool begin) const {
    const T *G = (const T*)p.g + s.column, *b = (const T*)p.b + s.column;
    T* buffer = (T*)s.buffer;
    const T alpha = T(p.alpha);
    T shift[R];
    V<T> total[R];
    for (int r = 0; r < R; ++r) {
      shift[r] = at(s.shift, r);
      total[r] = V<T>{};
    }
    for (int64_t j = 0; j < s.columns; j += L) {
      V<T> u[R];
      source.get(j, u);
      const V<T> g = load(G + j), weight = load(b + j);
      for (int r = 0; r < R; ++r) {
        V<T> w = fast_exp2((g + alpha * u[r]) + shift[r]);
        if (kCapped) w = w > Range<T>::biggest ? splat(Range<T>::biggest) : w;
        total[r] += weight * w;
        if (kKeep) store(buffer + r * s.step + j, w);
      }
    }
    for (int r = 0; r < count; ++r) {
      T& sum = at(s.sum, r);
      sum = lane_sum(total[r]) + (begin ? T(0) : sum);
    }
  }

  SOLERA_INLINE bool believed() const {
    bool good = true;
    for (int r = 0; r < count; ++r) {
      const T x = at(s.sum, r);
      good &= x > Range<T>::row_low && x < Range<T>::row_high;
    }
    return good;
  }

  // The new potential of each row, the state it was in, and what its column terms are scaled by.
  SOLERA_INLINE void finish() const {
    const T *F = (const T*)p.f_old, *xx = (const T*)p.xx, *a = (const T*)p.a;
    T* next = (T*)p.f_new;
    for (int r = 0; r < count; ++r) {
      const int64_t i = s.row + row[r];
      const T sum = at(s.sum, r), shift = at(s.shift, r);
      const double log_sum = double(log2_of(sum)) - double(shift);
      const double lift = p.lift * double(xx[i]);
      double value = -log_sum;
      if (p.tilt != 0) value = p.damping * (value + lift) - lift;
      if (a == nullptr) {
        next[i] = T(value);
        continue;
      }
      const double old = double(F[i]), move = old + log_sum;
      const double state = exp2_of(move > 126 ? 126 : move);
      if (p.relaxation != 1) value = old + p.relaxation * (value - old);
      const double aim = p.tilt == 0 ? 1 : exp2_of(-(old + lift) * p.tilt);
      s.error += double(a[i]) * __builtin_fabs(state - aim);
      s.mass += double(a[i]) * state;
      if (!(sum > 0) || !(value - value == 0)) s.dead = 1;
      next[i] = T(value);
      if (p.jacobi)
        at(s.scale, r) = T(double(a[i]) * exp2_of(old - double(shift)));
      else if (p.tilt == 0 && p.relaxation == 1)
        at(s.scale, r) = a[i] / sum;
      else
        at(s.scale, r) = T(double(a[i]) * exp2_of(value - double(shift)));
    }
  }

  SOLERA_INLINE void scales(T* scale) const {
    for (int r = 0; r < R; ++r) scale[r] = r < count ? at(s.scale, r) : T(0);
  }
  SOLERA_INLINE void columns_of_buffer() const {
    const T* buffer = (const T*)s.buffer;
    T* partial = (T*)s.partial + s.column;
    T scale[R];
    scales(scale);
    for (int64_t j = 0; j < s.columns; j += L) {
      V<T> c = load(partial + j);
      for (int r = 0; r < R; ++r) c += scale[r] * load(buffer + r * s.step + j);
      store(partial + j, c);
    }
  }
  SOLERA_INLINE void columns_again(const S& source) const {
    const T* G = (const T*)p.g + s.column;
    T* partial = (T*)s.partial + s.column;
    const T alpha = T(p.alpha);
    T scale[R], shift[R];
    scales(scale);
    for (int r = 0; r < R; ++r) shift[r] = at(s.shift, r);
    for (int64_t j = 0; j < s.columns; j += L) {
      V<T> u[R];
      source.get(j, u);
      V<T> c = load(partial + j);
      const V<T> g = load(G + j);
      for (int r = 0; r < R; ++r) c += scale[r] * fast_exp2((g + alpha * u[r]) + shift[r]);
      store(partial + j, c);
    }
  }
};

template <class T, class S>
void streaming_rows(const StreamingProblem& p, StreamingStrip& s, bool begin) {
  const FlushSubnormals flush;
  const T* F = (const T*)p.f_old;
  for (int64_t first = 0; first < s.rows; first += kStreamingGroup) {
    const Group<T, S> group(p, s, first);
    if (s.stage == kFinish) {
      s.bad |= !group.believed();
      if (s.exact || !s.bad) group.finish();
      continue;
    }
    const S source(p, s, group.row);
    if (s.stage == kColumns) {
      group.columns_again(source);
      continue;
    }
    if (s.stage == kTop) {
      group.tops(source, begin);
      continue;
    }
    if (begin && !s.exact)
      for (int r = 0; r < group.count; ++r) group.at(s.shift, r) = F[s.row + group.row[r]];
    if (s.stage == kSum) {
      if (s.exact)
        group.template sums<false, true>(source, begin);
      else
        group.template sums<false, false>(source, begin);
      continue;
    }
    if (!s.exact) group.template sums<true, false>(source, true);
    if (s.exact || !group.believed()) {
      group.tops(source, true);
      group.template sums<true, true>(source, true);
    }
    group.finish();
    if (s.partial != nullptr) group.columns_of_buffer();
  }
}

// w_ij = 2^(F_i + G_j + alpha u_ij) into the buffer; times the cost for power 1, over the distance
// (0 at distance 0) for power -1.
template <class T, class S>
void streaming_densities(const StreamingProblem& p, StreamingStrip& s, int power) {
  constexpr int L = kLanes<T>;
  const FlushSubnormals flush;
  const T *F = (const T*)p.f_old, *G = (const T*)p.g + s.column;
  const T *xx = (const T*)p.xx, *yy = (const T*)p.yy + s.column;
  const T alpha = T(p.alpha), most = T(Exponents<T>::largest - 2);
  const T factor = T(p.alpha / p.kappa), lift = T(p.lift / p.kappa);
  for (int64_t first = 0; first < s.rows; first += kStreamingGroup) {
    const Group<T, S> group(p, s, first);
    const S source(p, s, group.row);
    for (int64_t j = 0; j < s.columns; j += L) {
      V<T> u[kStreamingGroup];
      source.get(j, u);
      const V<T> g = load(G + j), norm = lift * load(yy + j);
      for (int r = 0; r < group.count; ++r) {
        const int64_t i = s.row + group.row[r];
        V<T> w = fast_exp2(at_most(most, (g + alpha * u[r]) + F[i]));
        if (power > 0) w = w * ((norm + lift * xx[i]) - factor * u[r]);
        if (power < 0) w = u[r] > T(0) ? w / u[r] : V<T>{};
        store((T*)s.buffer + group.row[r] * s.step + j, w);
      }
    }
  }
}

// out[i][k] += sum_j w_ij v_j sign(x_ik - y_jk), w in the buffer; v has p.b's place.
template <class T>
void streaming_signs(const StreamingProblem& p, StreamingStrip& s, void* out) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < s.rows; ++i) {
    const T* w = (const T*)s.buffer + i * s.step;
    const T* v = (const T*)p.b + s.column;
    for (int64_t k = 0; k < p.d; ++k) {
      const T x = ((const T*)p.x)[(s.row + i) * p.d + k];
      const T* y = (const T*)p.yt + k * p.stride + s.column;
      V<T> sum{};
      for (int64_t j = 0; j < s.columns; j += L) {
        const V<T> t = x - load(y + j), z = load(w + j) * load(v + j);
        sum += t > T(0) ? z : (t < T(0) ? -z : V<T>{});
      }
      ((T*)out)[(s.row + i) * p.d + k] += lane_sum(sum);
    }
  }
}

// The new potential of columns [first, last) from the sums of the blocks, in order; those whose sum
// is not believed are listed in `redo`, of which the count comes back.
template <class T>
int64_t streaming_columns(const StreamingProblem& p, const void* partial, int64_t blocks,
                          double low_sum, void* g_new, int64_t first, int64_t last, int64_t* redo,
                          int64_t* dead) {
  constexpr int kChunk = 64;
  const T low = T(Range<T>::column_low * low_sum), high = Range<T>::column_high;
  const T *G = (const T*)p.g, *yy = (const T*)p.yy;
  int64_t count = 0;
  for (int64_t begin = first; begin < last; begin += kChunk) {
    const int n = int(last - begin < kChunk ? last - begin : kChunk);
    T sum[kChunk] = {};
    for (int64_t k = 0; k < blocks; ++k) {
      const T* row = (const T*)partial + k * p.stride + begin;
      for (int c = 0; c < n; ++c) sum[c] += row[c];
    }
    for (int c = 0; c < n; ++c) {
      const int64_t j = begin + c;
      if (!(sum[c] > low && sum[c] < high)) {
        redo[count++] = j;
        continue;
      }
      const double old = double(G[j]), lift = p.lift * double(yy[j]);
      double value = old - double(log2_of(sum[c]));
      if (p.tilt != 0) value = p.damping * (value + lift) - lift;
      if (p.relaxation != 1) value = old + p.relaxation * (value - old);
      if (!(value - value == 0)) *dead = 1;
      ((T*)g_new)[j] = T(value);
    }
  }
  return count;
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
