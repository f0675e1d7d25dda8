// What the passes of core `connections` are made of: dot products of several rows with several
// projections, the pull of a gradient through them, and the coefficients of a block of tokens.
#pragma once

#include "../exponential.h"
#include "../strips.h"

namespace solera {

struct ConnectionPass {
  const void *h, *out, *out_beta;  // out may be null; out_beta in A
  const void *projection, *constant, *fixed, *scale;
  void *input, *rest, *beta, *z, *mean, *rstd;
  const void *dinput, *drest, *dbeta;  // each may be null
  void *dh, *dout, *dout_beta;
  void *part_projection, *part_numbers;  // a chunk: (P, length), and 3 times n (n + 2)
  int64_t tokens, inner, streams, columns, chunk_tokens, iterations;
  double eps;
  int kind;
  bool centred, tanh, streaming;
};
enum : int { kFixedConnection = 0, kHyperConnection = 1, kManifoldConnection = 2 };

namespace SOLERA_ISA {
namespace {

constexpr int kMostStreams = 16;

// ---- several rows against several projections ----

// z[r][c] += <row_r - mean_r, w_c>. Asks meanwhile for what lies `ahead` elements behind each row.
template <class S, int kR, int kP>
SOLERA_INLINE void dots_block(const S* const* rows, const S* mean, const S* const* w, int64_t D,
                              S* z, int64_t z_step) {
  typedef typename Vec<S>::type V;
  V sum[kR][kP] = {};
  const S *row[kR], *column[kP];
  for (int r = 0; r < kR; ++r) row[r] = rows[r];
  for (int c = 0; c < kP; ++c) column[c] = w[c];
  strips<kLanes<S>>(D, [&](int64_t j, int n) {
    V v[kR];
    for (int r = 0; r < kR; ++r) v[r] = mean ? get(row[r] + j, n) - mean[r] : get(row[r] + j, n);
    for (int c = 0; c < kP; ++c) {
      const V wc = get(column[c] + j, n);  // 0 past the end, so the mean there does not count
      for (int r = 0; r < kR; ++r) sum[r][c] += v[r] * wc;
    }
  });
  for (int r = 0; r < kR; ++r)
    for (int c = 0; c < kP; ++c) z[r * z_step + c] += lane_sum(sum[r][c]);
}
template <class S, int kR>
SOLERA_INLINE void dots_rows(const S* const* rows, const S* mean, const S* const* w, int64_t P,
                             int64_t D, S* z, int64_t z_step) {
  int64_t c = 0;
  for (; c + 6 <= P; c += 6) dots_block<S, kR, 6>(rows, mean, w + c, D, z + c, z_step);
  switch (P - c) {
    case 5:
      return dots_block<S, kR, 5>(rows, mean, w + c, D, z + c, z_step);
    case 4:
      return dots_block<S, kR, 4>(rows, mean, w + c, D, z + c, z_step);
    case 3:
      return dots_block<S, kR, 3>(rows, mean, w + c, D, z + c, z_step);
    case 2:
      return dots_block<S, kR, 2>(rows, mean, w + c, D, z + c, z_step);
    case 1:
      return dots_block<S, kR, 1>(rows, mean, w + c, D, z + c, z_step);
  }
}
template <class S>
void dots(const S* const* rows, const S* mean, int64_t R, const S* const* w, int64_t P, int64_t D,
          S* z, int64_t z_step) {
  int64_t r = 0;
  for (; r + 2 <= R; r += 2)
    dots_rows<S, 2>(rows + r, mean ? mean + r : nullptr, w, P, D, z + r * z_step, z_step);
  if (r < R) dots_rows<S, 1>(rows + r, mean ? mean + r : nullptr, w, P, D, z + r * z_step, z_step);
}

// Of R rows (a call: at most kMostStreams) with factors f (R, P): into[r] += sum_c f[r][c] w_c, and
// g_c += sum_r f[r][c] (row_r - mean_r). If `first`, into[r] starts at
// -shift[r] - (row_r - mean_r) * pull[r].
template <class S>
struct Pull {
  const S *const *rows, *mean, *shift, *pull, *f;
  int64_t f_step, D;
  S* const* into;
  const S* const* w;
  S* const* g;
  bool first;
};
template <class S, int kR, int kP>
SOLERA_INLINE void pull_block(const Pull<S>& p, int64_t r0, int64_t c0) {
  typedef typename Vec<S>::type V;
  const S *row[kR], *w[kP];
  S *into[kR], *g[kP], f[kR][kP], mean[kR];
  for (int r = 0; r < kR; ++r) {
    row[r] = p.rows[r0 + r];
    into[r] = p.into[r0 + r];
    mean[r] = p.mean ? p.mean[r0 + r] : S(0);
    for (int c = 0; c < kP; ++c) f[r][c] = p.f[(r0 + r) * p.f_step + c0 + c];
  }
  for (int c = 0; c < kP; ++c) {
    w[c] = p.w[c0 + c];
    g[c] = p.g[c0 + c];
  }
  const bool first = p.first && c0 == 0;
  strips<kLanes<S>>(p.D, [&](int64_t j, int n) {
    V v[kR], sum[kR];
    for (int r = 0; r < kR; ++r) {
      v[r] = get(row[r] + j, n) - mean[r];
      sum[r] = first ? -p.shift[r0 + r] - v[r] * p.pull[r0 + r] : get(into[r] + j, n);
    }
    for (int c = 0; c < kP; ++c) {
      const V wc = get(w[c] + j, n);
      V gc = get(g[c] + j, n);
      for (int r = 0; r < kR; ++r) {
        sum[r] += wc * f[r][c];
        gc += v[r] * f[r][c];
      }
      put(g[c] + j, gc, n);
    }
    for (int r = 0; r < kR; ++r) put(into[r] + j, sum[r], n);
  });
}
template <class S, int kR>
SOLERA_INLINE void pull_rows(const Pull<S>& p, int64_t r0, int64_t P) {
  int64_t c = 0;
  for (; c + 6 <= P; c += 6) pull_block<S, kR, 6>(p, r0, c);
  switch (P - c) {
    case 5:
      return pull_block<S, kR, 5>(p, r0, c);
    case 4:
      return pull_block<S, kR, 4>(p, r0, c);
    case 3:
      return pull_block<S, kR, 3>(p, r0, c);
    case 2:
      return pull_block<S, kR, 2>(p, r0, c);
    case 1:
      return pull_block<S, kR, 1>(p, r0, c);
  }
}
template <class S>
void pull_all(const Pull<S>& p, int64_t R, int64_t P) {
  int64_t r = 0;
  for (; r + 4 <= R; r += 4) pull_rows<S, 4>(p, r, P);
  for (; r + 2 <= R; r += 2) pull_rows<S, 2>(p, r, P);
  if (r < R) pull_rows<S, 1>(p, r, P);
}

// ---- coefficients ----

// tanh: an odd polynomial near 0, where 1 - 2 / (1 + e^2x) would cancel.
SOLERA_INLINE vf tanhv(vf x) {
  const vf u = x * x;
  vf p = splat(-1382.0f / 155925.0f);
  p = p * u + 62.0f / 2835.0f;
  p = p * u - 17.0f / 315.0f;
  p = p * u + 2.0f / 15.0f;
  p = p * u - 1.0f / 3.0f;
  const vf near = x + x * u * p, far = 1.0f - 2.0f / (1.0f + expv(x + x));
  return u < 0.09f ? near : far;
}
SOLERA_INLINE vd tanhv(vd x) {
  for (int i = 0; i < Vec<double>::lanes; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}
template <class V>
SOLERA_INLINE V sigmoidv(V x) {
  return 1 / (1 + expv(-x));
}

// One step of Sinkhorn on n x n matrices, a lane a matrix: each column (or row) over its sum.
template <class V, class S>
SOLERA_INLINE void normalise(V* m, V* sums, int64_t n, bool columns) {
  const int64_t outer = columns ? 1 : n, inner = columns ? n : 1;
  for (int64_t i = 0; i < n; ++i) {
    V s = m[i * outer];
    for (int64_t j = 1; j < n; ++j) s += m[i * outer + j * inner];
    s = s < S(1e-30) ? splat(S(1e-30)) : s;
    sums[i] = s;
    const V inverse = 1 / s;
    for (int64_t j = 0; j < n; ++j) m[i * outer + j * inner] *= inverse;
  }
}
// Its gradient: g becomes that of the matrix before the step, m that matrix.
template <class V>
SOLERA_INLINE void normalise_backward(V* g, V* m, const V* sums, int64_t n, bool columns) {
  const int64_t outer = columns ? 1 : n, inner = columns ? n : 1;
  for (int64_t i = 0; i < n; ++i) {
    V dot = g[i * outer] * m[i * outer];
    for (int64_t j = 1; j < n; ++j) dot += g[i * outer + j * inner] * m[i * outer + j * inner];
    const V inverse = 1 / sums[i];
    for (int64_t j = 0; j < n; ++j) {
      V& gj = g[i * outer + j * inner];
      gj = (gj - dot) * inverse;
      m[i * outer + j * inner] *= sums[i];
    }
  }
}

// The manifold's coefficients of up to a vector of tokens: t (n (n + 2)) vectors in, the mixing
// matrix m (n n) and the sums of the 2 * iterations steps out.
template <class V, class S>
SOLERA_INLINE void sinkhorn_small(const V* t, V* m, V* sums, int64_t n, int64_t iterations) {
  for (int64_t k = 0; k < n; ++k) {
    V top = t[k];
    for (int64_t j = 1; j < n; ++j) top = vmax(t[j * n + k], top);
    for (int64_t j = 0; j < n; ++j) m[j * n + k] = expv(t[j * n + k] - top);
  }
  for (int64_t i = 0; i < iterations; ++i) {
    normalise<V, S>(m, sums + 2 * i * n, n, true);
    normalise<V, S>(m, sums + (2 * i + 1) * n, n, false);
  }
}

// ---- tokens ----

// Where things lie: streams are (outer, n, inner, D), a token is (outer, inner).
struct Place {
  int64_t n, D, inner;
  SOLERA_INLINE int64_t stream(int64_t t, int64_t k) const {
    return ((t / inner * n + k) * inner + t % inner) * D;
  }
  SOLERA_INLINE int64_t row(int64_t t, int64_t k) const {
    return (t / inner * n + k) * inner + t % inner;
  }
};

// Buffers of one thread, for a block of tokens.
template <class S>
struct Work {
  S* next;
  S *held, *grads, *dh, *zero, *z, *c, *dc, *e, *f;
  Work(void* scratch, int64_t n, int64_t D, int64_t block, bool backward) : next((S*)scratch) {
    const int64_t P = n * (n + 2);
    held = take(block * n * D);
    z = take(block * P);
    c = take(block * P);
    if (!backward) return;
    grads = take(block * (n + 1) * D);
    dh = take(block * n * D);
    zero = take(D);
    dc = take(block * P);
    e = take(block * P);
    f = take(block * P);
    memset((void*)zero, 0, size_t(D) * sizeof(S));
  }
  S* take(int64_t count) {
    S* mine = next;
    next += count;
    return mine;
  }
};

// A row in the accumulator's type: itself if it is, else a copy.
template <class T>
SOLERA_INLINE const A<T>* as_row(const T* p, A<T>* copy, int64_t D) {
  if constexpr (sizeof(T) == sizeof(A<T>)) return p;
  strips<kLanes<T>>(D, [&](int64_t j, int n) { put(copy + j, get(p + j, n), n); });
  return copy;
}

// The streams of a token: with `out` the sum that the depth connection would have stored.
template <class T>
void hold(const ConnectionPass& p, const Place& at, int64_t t, A<T>* copies, const A<T>** rows) {
  for (int64_t k = 0; k < at.n; ++k) {
    const T* h = (const T*)p.h + at.stream(t, k);
    A<T>* copy = copies + k * at.D;
    if (t + 1 < p.tokens) {
      const T* next = (const T*)p.h + at.stream(t + 1, k);
      for (int64_t j = 0; j < 512 / int64_t(sizeof(T)) && j < at.D; j += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(next + j);
    }
    if (!p.out) {
      rows[k] = as_row(h, copy, at.D);
      continue;
    }
    const T* out = (const T*)p.out + t * at.D;
    const A<T> beta = ((const A<T>*)p.out_beta)[t * at.n + k];
    strips<kLanes<T>>(
        at.D, [&](int64_t j, int n) { put(copy + j, get(h + j, n) + get(out + j, n) * beta, n); });
    rows[k] = copy;
  }
}

template <class S>
void row_statistics(const S* row, int64_t D, bool centred, S eps, S& mean, S& rstd) {
  mean = centred ? row_sum<S>(D, [&](int64_t j, int n) { return get(row + j, n); }) / S(D) : S(0);
  const S m = mean;
  const S square = row_sum<S>(D, [&](int64_t j, int n) {
    const AccVec<S> d = keep<S>(get(row + j, n) - m, n);
    return d * d;
  });
  rstd = S(1) / square_root(square / S(D) + eps);
}

// act(z + constant) for the n (n + 2) numbers of a token.
template <class S>
SOLERA_INLINE void activations(const ConnectionPass& p, const S* z, int64_t P, S* act) {
  const S* constant = (const S*)p.constant;
  strips<kLanes<S>>(P, [&](int64_t i, int n) {
    AccVec<S> a = get(z + i, n);
    if (constant) a += get(constant + i, n);
    put(act + i, p.tanh ? tanhv(a) : a, n);
  });
}

// The manifold's coefficients of `count` tokens from z, a lane a token. In backward (dc given) also
// the gradients: `e` that of z, `g` that of t.
template <class S>
void manifold_coefficients(const ConnectionPass& p, int64_t n, int64_t count, const S* z, S* c,
                           const S* dc, S* e, S* g, S* lanes) {
  typedef typename Vec<S>::type V;
  const int64_t P = n * (n + 2);
  const S *fixed = (const S*)p.fixed, *scale = (const S*)p.scale;
  V* t = (V*)lanes;
  V *m = t + P, *grad = m + n * n, *sums = grad + n * n;
  for (int64_t i = 0; i < P; ++i) {
    V v{};
    for (int64_t b = 0; b < count; ++b) v[b] = fixed[i] + scale[i] * z[b * P + i];
    t[i] = v;
  }
  sinkhorn_small<V, S>(t + 2 * n, m, sums, n, p.iterations);
  for (int64_t k = 0; k < n; ++k) {
    const V pre = sigmoidv(t[k]), post = 2 * sigmoidv(t[n + k]);
    for (int64_t b = 0; b < count; ++b) {
      S* mine = c + b * P + k * (n + 2);
      mine[0] = pre[b];
      mine[n + 1] = post[b];
      for (int64_t j = 0; j < n; ++j) mine[1 + j] = m[j * n + k][b];
    }
  }
  if (!dc) return;
  for (int64_t j = 0; j < n; ++j)
    for (int64_t k = 0; k < n; ++k) {
      V v{};
      for (int64_t b = 0; b < count; ++b) v[b] = dc[b * P + k * (n + 2) + 1 + j];
      grad[j * n + k] = v;
    }
  for (int64_t i = 2 * p.iterations - 1; i >= 0; --i)
    normalise_backward(grad, m, sums + i * n, n, i % 2 == 0);
  for (int64_t b = 0; b < count; ++b) {
    S *mine = g + b * P, *ours = e + b * P;
    for (int64_t k = 0; k < n; ++k) {
      const S pre = c[b * P + k * (n + 2)], half = c[b * P + k * (n + 2) + n + 1] / 2;
      mine[k] = dc[b * P + k * (n + 2)] * pre * (1 - pre);
      mine[n + k] = 2 * dc[b * P + k * (n + 2) + n + 1] * half * (1 - half);
    }
    for (int64_t i = 0; i < n * n; ++i) mine[2 * n + i] = grad[i][b] * m[i][b];
    for (int64_t i = 0; i < P; ++i) ours[i] = mine[i] * scale[i];
  }
}

// The projections of stream k: of the shared ones all, of the manifold's the part over that stream.
template <class S>
SOLERA_INLINE void columns_of(S* base, int64_t P, int64_t length, int64_t offset, S** out) {
  for (int64_t c = 0; c < P; ++c) out[c] = base + c * length + offset;
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
