// Thousands of small matrices balanced at once: rows and columns divided by their sums in turn.
//
// The matrix is K_ij u_i v_j throughout, K made once from the logits, so that a step is a product
// of K with the other side's factors (n^2 multiply-adds, where dividing in place takes 2 n^2):
//
//   t_j = sum_i K_ij u_i        w_j <- t_j + eps w_j          (deepseek: sums + eps)
//                               w_j <- max(t_j, eps w_j)      (scaling: sums of at least eps)
//                               w_j <- t_j                    (log)              v_j = 1 / w_j
//
// since dividing K u v by s + eps with s = v_j t_j is v_j <- v_j / (v_j t_j + eps) = 1 / (t_j + eps
// / v_j).
//
// Backward does the forward again, keeping u and v of each step, and carries D, the gradient of
// log M, back through the steps: one that divided columns by their sums takes from it
//
//   D_ij <- D_ij - M_ij sum_i D_ij,    M_ij = K_ij u_i v_j after the step
//
// (nothing where eps was the larger, for scaling). The sums are always taken of D as it stands:
// collecting the u_i dw_j of all steps is a third cheaper, but its error is that of the collected
// terms, which near the identity cancel to a thousandth.
//
// Operations for 4 x 4, a lane a matrix, 20 iterations of two steps: forward 40 (16 + 4 * 4) =
// 1,280 vector operations at two a cycle; backward those and 40 (3 * 16 + 4 * 2) = 2,240 more.
// Bytes: 128 a matrix forward, 192 backward: not what limits.
#include "small_lanes.h"

namespace solera {

struct SmallPass {
  const void *x, *grad;  // grad: of the result; given, the pass is backward
  void *out, *scratch;
  int64_t batch, n, m, iterations;
  int kind;
  bool rows;  // which side goes first; else the transpose is balanced
  double eps;
};
struct SmallTable {
  void (*run[4])(const SmallPass&, int64_t first, int64_t last);
  int lanes[4];
};

namespace SOLERA_ISA {
namespace {

// Vectors of matrices that go together: two hide each other's latencies while K stays in L1.
constexpr int64_t kTwoVectors = 64;

// One group's arrays in scratch, each [index][w]; the histories have a slot an iteration.
template <class V, int W>
struct Arrays {
  V *K, *S, *G, *D, *u, *v, *wu, *wv;  // (n m) four times, then n, m, n, m
  V *U, *Vh;                           // T n, (T + 1) m
  SOLERA_INLINE Arrays(void* scratch, int64_t n, int64_t m, int64_t T) {
    V* at = (V*)scratch;
    const auto take = [&](int64_t count) {
      V* p = at;
      at += count * W;
      return p;
    };
    K = take(n * m), S = take(n * m), G = take(n * m), D = take(n * m);
    u = take(n), v = take(m), wu = take(n), wv = take(m), U = take(T * n), Vh = take((T + 1) * m);
  }
};

// The problem as the steps see it: rows first.
template <class S, int N>
struct Sides {
  int64_t rows_, columns_, iterations;
  S eps, ratio;  // columns should sum to 1 / ratio
  SOLERA_INLINE int64_t rows() const { return N ? N : rows_; }
  SOLERA_INLINE int64_t columns() const { return N ? N : columns_; }
  SOLERA_INLINE Sides(const SmallPass& p)
      : rows_(p.rows ? p.n : p.m),
        columns_(p.rows ? p.m : p.n),
        iterations(p.iterations),
        eps(S(p.eps)),
        ratio(S(double(columns_) / double(rows_))) {}
};

// K of the logits that lie there. kDeepseek: the softmax + eps, with the softmax itself in P if
// given. Others: exp(x - largest of the row), P keeping x - largest.
template <class V, class S, int W, int N, int kKind>
void start(V* K, V* P, const Sides<S, N>& s) {
  const int64_t columns = s.columns();
  const V never = splat(-S(__builtin_inff()));
  for (int64_t i = 0; i < s.rows(); ++i)
    for (int w = 0; w < W; ++w) {
      V* row = K + i * columns * W + w;
      V top = splat(Bounds<S>::lowest), sum = {};
      for (int64_t j = 0; j < columns; ++j) top = vmax(row[j * W], top);
      for (int64_t j = 0; j < columns; ++j) {
        const V x = row[j * W];
        const V e = natural_exp(x - top);
        sum += e;
        if (P) P[(i * columns + j) * W + w] = kKind == kDeepseek ? e : x - top;
        // A forbidden entry is left at -0, to be told from an exponential that underflowed.
        row[j * W] = kKind == kDeepseek ? (x == never ? -V{} : e) : e;
      }
      if (kKind != kDeepseek) continue;
      const V scale = reciprocal(at_least(Bounds<S>::tiny, sum));
      for (int64_t j = 0; j < columns; ++j) {
        V& k = row[j * W];
        const V p = k * scale;
        if (P) P[(i * columns + j) * W + w] *= scale;
        k = (k == S(0)) & (bits_as<decltype(k == k)>(k) < 0) ? V{} : p + s.eps;
      }
    }
}

// A factor from its sum t and its last w: v = 1 / w. In `kept` with a minus where eps was the
// larger.
template <int kKind, class V, class S>
SOLERA_INLINE V factor(V t, V& w, S eps, V* kept) {
  const V least = eps * w;
  const V sum = kKind == kDeepseek ? t + least : kKind == kScaling ? (least > t ? least : t) : t;
  w = at_least(Bounds<S>::tiny, sum);
  const V v = reciprocal(w);
  if (kept) *kept = kKind == kScaling ? (least > t ? -v : v) : v;
  return v;
}

template <class V, class S, int W, int N, int kKind, bool kKeep>
void balance(const Arrays<V, W>& a, const Sides<S, N>& s) {
  const int64_t rows = s.rows(), columns = s.columns();
  for (int64_t i = 0; i < rows * W; ++i) a.u[i] = a.wu[i] = splat(S(1));
  for (int64_t j = 0; j < columns * W; ++j) a.v[j] = a.wv[j] = splat(S(1));
  if (kKeep) {
    memcpy((void*)a.U, a.u, size_t(rows * W) * sizeof(V));
    memcpy((void*)a.Vh, a.v, size_t(columns * W) * sizeof(V));
  }
  for (int64_t k = 0; k < s.iterations; ++k) {
    if (kKind != kDeepseek || k > 0)
      product<V, W>(a.K, a.v, columns, rows, 1, columns, [&](int64_t i, const V* t) {
        for (int w = 0; w < W; ++w) {
          const int64_t at = i * W + w;
          a.u[at] = factor<kKind>(t[w], a.wu[at], s.eps, kKeep ? a.U + k * rows * W + at : 0);
        }
      });
    product<V, W>(a.K, a.u, rows, columns, columns, 1, [&](int64_t j, const V* t) {
      for (int w = 0; w < W; ++w) {
        const int64_t at = j * W + w;
        const V sum = N ? t[w] : t[w] * s.ratio;
        a.v[at] = factor<kKind>(sum, a.wv[at], s.eps,
                                kKeep ? a.Vh + (k + 1) * columns * W + at : nullptr);
      }
    });
  }
}

// Back through a step: D -= K a c for the other side's factors a (along o) and c (along i), the
// sums of D along i become `sums`.
template <int kKind, class V, int W, int C>
SOLERA_INLINE void back_block(V* D, const V* K, const V* a_in, const V* c, V* sums, int64_t count,
                              int64_t inner, int64_t outer, int64_t o) {
  V a[C], sum[C] = {};
#pragma GCC unroll 4
  for (int k = 0; k < C; ++k) {
    const V x = a_in[(o + k) * W];
    a[k] = kKind == kScaling ? vmax(x, -x) : x;
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < C; ++k) {
      const int64_t e = (i * inner + (o + k) * outer) * W;
      const V d = D[e] - K[e] * a[k] * c[i * W];
      D[e] = d;
      sum[k] += d;
    }
#pragma GCC unroll 4
  for (int k = 0; k < C; ++k) sums[(o + k) * W] = sum[k];
}
template <int kKind, class V, int W>
SOLERA_INLINE void back(V* D, const V* K, const V* a, const V* c, V* sums, int64_t count,
                        int64_t outs, int64_t inner, int64_t outer) {
  for (int w = 0; w < W; ++w) {
    int64_t o = 0;
    for (; o + 4 <= outs; o += 4)
      back_block<kKind, V, W, 4>(D + w, K + w, a + w, c + w, sums + w, count, inner, outer, o);
    for (; o < outs; ++o)
      back_block<kKind, V, W, 1>(D + w, K + w, a + w, c + w, sums + w, count, inner, outer, o);
  }
}

// G: the gradient of the result, becomes that of log K.
template <class V, class S, int W, int N, int kKind>
void reverse(const Arrays<V, W>& a, const Sides<S, N>& s) {
  const int64_t rows = s.rows(), columns = s.columns(), T = s.iterations;
  // Sums along rows and columns, and those times the factors.
  V *row_sum = a.wu, *column_sum = a.wv, *cu = a.u, *cv = a.v;
  for (int64_t j = 0; j < columns * W; ++j) column_sum[j] = V{};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      for (int w = 0; w < W; ++w) {
        const int64_t e = (i * columns + j) * W + w;
        a.G[e] *= a.K[e] * a.u[i * W + w] * a.v[j * W + w];
        column_sum[j * W + w] += a.G[e];
      }
  for (int64_t k = T - 1; k >= 0; --k) {
    const V *u = a.U + k * rows * W, *v = a.Vh + (k + 1) * columns * W;
    for (int64_t j = 0; j < columns * W; ++j) {
      const V c = N ? v[j] * column_sum[j] : v[j] * column_sum[j] * s.ratio;
      cv[j] = kKind == kScaling ? (v[j] < S(0) ? V{} : c) : c;
    }
    back<kKind, V, W>(a.G, a.K, u, cv, row_sum, columns, rows, 1, columns);
    if (kKind == kDeepseek && k == 0) break;
    for (int64_t i = 0; i < rows * W; ++i) {
      const V c = u[i] * row_sum[i];
      cu[i] = kKind == kScaling ? (u[i] < S(0) ? V{} : c) : c;
    }
    back<kKind, V, W>(a.G, a.K, v - columns * W, cu, column_sum, rows, columns, columns, 1);
  }
}

// Lanes whose logits of a row are too far apart for exponentials, from x - largest of the row.
template <class V, class S>
SOLERA_INLINE auto far_lanes(const V* x, int64_t size, int64_t step) {
  V most = {};
  for (int64_t e = 0; e < size; ++e) {
    const V v = x[e * step];
    most = v == -S(__builtin_inff()) ? most : vmax(-v, most);
  }
  return most > Bounds<S>::far;
}
template <class M>
SOLERA_INLINE bool any(const M& mask) {
  int64_t words[sizeof(M) / 8], all = 0;
  memcpy(words, &mask, sizeof mask);
  for (int64_t word : words) all |= word;
  return all != 0;
}

template <class V, class S, int W>
SOLERA_INLINE LogDomain<V, S, W> log_domain(const Arrays<V, W>& a, int w, int64_t rows,
                                            int64_t columns, int64_t iterations) {
  const S log_ratio = S(__builtin_log(double(columns) / double(rows)));
  return {a.S + w, a.U, a.Vh, rows, columns, iterations, log_ratio};
}

// One group, its logits in K: the result into K; or, with its gradient in G and D, that of the
// logits into G. No dtype here: half precision was widened as it was loaded.
template <class V, class S, int W, int N, int kKind>
void forward_group(const Arrays<V, W>& a, const SmallPass& p) {
  const Sides<S, N> s(p);
  const int64_t rows = s.rows(), columns = s.columns();
  start<V, S, W, N, kKind>(a.K, kKind == kLog ? a.S : nullptr, s);
  balance<V, S, W, N, kKind, false>(a, s);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      for (int w = 0; w < W; ++w) {
        V& y = a.K[(i * columns + j) * W + w];
        y = y * a.u[i * W + w] * a.v[j * W + w];
      }
  if (kKind == kLog)
    for (int w = 0; w < W; ++w) {
      const auto far = far_lanes<V, S>(a.S + w, rows * columns, W);
      if (any(far)) log_domain<V, S, W>(a, w, rows, columns, s.iterations).result(a.K + w, far);
    }
}
template <class V, class S, int W, int N, int kKind>
void backward_group(const Arrays<V, W>& a, const SmallPass& p) {
  const Sides<S, N> s(p);
  const int64_t rows = s.rows(), columns = s.columns();
  start<V, S, W, N, kKind>(a.K, a.S, s);
  balance<V, S, W, N, kKind, true>(a, s);
  reverse<V, S, W, N, kKind>(a, s);
  if (kKind == kDeepseek)  // through K = softmax + eps
    for (int64_t i = 0; i < rows; ++i)
      for (int w = 0; w < W; ++w) {
        const int64_t row = i * columns * W + w;
        const V *p = a.S + row, *K = a.K + row;
        V *g = a.G + row, mean = {};
        for (int64_t j = 0; j < columns * W; j += W) {
          g[j] = p[j] == S(0) ? V{} : g[j] * p[j] / K[j];
          mean += g[j];
        }
        for (int64_t j = 0; j < columns * W; j += W) g[j] -= p[j] * mean;
      }
  if (kKind == kLog)
    for (int w = 0; w < W; ++w) {
      const auto far = far_lanes<V, S>(a.S + w, rows * columns, W);
      if (any(far))
        log_domain<V, S, W>(a, w, rows, columns, s.iterations)
            .gradient(a.D + w, a.G + w, a.wv, far);
    }
}

template <class V, class S, int W, int N>
SOLERA_INLINE auto group_of(int kind, bool backward) {
  typedef void (*Group)(const Arrays<V, W>&, const SmallPass&);
  const Group table[2][3] = {
      {forward_group<V, S, W, N, 0>, forward_group<V, S, W, N, 1>, forward_group<V, S, W, N, 2>},
      {backward_group<V, S, W, N, 0>, backward_group<V, S, W, N, 1>, backward_group<V, S, W, N, 2>},
  };
  return table[backward][kind];
}

template <class T, int W, int N>
void run(const SmallPass& p, int64_t first, int64_t last) {
  typedef AccVec<T> V;
  const Stored stored{p.batch, p.n, p.m, !p.rows};
  const Arrays<V, W> a(p.scratch, p.rows ? p.n : p.m, p.rows ? p.m : p.n, p.iterations);
  const auto group = group_of<V, typename Acc<T>::type, W, N>(p.kind, p.grad != nullptr);
  for (int64_t k = first; k < last; k += W * kLanes<T>) {
    load_group<T, W>((const T*)p.x, stored, k, a.K);
    if (p.grad) load_group<T, W>((const T*)p.grad, stored, k, a.G);
    if (p.grad && p.kind == kLog) memcpy((void*)a.D, a.G, size_t(p.n * p.m * W) * sizeof(V));
    group(a, p);
    store_group<T, W>((T*)p.out, stored, k, p.grad ? a.G : a.K);
  }
}

// first and last: matrices, first a multiple of 2 * lanes.
template <class T>
void groups(const SmallPass& p, int64_t first, int64_t last) {
  const FlushSubnormals flush;
  if constexpr (sizeof(typename Acc<T>::type) == 4) {
    if (p.n == 4 && p.m == 4) return run<T, 2, 4>(p, first, last);
    if (p.n * p.m <= kTwoVectors) return run<T, 2, 0>(p, first, last);
  }
  run<T, 1, 0>(p, first, last);
}

}  // namespace

extern const SmallTable small_table;
const SmallTable small_table = {
    {groups<float>, groups<double>, groups<bf16>, groups<f16>},
    {kLanes<float>, kLanes<double>, kLanes<bf16>, kLanes<f16>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {

SOLERA_PICK(SmallTable, small_table)

namespace {

Tensor small_pass(SmallPass p, const Tensor& x) {
  Tensor out = empty_like(x, x.sizes());
  p.batch = x.size(0);
  p.n = x.size(1);
  p.m = x.size(2);
  if (out.numel() == 0) return out;
  p.x = x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  const auto& table = pick_small_table();
  const Dtype dtype = dtype_of(x);
  const int64_t group = 2 * table.lanes[dtype], size = p.n * p.m, T = p.iterations;
  const size_t vector = size_t(group) * (dtype == kFloat64 ? 8 : 4);
  const int64_t vectors = 4 * size + (p.n + p.m) * (T + 3);
  const int64_t groups = (p.batch + group - 1) / group;
  // An iteration reads a group's matrix twice: more work a byte than the grain is meant for.
  const int64_t grain = grain_for(int64_t(vector) * size * (T + 1) / 4);
  parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    std::unique_ptr<char[]> memory(new char[size_t(vectors) * vector + 64]);
    SmallPass mine = p;
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory.get());
    mine.scratch = memory.get() + (64 - at % 64) % 64;
    const int64_t last = end * group < p.batch ? end * group : p.batch;
    table.run[dtype](mine, begin * group, last);
  });
  return out;
}

SmallPass pass_of(int64_t iterations, int64_t kind, bool rows, double eps) {
  SmallPass p{};
  p.iterations = iterations;
  p.kind = int(kind);
  p.rows = rows;
  p.eps = eps;
  return p;
}

Tensor sinkhorn_small(const Tensor& logits, int64_t iterations, int64_t kind, bool rows,
                      double eps) {
  return small_pass(pass_of(iterations, kind, rows, eps), dense(logits));
}

Tensor sinkhorn_small_backward(const Tensor& grad_in, const Tensor& logits, int64_t iterations,
                               int64_t kind, bool rows, double eps) {
  const Tensor grad = dense(grad_in);
  SmallPass p = pass_of(iterations, kind, rows, eps);
  p.grad = grad.const_data_ptr();
  return small_pass(p, dense(logits));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("sinkhorn_small", TORCH_BOX(&sinkhorn_small));
  m.impl("sinkhorn_small_backward", TORCH_BOX(&sinkhorn_small_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
