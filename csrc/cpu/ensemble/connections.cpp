// Hyper-connections over n residual streams; formulas in python/solera/ensemble/connections.py.
//
// Elements of D a token: width reads n and writes n + 1 (read H; write input and rest), its
// backward reads n + (n + 1) and writes n. The merged form (out given) reads n + 1, writes n + 1,
// and backward reads 2 n + 2 and writes n + 1, where the separate depth connection would read n + 1
// and write n once more each way. Depth alone: n + 1 read, n written; backward n + 1 read, 1
// written (the streams' gradient is the incoming one). Between the two: n (n + 2) + 2 n numbers a
// token. At n = 4, D = 1024, 8192 tokens in float32, width and depth with their backward move
// (9 + 13 + 9 + 6) * 33.5 MB = 1.24 GB.
//
// A token's streams stay in cache while its coefficients are made and used. The manifold's
// coefficients need n (n + 2) products of length n D and Sinkhorn, so there a vector of tokens goes
// together: the projection is read once for all, and a lane does a token's Sinkhorn.
#include "connection_pieces.h"

namespace solera {

struct ConnectionsTable {
  void (*width[4])(const ConnectionPass&, void* scratch, int64_t begin, int64_t end);
  void (*width_backward[4])(const ConnectionPass&, void* scratch, int64_t first, int64_t last);
  void (*depth[4])(const ConnectionPass&, int64_t begin, int64_t end);
  void (*depth_backward[4])(const ConnectionPass&, int64_t begin, int64_t end);
  void (*sum_chunks[2])(const void* partial, void* out, int64_t chunks, int64_t columns,
                        int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

// input and rest of a token from its streams and coefficients.
template <class T, int kN>
SOLERA_INLINE void mix(const ConnectionPass& p, const Place& at, int64_t t, const A<T>* const* rows,
                       const A<T>* c) {
  const int64_t n = kN ? kN : at.n;
  T *input = (T*)p.input + t * at.D, *rest[kN ? kN : kMostStreams];
  for (int64_t k = 0; k < n; ++k) rest[k] = (T*)p.rest + at.stream(t, k);
  const bool streaming =
      p.streaming && can_stream(input) && can_stream(rest[0]) && at.D % kLanes<T> == 0;
  strips<kLanes<T>>(at.D, [&](int64_t j, int count) {
    AccVec<T> v[kN ? kN : kMostStreams];
    for (int64_t k = 0; k < n; ++k) v[k] = get(rows[k] + j, count);
    for (int64_t i = 0; i <= n; ++i) {
      AccVec<T> sum = v[0] * c[i];
      for (int64_t k = 1; k < n; ++k) sum += v[k] * c[k * (n + 2) + i];
      put(i == 0 ? input + j : rest[i - 1] + j, sum, count, streaming);
    }
  });
  A<T>* beta = (A<T>*)p.beta + t * n;
  for (int64_t k = 0; k < n; ++k) beta[k] = c[k * (n + 2) + n + 1];
}

template <class T, int kN>
void width_of(const ConnectionPass& p, void* scratch, int64_t begin, int64_t end) {
  typedef A<T> S;
  const Place at{p.streams, p.columns, p.inner};
  const int64_t n = at.n, D = at.D, P = n * (n + 2);
  const bool manifold = p.kind == kManifoldConnection;
  const int64_t block = manifold ? kLanes<T> : 1;
  Work<S> work(scratch, n, D, block, false);
  S* lanes = (S*)((uintptr_t(work.next) + 63) / 64 * 64);
  const S *rows[kLanes<T> * kMostStreams], *segment[kLanes<T>];
  S* w[kMostStreams * (kMostStreams + 2)];
  S mean[kMostStreams], rstd[kMostStreams];
  if (p.kind == kHyperConnection) columns_of((S*)p.projection, n + 2, D, 0, w);
  for (int64_t t = begin; t < end; t += block) {
    const int64_t count = end - t < block ? end - t : block;
    for (int64_t b = 0; b < count; ++b) hold<T>(p, at, t + b, work.held + b * n * D, rows + b * n);
    const S* c = (const S*)p.fixed;
    if (p.kind == kHyperConnection) {
      S* z = (S*)p.z + t * P;
      memset((void*)z, 0, size_t(P) * sizeof(S));
      for (int64_t k = 0; k < n; ++k)
        row_statistics<S>(rows[k], D, p.centred, S(p.eps), mean[k], rstd[k]);
      dots<S>(rows, p.centred ? mean : nullptr, n, w, n + 2, D, z, n + 2);
      for (int64_t k = 0; k < n; ++k) {
        for (int64_t i = 0; i < n + 2; ++i) z[k * (n + 2) + i] *= rstd[k];
        if (p.centred) ((S*)p.mean)[at.row(t, k)] = mean[k];
        ((S*)p.rstd)[at.row(t, k)] = rstd[k];
      }
      activations<S>(p, z, P, work.c);
      const S *fixed = (const S*)p.fixed, *scale = (const S*)p.scale;
      for (int64_t i = 0; i < P; ++i) work.c[i] = fixed[i] + scale[i] * work.c[i];
      c = work.c;
    } else if (manifold) {
      S* z = (S*)p.z + t * P;
      memset((void*)z, 0, size_t(count * P) * sizeof(S));
      S squares[kLanes<T>] = {};
      for (int64_t k = 0; k < n; ++k) {
        columns_of((S*)p.projection, P, n * D, k * D, w);
        for (int64_t b = 0; b < count; ++b) {
          segment[b] = rows[b * n + k];
          squares[b] += row_sum<S>(D, [&](int64_t j, int m) {
            const AccVec<S> v = get(segment[b] + j, m);
            return v * v;
          });
        }
        dots<S>(segment, nullptr, count, w, P, D, z, P);
      }
      for (int64_t b = 0; b < count; ++b) {
        const S r = S(1) / square_root(squares[b] / S(n * D) + S(p.eps));
        ((S*)p.rstd)[t + b] = r;
        for (int64_t i = 0; i < P; ++i) z[b * P + i] *= r;
      }
      manifold_coefficients<S>(p, n, count, z, work.c, nullptr, nullptr, nullptr, lanes);
      c = work.c;
    }
    for (int64_t b = 0; b < count; ++b)
      mix<T, kN>(p, at, t + b, rows + b * n, manifold ? c + b * P : c);
  }
  if (p.streaming) stream_fence();
}
template <class T>
void width(const ConnectionPass& p, void* scratch, int64_t begin, int64_t end) {
  if (p.streams == 4)
    width_of<T, 4>(p, scratch, begin, end);
  else if (p.streams == 2)
    width_of<T, 2>(p, scratch, begin, end);
  else
    width_of<T, 0>(p, scratch, begin, end);
}

// dH of a token from its part through the coefficients (dh, may be null) and the mixing; with `out`
// also that of the layer's output and its weights.
template <class T, int kN>
SOLERA_INLINE void finish_backward(const ConnectionPass& p, const Place& at, int64_t t,
                                   const A<T>* const* grads, const A<T>* c, const A<T>* dh) {
  typedef A<T> S;
  typedef AccVec<T> V;
  const int64_t n = kN ? kN : at.n, D = at.D;
  T* to[kN ? kN : kMostStreams];
  for (int64_t k = 0; k < n; ++k) to[k] = (T*)p.dh + at.stream(t, k);
  const bool streaming = p.streaming && can_stream(to[0]) && D % kLanes<T> == 0;
  const T* out = p.out ? (const T*)p.out + t * D : nullptr;
  T* dout = p.out ? (T*)p.dout + t * D : nullptr;
  const S* beta = p.out ? (const S*)p.out_beta + t * n : nullptr;
  V dbeta[kN ? kN : kMostStreams] = {};
  with_flag(out != nullptr, [&](auto merged) {
    strips<kLanes<T>>(D, [&](int64_t j, int count) {
      V g[kN ? kN + 1 : kMostStreams + 1], total{}, o{};
      for (int64_t i = 0; i <= n; ++i) g[i] = get(grads[i] + j, count);
      if (merged.value) o = get(out + j, count);
      for (int64_t k = 0; k < n; ++k) {
        V v = dh ? get(dh + k * D + j, count) : V{};
        for (int64_t i = 0; i <= n; ++i) v += g[i] * c[k * (n + 2) + i];
        put(to[k] + j, v, count, streaming);
        if (merged.value) {
          total += v * beta[k];
          dbeta[k] += v * o;
        }
      }
      if (merged.value) put(dout + j, total, count);
    });
  });
  if (!out) return;
  for (int64_t k = 0; k < n; ++k) ((S*)p.dout_beta)[t * n + k] = lane_sum(dbeta[k]);
}

template <class T, int kN>
void width_backward_of(const ConnectionPass& p, void* scratch, int64_t first, int64_t last) {
  typedef A<T> S;
  const Place at{p.streams, p.columns, p.inner};
  const int64_t n = at.n, D = at.D, P = n * (n + 2);
  const bool manifold = p.kind == kManifoldConnection, hyper = p.kind == kHyperConnection;
  const int64_t block = manifold ? kLanes<T> : 1;
  const int64_t length = manifold ? n * D : D, count_w = manifold ? P : n + 2;
  Work<S> work(scratch, n, D, block, true);
  S* lanes = (S*)((uintptr_t(work.next) + 63) / 64 * 64);
  const S *rows[kLanes<T> * kMostStreams], *grads[kLanes<T> * (kMostStreams + 1)];
  const S* segment[kLanes<T>];
  S *w[kMostStreams * (kMostStreams + 2)], *g[kMostStreams * (kMostStreams + 2)];
  S* into[kLanes<T> > kMostStreams ? kLanes<T> : kMostStreams];
  S mean[kMostStreams], shift[kMostStreams], pull[kMostStreams], w_mean[kMostStreams + 2];
  S none[kMostStreams] = {};
  const S *scale = (const S*)p.scale, *fixed = (const S*)p.fixed;
  if (hyper) {
    columns_of((S*)p.projection, n + 2, D, 0, w);
    for (int64_t i = 0; i < n + 2; ++i)
      w_mean[i] = row_sum<S>(D, [&](int64_t j, int m) { return get(w[i] + j, m); }) / S(D);
  }
  for (int64_t chunk = first; chunk < last; ++chunk) {
    S* part = p.part_projection ? (S*)p.part_projection + chunk * count_w * length : nullptr;
    S* dfixed = (S*)p.part_numbers + chunk * 3 * P;
    S *dscale = dfixed + P, *dconstant = dscale + P;
    memset((void*)dfixed, 0, size_t(3 * P) * sizeof(S));
    if (part) memset((void*)part, 0, size_t(count_w * length) * sizeof(S));
    const int64_t start = chunk * p.chunk_tokens;
    const int64_t end = start + p.chunk_tokens < p.tokens ? start + p.chunk_tokens : p.tokens;
    for (int64_t t = start; t < end; t += block) {
      const int64_t count = end - t < block ? end - t : block;
      memset((void*)work.dc, 0, size_t(count * P) * sizeof(S));
      for (int64_t b = 0; b < count; ++b) {
        hold<T>(p, at, t + b, work.held + b * n * D, rows + b * n);
        const S** mine = grads + b * (n + 1);
        S* copies = work.grads + b * (n + 1) * D;
        mine[0] = p.dinput ? as_row((const T*)p.dinput + (t + b) * D, copies, D) : work.zero;
        for (int64_t k = 0; k < n; ++k)
          mine[1 + k] =
              p.drest ? as_row((const T*)p.drest + at.stream(t + b, k), copies + (1 + k) * D, D)
                      : work.zero;
        S* dc = work.dc + b * P;
        dots<S>(rows + b * n, nullptr, n, mine, n + 1, D, dc, n + 2);
        for (int64_t k = 0; k < n; ++k)
          dc[k * (n + 2) + n + 1] = p.dbeta ? ((const S*)p.dbeta)[(t + b) * n + k] : S(0);
      }
      const S* c = fixed;
      const S* dh = nullptr;
      if (hyper) {
        const S* z = (const S*)p.z + t * P;
        activations<S>(p, z, P, work.c);
        for (int64_t i = 0; i < P; ++i) {
          const S a = work.c[i], d = work.dc[i];
          const S e = d * scale[i] * (p.tanh ? (1 - a) * (1 + a) : S(1));
          dfixed[i] += d;
          dscale[i] += d * a;
          dconstant[i] += e;
          work.e[i] = e;
          work.c[i] = fixed[i] + scale[i] * a;
        }
        for (int64_t k = 0; k < n; ++k) {
          const S r = ((const S*)p.rstd)[at.row(t, k)];
          mean[k] = p.centred ? ((const S*)p.mean)[at.row(t, k)] : S(0);
          S inner = 0, average = 0;
          for (int64_t i = 0; i < n + 2; ++i) {
            const S e = work.e[k * (n + 2) + i];
            inner += e * z[k * (n + 2) + i];
            average += e * w_mean[i];
            work.f[k * (n + 2) + i] = e * r;
          }
          pull[k] = r * r * inner / S(D);
          shift[k] = p.centred ? r * average : S(0);
          into[k] = work.dh + k * D;
        }
        columns_of(part, n + 2, D, 0, g);
        const Pull<S> all{
            rows, p.centred ? mean : nullptr, shift, pull, work.f, n + 2, D, into, w, g, true};
        pull_all<S>(all, n, n + 2);
        c = work.c;
        dh = work.dh;
      } else if (manifold) {
        const S* z = (const S*)p.z + t * P;
        manifold_coefficients<S>(p, n, count, z, work.c, work.dc, work.e, work.f, lanes);
        for (int64_t b = 0; b < count; ++b) {
          S inner = 0;
          const S r = ((const S*)p.rstd)[t + b];
          for (int64_t i = 0; i < P; ++i) {
            S &e = work.e[b * P + i], &f = work.f[b * P + i];
            const S zi = z[b * P + i];
            dfixed[i] += f;
            dscale[i] += f * zi;
            inner += e * zi;
            f = e * r;
          }
          pull[b] = r * r * inner / S(n * D);
        }
        for (int64_t k = 0; k < n; ++k) {
          for (int64_t b = 0; b < count; ++b) {
            segment[b] = rows[b * n + k];
            into[b] = work.dh + (b * n + k) * D;
          }
          columns_of((S*)p.projection, P, n * D, k * D, w);
          columns_of(part, P, n * D, k * D, g);
          const Pull<S> all{segment, nullptr, none, pull, work.f, P, D, into, w, g, true};
          pull_all<S>(all, count, P);
        }
        c = work.c;
        dh = work.dh;
      } else {
        for (int64_t i = 0; i < P; ++i) dfixed[i] += work.dc[i];
      }
      for (int64_t b = 0; b < count; ++b)
        finish_backward<T, kN>(p, at, t + b, grads + b * (n + 1), manifold ? c + b * P : c,
                               dh ? dh + b * n * D : nullptr);
    }
  }
  if (p.streaming) stream_fence();
}
template <class T>
void width_backward(const ConnectionPass& p, void* scratch, int64_t first, int64_t last) {
  if (p.streams == 4)
    width_backward_of<T, 4>(p, scratch, first, last);
  else
    width_backward_of<T, 0>(p, scratch, first, last);
}

// ---- depth: streams plus the layer's output ----

template <class T>
void depth(const ConnectionPass& p, int64_t begin, int64_t end) {
  const Place at{p.streams, p.columns, p.inner};
  for (int64_t t = begin; t < end; ++t) {
    const T* out = (const T*)p.out + t * at.D;
    for (int64_t k = 0; k < at.n; ++k) {
      const T* h = (const T*)p.h + at.stream(t, k);
      T* to = (T*)p.rest + at.stream(t, k);
      const A<T> beta = ((const A<T>*)p.out_beta)[t * at.n + k];
      const bool streaming = p.streaming && can_stream(to);
      strips<kLanes<T>>(at.D, [&](int64_t j, int n) {
        put(to + j, get(h + j, n) + get(out + j, n) * beta, n, streaming);
      });
    }
  }
  if (p.streaming) stream_fence();
}

template <class T>
void depth_backward(const ConnectionPass& p, int64_t begin, int64_t end) {
  typedef AccVec<T> V;
  const Place at{p.streams, p.columns, p.inner};
  for (int64_t t = begin; t < end; ++t) {
    const T *out = (const T*)p.out + t * at.D, *g[kMostStreams];
    T* dout = (T*)p.dout + t * at.D;
    const A<T>* beta = (const A<T>*)p.out_beta + t * at.n;
    for (int64_t k = 0; k < at.n; ++k) g[k] = (const T*)p.drest + at.stream(t, k);
    V dbeta[kMostStreams] = {};
    strips<kLanes<T>>(at.D, [&](int64_t j, int n) {
      const V o = get(out + j, n);
      V total{};
      for (int64_t k = 0; k < at.n; ++k) {
        const V v = get(g[k] + j, n);
        total += v * beta[k];
        dbeta[k] += v * o;
      }
      put(dout + j, total, n);
    });
    for (int64_t k = 0; k < at.n; ++k) ((A<T>*)p.dout_beta)[t * at.n + k] = lane_sum(dbeta[k]);
  }
}

}  // namespace

extern const ConnectionsTable connections_table;
const ConnectionsTable connections_table = {
    {width<float>, width<double>, width<bf16>, width<f16>},
    {width_backward<float>, width_backward<double>, width_backward<bf16>, width_backward<f16>},
    {depth<float>, depth<double>, depth<bf16>, depth<f16>},
    {depth_backward<float>, depth_backward<double>, depth_backward<bf16>, depth_backward<f16>},
    {sum_chunks<float>, sum_chunks<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "connection_inputs.h"

namespace solera {

SOLERA_PICK(ConnectionsTable, connections_table)

namespace {

using WidthResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using WidthGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kConnectionChunks = 16, kLeastChunkTokens = 16;

WidthResult connection_width(const Tensor& h, OptTensor out, OptTensor out_beta,
                             OptTensor projection, OptTensor constant, const Tensor& fixed,
                             OptTensor scale, int64_t kind, bool centred, bool tanh, double eps,
                             int64_t iterations) {
  ConnectionInputs in(h, out, out_beta);
  in.parameters(projection, constant, fixed, scale, kind);
  ConnectionPass& p = in.p;
  const std::vector<int64_t> none = {0}, numbers = {in.streams[0], in.streams[2], in.numbers};
  const std::vector<int64_t> rows = {in.streams[0], in.streams[1], in.streams[2]};
  const std::vector<int64_t> tokens = {in.streams[0], in.streams[2]};
  const bool hyper = kind == kHyperConnection;
  Tensor input = empty_like(h, sizes(in.tokens)), rest = empty_like(h, sizes(in.streams));
  Tensor beta = empty_like(h, sizes(in.betas), in.acc);
  Tensor z = empty_like(h, sizes(kind == kFixedConnection ? none : numbers), in.acc);
  Tensor mean = empty_like(h, sizes(hyper && centred ? rows : none), in.acc);
  Tensor rstd =
      empty_like(h, sizes(hyper ? rows : (kind == kManifoldConnection ? tokens : none)), in.acc);
  p.input = input.mutable_data_ptr();
  p.rest = rest.mutable_data_ptr();
  p.beta = beta.mutable_data_ptr();
  p.z = z.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr();
  p.iterations = iterations;
  p.eps = eps;
  p.centred = centred;
  p.tanh = tanh;
  const auto kernel = pick_connections_table().width[dtype_of(h)];
  const int64_t bytes = (2 * p.streams + 1) * p.columns * int64_t(h.element_size());
  parallel_for(0, p.tokens, std::max<int64_t>(grain_for(bytes), kLeastChunkTokens),
               [&](int64_t begin, int64_t end) {
                 std::unique_ptr<double[]> scratch(new double[in.scratch(false)]);
                 kernel(p, scratch.get(), begin, end);
               });
  return {input, rest, beta, z, mean, rstd};
}

WidthGradients connection_width_backward(OptTensor dinput, OptTensor drest, OptTensor dbeta,
                                         const Tensor& h, OptTensor out, OptTensor out_beta,
                                         OptTensor projection, OptTensor constant,
                                         const Tensor& fixed, OptTensor scale, const Tensor& z,
                                         const Tensor& mean, const Tensor& rstd, int64_t kind,
                                         bool centred, bool tanh, int64_t iterations) {
  ConnectionInputs in(h, out, out_beta);
  in.parameters(projection, constant, fixed, scale, kind);
  ConnectionPass& p = in.p;
  const int64_t n = p.streams, D = p.columns, N = in.numbers;
  const bool given = kind != kFixedConnection, manifold = kind == kManifoldConnection;
  p.dinput = in.add(dinput, in.own, p.tokens * D);
  p.drest = in.add(drest, in.own, h.numel());
  p.dbeta = in.add(dbeta, in.acc, p.tokens * n);
  if (given) {
    p.z = const_cast<void*>(in.add(z, in.acc, p.tokens * N));
    p.rstd = const_cast<void*>(in.add(rstd, in.acc, manifold ? p.tokens : p.tokens * n));
    if (centred) p.mean = const_cast<void*>(in.add(mean, in.acc, p.tokens * n));
  }
  p.iterations = iterations;
  p.centred = centred;
  p.tanh = tanh;
  const int64_t most = manifold ? 256 : 64;
  const int64_t spread = (p.tokens + kConnectionChunks - 1) / kConnectionChunks;
  p.chunk_tokens = std::max(kLeastChunkTokens, std::min(most, spread));
  const int64_t chunks = (p.tokens + p.chunk_tokens - 1) / p.chunk_tokens;
  const std::vector<int64_t> none = {0}, weights = {manifold ? N : n + 2, manifold ? n * D : D};
  const std::vector<int64_t> parts = {chunks, weights[0], weights[1]}, triple = {chunks, 3 * N};
  const std::vector<int64_t> whole = {3 * N}, numbers = {N};
  Tensor dh = empty_like(h, sizes(in.streams));
  Tensor dout = empty_like(h, sizes(out.has_value() ? in.tokens : none));
  Tensor dout_beta = empty_like(h, sizes(out.has_value() ? in.betas : none), in.acc);
  Tensor dprojection = empty_like(h, sizes(given ? weights : none), in.acc);
  Tensor part = empty_like(h, sizes(given ? parts : none), in.acc);
  Tensor part_numbers = empty_like(h, sizes(triple), in.acc);
  Tensor all = empty_like(h, sizes(whole), in.acc);
  p.dh = dh.mutable_data_ptr();
  p.dout = dout.mutable_data_ptr();
  p.dout_beta = dout_beta.mutable_data_ptr();
  p.part_projection = given ? part.mutable_data_ptr() : nullptr;
  p.part_numbers = part_numbers.mutable_data_ptr();
  const auto& table = pick_connections_table();
  const auto kernel = table.width_backward[dtype_of(h)];
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<double[]> scratch(new double[in.scratch(true)]);
    kernel(p, scratch.get(), begin, end);
  });
  const auto sum = table.sum_chunks[in.acc == ScalarType::Double];
  const auto finish = [&](const Tensor& from, Tensor& to, int64_t columns) {
    parallel_for(0, columns, grain_for(chunks * 4), [&](int64_t begin, int64_t end) {
      sum(from.const_data_ptr(), to.mutable_data_ptr(), chunks, columns, begin, end);
    });
  };
  if (given) finish(part, dprojection, weights[0] * weights[1]);
  finish(part_numbers, all, 3 * N);
  const size_t bytes = size_t(N) * (in.acc == ScalarType::Double ? 8 : 4);
  const auto third = [&](int64_t i) {
    Tensor t = empty_like(h, sizes(i > 0 && !given ? none : numbers), in.acc);
    if ((i == 0 || given) && bytes > 0)
      std::memcpy(t.mutable_data_ptr(), static_cast<const char*>(all.const_data_ptr()) + i * bytes,
                  bytes);
    return t;
  };
  return {dh, dout, dout_beta, dprojection, third(2), third(0), third(1)};
}

Tensor connection_depth(const Tensor& out, const Tensor& h, const Tensor& beta) {
  ConnectionInputs in(h, out, beta);
  Tensor to = empty_like(h, sizes(in.streams));
  in.p.rest = to.mutable_data_ptr();
  const auto kernel = pick_connections_table().depth[dtype_of(h)];
  const int64_t bytes = (2 * in.p.streams + 1) * in.p.columns * int64_t(h.element_size());
  parallel_for(0, in.p.tokens, grain_for(bytes),
               [&](int64_t begin, int64_t end) { kernel(in.p, begin, end); });
  return to;
}

std::tuple<Tensor, Tensor> connection_depth_backward(const Tensor& grad, const Tensor& out,
                                                     const Tensor& beta) {
  ConnectionInputs in(grad, out, beta);
  Tensor dout = empty_like(grad, sizes(in.tokens));
  Tensor dbeta = empty_like(grad, sizes(in.betas), in.acc);
  in.p.drest = in.p.h;
  in.p.dout = dout.mutable_data_ptr();
  in.p.dout_beta = dbeta.mutable_data_ptr();
  const auto kernel = pick_connections_table().depth_backward[dtype_of(grad)];
  const int64_t bytes = (in.p.streams + 2) * in.p.columns * int64_t(grad.element_size());
  parallel_for(0, in.p.tokens, grain_for(bytes),
               [&](int64_t begin, int64_t end) { kernel(in.p, begin, end); });
  return {dout, dbeta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("connection_width", TORCH_BOX(&connection_width));
  m.impl("connection_width_backward", TORCH_BOX(&connection_width_backward));
  m.impl("connection_depth", TORCH_BOX(&connection_depth));
  m.impl("connection_depth_backward", TORCH_BOX(&connection_depth_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
