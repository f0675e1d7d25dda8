// The scans of online normalisation: per channel, along the samples, over (N, C) numbers.
//
//   forward    d = mean_n - m,  v <- a v + (1 - a) var_n + a (1 - a) d^2,  m <- m + (1 - a) d
//   backward   u <- a u + (E[g] - k w E[y]) rstd,  w <- w (1 - k E[y^2]) + E[g y],  k = 1 - a
//
// Row n of the results is the state before sample n, row N the state after the last. Channels lie
// along the vector lanes and are split over the threads; the state is kept in double. Bytes: 4 (8)
// numbers a sample and channel, nothing beside the passes over x.
#include "../simd.h"

namespace solera {

struct OnlineScan {
  const void *mean, *var;  // (N, C)
  void *m, *v;             // (N + 1, C), row 0 given
  int64_t samples, channels;
  double alpha;
};
struct OnlineScanBackward {
  const void *g, *gy, *y, *yy, *rstd;  // (N, C)
  void *u, *w;                         // (N + 1, C), row 0 given
  int64_t samples, channels;
  double alpha;
};
constexpr int kOnlineBlock = 16;  // channels in registers

struct OnlineScanTable {
  // Indexed by the type of the numbers: 0 float, 1 double.
  void (*forward[2])(const OnlineScan&, int64_t begin, int64_t end);
  void (*backward[2])(const OnlineScanBackward&, int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

template <class A>
void forward(const OnlineScan& p, int64_t begin, int64_t end) {
  const double a = p.alpha, k = 1 - a, ak = a * k;
  const int64_t C = p.channels;
  for (int64_t c = begin; c < end; c += kOnlineBlock) {
    const int count = int(end - c < kOnlineBlock ? end - c : kOnlineBlock);
    A *ms = (A*)p.m + c, *vs = (A*)p.v + c;
    double m[kOnlineBlock], v[kOnlineBlock];
    for (int i = 0; i < count; ++i) m[i] = double(ms[i]), v[i] = double(vs[i]);
    for (int64_t n = 0; n < p.samples; ++n) {
      const A *mean = (const A*)p.mean + n * C + c, *var = (const A*)p.var + n * C + c;
      A *m_out = ms + (n + 1) * C, *v_out = vs + (n + 1) * C;
      for (int i = 0; i < count; ++i) {
        const double d = double(mean[i]) - m[i];
        v[i] = a * v[i] + k * double(var[i]) + ak * d * d;
        m[i] += k * d;
        m_out[i] = A(m[i]);
        v_out[i] = A(v[i]);
      }
    }
  }
}

template <class A>
void backward(const OnlineScanBackward& p, int64_t begin, int64_t end) {
  const double a = p.alpha, k = 1 - a;
  const int64_t C = p.channels;
  for (int64_t c = begin; c < end; c += kOnlineBlock) {
    const int count = int(end - c < kOnlineBlock ? end - c : kOnlineBlock);
    A *us = (A*)p.u + c, *ws = (A*)p.w + c;
    double u[kOnlineBlock], w[kOnlineBlock];
    for (int i = 0; i < count; ++i) u[i] = double(us[i]), w[i] = double(ws[i]);
    for (int64_t n = 0; n < p.samples; ++n) {
      const int64_t at = n * C + c;
      const A *g = (const A*)p.g + at, *gy = (const A*)p.gy + at, *y = (const A*)p.y + at;
      const A *yy = (const A*)p.yy + at, *rstd = (const A*)p.rstd + at;
      A *u_out = us + (n + 1) * C, *w_out = ws + (n + 1) * C;
      for (int i = 0; i < count; ++i) {
        u[i] = a * u[i] + (double(g[i]) - k * w[i] * double(y[i])) * double(rstd[i]);
        w[i] = w[i] * (1 - k * double(yy[i])) + double(gy[i]);
        u_out[i] = A(u[i]);
        w_out[i] = A(w[i]);
      }
    }
  }
}

}  // namespace

extern const OnlineScanTable online_scan_table;
const OnlineScanTable online_scan_table = {
    {forward<float>, forward<double>},
    {backward<float>, backward<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {

SOLERA_PICK(OnlineScanTable, online_scan_table)

namespace {

// (N, C) numbers of the accumulator's type, in order; what does not fit is refused.
Tensor scan_rows(const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == like.size(1) &&
                      t.scalar_type() == like.scalar_type(),
                  "online_scan: expected (N, C) tensors of one shape and dtype");
  return dense(t);
}

// An (N + 1, C) result whose first row is the state given.
Tensor scan_state(const Tensor& state, const Tensor& like) {
  STD_TORCH_CHECK(state.dim() == 1 && state.size(0) == like.size(1) &&
                      state.scalar_type() == like.scalar_type(),
                  "online_scan: expected (C,) states of the dtype of the (N, C) tensors");
  const int64_t sizes[] = {like.size(0) + 1, like.size(1)};
  Tensor out = empty_like(like, Sizes(sizes, 2));
  const Tensor first = dense(state);
  if (first.numel() > 0)
    std::memcpy(out.mutable_data_ptr(), first.const_data_ptr(),
                size_t(first.numel()) * first.element_size());
  return out;
}

int scan_type(const Tensor& t) {
  const Dtype dtype = dtype_of(t);
  STD_TORCH_CHECK(dtype == kFloat32 || dtype == kFloat64,
                  "online_scan: expected float32 or float64");
  return dtype == kFloat64;
}

// Whole blocks of channels go to a thread: a channel's lane does not depend on the thread count.
template <class P, class Kernel>
void over_blocks(const P& p, int64_t bytes, Kernel kernel) {
  const int64_t blocks = (p.channels + kOnlineBlock - 1) / kOnlineBlock;
  const int64_t grain = grain_for(bytes * p.samples * kOnlineBlock);
  parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kOnlineBlock;
    kernel(p, begin * kOnlineBlock, last < p.channels ? last : p.channels);
  });
}

std::tuple<Tensor, Tensor> online_scan(const Tensor& mean_in, const Tensor& var_in, const Tensor& m,
                                       const Tensor& v, double alpha) {
  const Tensor mean = scan_rows(mean_in, mean_in), var = scan_rows(var_in, mean_in);
  const auto kernel = pick_online_scan_table().forward[scan_type(mean)];
  Tensor ms = scan_state(m, mean), vs = scan_state(v, mean);
  const OnlineScan p{mean.const_data_ptr(),
                     var.const_data_ptr(),
                     ms.mutable_data_ptr(),
                     vs.mutable_data_ptr(),
                     mean.size(0),
                     mean.size(1),
                     alpha};
  over_blocks(p, 4 * int64_t(mean.element_size()), kernel);
  return {ms, vs};
}

std::tuple<Tensor, Tensor> online_scan_backward(const Tensor& g_in, const Tensor& gy_in,
                                                const Tensor& y_in, const Tensor& yy_in,
                                                const Tensor& rstd_in, const Tensor& u,
                                                const Tensor& w, double alpha) {
  const Tensor g = scan_rows(g_in, g_in), gy = scan_rows(gy_in, g_in), y = scan_rows(y_in, g_in);
  const Tensor yy = scan_rows(yy_in, g_in), rstd = scan_rows(rstd_in, g_in);
  const auto kernel = pick_online_scan_table().backward[scan_type(g)];
  Tensor us = scan_state(u, g), ws = scan_state(w, g);
  const OnlineScanBackward p{g.const_data_ptr(),
                             gy.const_data_ptr(),
                             y.const_data_ptr(),
                             yy.const_data_ptr(),
                             rstd.const_data_ptr(),
                             us.mutable_data_ptr(),
                             ws.mutable_data_ptr(),
                             g.size(0),
                             g.size(1),
                             alpha};
  over_blocks(p, 7 * int64_t(g.element_size()), kernel);
  return {us, ws};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("online_scan", TORCH_BOX(&online_scan));
  m.impl("online_scan_backward", TORCH_BOX(&online_scan_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
