// What the passes of core `small` are made of: W vectors of matrices side by side, a lane a matrix.
// Element e of the W vectors lies at [e][w]; nothing ever crosses lanes but the loads and stores,
// so a matrix's result does not depend on its neighbours.
#pragma once

#include "../natural.h"

namespace solera {

enum : int { kDeepseek = 0, kScaling = 1, kLog = 2 };

namespace SOLERA_ISA {
namespace {

// Factors stay below 1 / tiny, so that sums of up to 32 of them are finite. With logits of a row
// within `far` of its largest, the exponentials and their factors keep far from the ends of the
// dtype's range: beyond, variant "log" stays with logarithms.
template <class S>
struct Bounds;
template <>
struct Bounds<float> {
  static constexpr float tiny = 2e-36f, far = 30.0f, lowest = -__FLT_MAX__;
};
template <>
struct Bounds<double> {
  static constexpr double tiny = 1e-300, far = 300.0, lowest = -__DBL_MAX__;
};

// 1 / w for tiny <= w <= 1 / tiny: the processor's estimate and one Newton step, 1.4e-7 at most
// (3.7e-9 on AVX-512) before rounding, in a third of a division's time.
SOLERA_INLINE vf reciprocal(vf w) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_rcp14_ps((__m512)w);
  return r + r * (1.0f - w * r);
#elif defined(__AVX2__)
  const vf r = (vf)_mm256_rcp_ps((__m256)w);
  return r + r * (1.0f - w * r);
#else
  return 1.0f / w;
#endif
}
SOLERA_INLINE vd reciprocal(vd w) { return 1.0 / w; }

// ---- lanes of matrices from matrices in memory, and back ----

#define SOLERA_INTERLEAVE(V, low_lanes, high_lanes)                                  \
  SOLERA_INLINE V low(V a, V b) { return __builtin_shufflevector(a, b, low_lanes); } \
  SOLERA_INLINE V high(V a, V b) { return __builtin_shufflevector(a, b, high_lanes); }
#define SOLERA_LANES(...) __VA_ARGS__
#if SOLERA_VECTOR_BYTES == 64
SOLERA_INTERLEAVE(vf, SOLERA_LANES(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                  SOLERA_LANES(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31))
SOLERA_INTERLEAVE(vd, SOLERA_LANES(0, 8, 1, 9, 2, 10, 3, 11),
                  SOLERA_LANES(4, 12, 5, 13, 6, 14, 7, 15))
#elif SOLERA_VECTOR_BYTES == 32
SOLERA_INTERLEAVE(vf, SOLERA_LANES(0, 8, 1, 9, 2, 10, 3, 11),
                  SOLERA_LANES(4, 12, 5, 13, 6, 14, 7, 15))
SOLERA_INTERLEAVE(vd, SOLERA_LANES(0, 4, 1, 5), SOLERA_LANES(2, 6, 3, 7))
#else
SOLERA_INTERLEAVE(vf, SOLERA_LANES(0, 4, 1, 5), SOLERA_LANES(2, 6, 3, 7))
SOLERA_INTERLEAVE(vd, SOLERA_LANES(0, 2), SOLERA_LANES(1, 3))
#endif
#undef SOLERA_INTERLEAVE
#undef SOLERA_LANES

// L x L in registers: a perfect shuffle of all elements turns (row, lane) by one bit; log2 L of
// them exchange the two.
template <class V>
SOLERA_INLINE void transpose(V* r) {
  constexpr int L = sizeof(V) / sizeof(r[0][0]);
  V s[L];
  for (int step = 1; step < L; step *= 2) {
    for (int i = 0; i < L / 2; ++i) {
      s[2 * i] = low(r[i], r[i + L / 2]);
      s[2 * i + 1] = high(r[i], r[i + L / 2]);
    }
    for (int i = 0; i < L; ++i) r[i] = s[i];
  }
}

// Where matrices lie: `batch` of n x m as stored; with `turned` the passes see the transpose.
struct Stored {
  int64_t batch, n, m;
  bool turned;
  SOLERA_INLINE int64_t place(int64_t e) const { return turned ? (e % m) * n + e / m : e; }
};

template <class T, int W, class V>
void load_group(const T* x, const Stored& s, int64_t first, V* out) {
  constexpr int L = kLanes<T>;
  const int64_t size = s.n * s.m, total = s.batch * size;
  for (int w = 0; w < W; ++w)
    for (int64_t e = 0; e < size; e += L) {
      V r[L];
      for (int l = 0; l < L; ++l) {
        // Lanes past the batch repeat the last matrix; a load past a matrix reads the next one's.
        const int64_t at = first + w * L + l, k = at < s.batch ? at : s.batch - 1;
        const int64_t left = total - k * size - e;
        r[l] = left >= L ? load(x + k * size + e) : load_n(x + k * size + e, int(left));
      }
      transpose(r);
      for (int c = 0; c < L && e + c < size; ++c) out[s.place(e + c) * W + w] = r[c];
    }
}
template <class T, int W, class V>
void store_group(T* y, const Stored& s, int64_t first, const V* in) {
  constexpr int L = kLanes<T>;
  const int64_t size = s.n * s.m;
  for (int w = 0; w < W; ++w)
    for (int64_t e = 0; e < size; e += L) {
      const int count = size - e < L ? int(size - e) : L;
      V r[L] = {};
      for (int c = 0; c < count; ++c) r[c] = in[s.place(e + c) * W + w];
      transpose(r);
      for (int l = 0; l < L; ++l) {
        const int64_t k = first + w * L + l;
        if (k >= s.batch) break;
        if (count == L)
          store(y + k * size + e, r[l]);
        else
          store_n(y + k * size + e, r[l], count);
      }
    }
}

// ---- products with the matrix ----

// For each o < outs: each(o, t), t[w] = sum_i K[i * inner + o * outer] a[i], C sums in flight.
template <class V, int W, int C, class F>
SOLERA_INLINE void product_block(const V* K, const V* a, int64_t count, int64_t inner,
                                 int64_t outer, int64_t o, const F& each) {
  V t[C][W];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) t[c][w] = K[(o + c) * outer * W + w] * a[w];
#pragma GCC unroll 4
  for (int64_t i = 1; i < count; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w)
        t[c][w] += K[(i * inner + (o + c) * outer) * W + w] * a[i * W + w];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) each(o + c, t[c]);
}
template <class V, int W, class F>
SOLERA_INLINE void product(const V* K, const V* a, int64_t count, int64_t outs, int64_t inner,
                           int64_t outer, const F& each) {
  constexpr int C = 8 / W;
  int64_t o = 0;
  for (; o + C <= outs; o += C) product_block<V, W, C>(K, a, count, inner, outer, o, each);
  if (C > 4 && outs - o >= 4) {
    product_block<V, W, 4>(K, a, count, inner, outer, o, each);
    o += 4;
  }
  if (outs - o >= 2) {
    product_block<V, W, 2>(K, a, count, inner, outer, o, each);
    o += 2;
  }
  if (outs > o) product_block<V, W, 1>(K, a, count, inner, outer, o, each);
}

// ---- logarithms, for what exponentials cannot hold ----

// The matrices of one vector, x[e * W], rows x columns; potentials f (rows) and q (columns),
// of every iteration: f[k] and q[k + 1], with q[0] = 0.
template <class V, class S, int W>
struct LogDomain {
  const V* x;
  V *f, *q;
  int64_t rows, columns, iterations;
  S log_ratio;

  // -log sum exp(x + q) over a line of `count`; 0 where nothing is allowed.
  SOLERA_INLINE V line(int64_t at, int64_t stride, const V* r, int64_t count) const {
    V top = splat(-S(__builtin_inff())), sum = {};
    for (int64_t i = 0; i < count; ++i) top = vmax(x[(at + i * stride) * W] + r[i], top);
    const auto none = top == -S(__builtin_inff());
    top = none ? V{} : top;
    for (int64_t i = 0; i < count; ++i) sum += natural_exp(x[(at + i * stride) * W] + r[i] - top);
    const V f = none ? V{} : -(top + natural_log(sum));
    return sum == sum ? f : sum;
  }
  void solve() const {
    for (int64_t j = 0; j < columns; ++j) q[j] = V{};
    for (int64_t k = 0; k < iterations; ++k) {
      V *fk = f + k * rows, *gk = q + k * columns;
      for (int64_t i = 0; i < rows; ++i) fk[i] = line(i * columns, 1, gk, columns);
      for (int64_t j = 0; j < columns; ++j)
        gk[columns + j] = line(j, columns, fk, rows) - log_ratio;
    }
  }
  SOLERA_INLINE V entry(int64_t k, int64_t l, int64_t i, int64_t j) const {
    return natural_exp(x[(i * columns + j) * W] + f[k * rows + i] + q[l * columns + j]);
  }
  template <class M>
  void result(V* y, M where) const {
    solve();
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        V& e = y[(i * columns + j) * W];
        e = where ? entry(iterations - 1, iterations, i, j) : e;
      }
  }
  // d: the gradient of the result, becomes that of x, and goes into g; sums: scratch (columns).
  template <class M>
  void gradient(V* d, V* g, V* sums, M where) const {
    solve();
    const S ratio = S(__builtin_exp(double(log_ratio)));
    for (int64_t j = 0; j < columns; ++j) sums[j] = V{};
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        V& e = d[(i * columns + j) * W];
        e *= entry(iterations - 1, iterations, i, j);
        sums[j] += e;
      }
    for (int64_t k = iterations - 1; k >= 0; --k) {
      for (int64_t j = 0; j < columns; ++j) sums[j] *= ratio;
      for (int64_t i = 0; i < rows; ++i) {
        V sum = {};
        for (int64_t j = 0; j < columns; ++j) {
          V& e = d[(i * columns + j) * W];
          e -= entry(k, k + 1, i, j) * sums[j];
          sum += e;
        }
        for (int64_t j = 0; j < columns; ++j) d[(i * columns + j) * W] -= entry(k, k, i, j) * sum;
      }
      for (int64_t j = 0; j < columns; ++j) {
        sums[j] = V{};
        for (int64_t i = 0; i < rows; ++i) sums[j] += d[(i * columns + j) * W];
      }
    }
    for (int64_t e = 0; e < rows * columns * W; e += W) g[e] = where ? d[e] : g[e];
  }
};

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
