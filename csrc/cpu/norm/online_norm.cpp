// Online normalisation: per channel, along the samples, a state that each sample sees and then
// moves.
//
//   forward    d = mean_n - m,  v <- a v + (1 - a) var_n + a (1 - a) d^2,  m <- m + (1 - a) d
//   backward   u <- a u + (E[g] - k w E[y]) rstd,  w <- w (1 - k E[y^2]) + E[g y],  k = 1 - a
//
// The scans alone (online_scan) take (N, C) numbers. Row n of their results is the state before
// sample n, row N the state after the last. Channels are split over the threads; the state is kept
// in double.
//
// The whole norm (online_norm) adds the passes of channel_norm.cpp:
//   y = (x - m) s + bias,  s = weight / sqrt(v + eps)      dx = g s + p (x - m) + q
//   p = -k w / (v + eps)                                   q = -k u
// A row, one channel of one sample, needs the state of the samples before it and no more, so a
// thread takes its channels sample by sample and works on a row while it lies in L1. Bytes, in
// passes over x: forward reads 1 and writes 1, backward reads 2 and writes 1. Channels-last, or
// with too few channels for the threads, each pass runs over everything (3 and 5): the same sums in
// the same order, so the same bits.
#include "channel_norm.h"

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

// The whole norm. Numbers (N, C) in the accumulator type A, states (C) in double.
struct OnlineWork {
  const void *weight, *bias;   // (C), may be null
  const void *mean, *var;      // moments of x
  const void *sum_g, *sum_gd;  // over positions, d = x - m
  void *ms, *vs;               // (N + 1, C): m and v before each sample and after the last
  void *scale, *shift, *p, *q;
  double *m, *v, *u, *w;
  double *dweight, *dbias;
  int64_t channels;
  double alpha, eps, count;  // count of positions
};

struct OnlineScanTable {
  // Indexed by the type of the numbers: 0 float, 1 double.
  void (*forward[2])(const OnlineScan&, int64_t begin, int64_t end);
  void (*backward[2])(const OnlineScanBackward&, int64_t begin, int64_t end);
  // One sample, channels [begin, end): coefficients from the state, and the state moved on.
  void (*step[2])(const OnlineWork&, int64_t n, int64_t begin, int64_t end);
  void (*step_back[2])(const OnlineWork&, int64_t n, int64_t begin, int64_t end);
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

template <class A>
void step(const OnlineWork& s, int64_t n, int64_t begin, int64_t end) {
  const double a = s.alpha, k = 1 - a, ak = a * k;
  const int64_t C = s.channels, row = n * C;
  A *m_out = (A*)s.ms + row + C, *v_out = (A*)s.vs + row + C;
  for (int64_t c = begin; c < end; ++c) {
    const A rstd = A(1 / __builtin_sqrt(s.v[c] + s.eps));
    ((A*)s.scale)[row + c] = s.weight ? rstd * ((const A*)s.weight)[c] : rstd;
    ((A*)s.shift)[row + c] = s.bias ? ((const A*)s.bias)[c] : A(0);
    const double d = double(((const A*)s.mean)[row + c]) - s.m[c];
    s.v[c] = a * s.v[c] + k * double(((const A*)s.var)[row + c]) + ak * d * d;
    s.m[c] += k * d;
    m_out[c] = A(s.m[c]);
    v_out[c] = A(s.v[c]);
  }
}

template <class A>
void step_back(const OnlineWork& s, int64_t n, int64_t begin, int64_t end) {
  const double a = s.alpha, k = 1 - a;
  const int64_t row = n * s.channels;
  for (int64_t c = begin; c < end; ++c) {
    const int64_t i = row + c;
    const double rstd = 1 / __builtin_sqrt(double(((const A*)s.vs)[i]) + s.eps);
    const double weight = s.weight ? double(((const A*)s.weight)[c]) : 1.0;
    ((A*)s.scale)[i] = A(weight * rstd);
    ((A*)s.p)[i] = A(-k * s.w[c] * rstd * rstd);
    ((A*)s.q)[i] = A(-k * s.u[c]);
    const double g = double(((const A*)s.sum_g)[i]), gy = double(((const A*)s.sum_gd)[i]) * rstd;
    s.dweight[c] += gy;
    s.dbias[c] += g;
    const double y = (double(((const A*)s.mean)[i]) - double(((const A*)s.ms)[i])) * rstd;
    const double yy = double(((const A*)s.var)[i]) * rstd * rstd + y * y, each = weight / s.count;
    s.u[c] = a * s.u[c] + (each * g - k * s.w[c] * y) * rstd;
    s.w[c] = s.w[c] * (1 - k * yy) + each * gy;
  }
}

}  // namespace

extern const OnlineScanTable online_scan_table;
const OnlineScanTable online_scan_table = {
    {forward<float>, forward<double>},
    {backward<float>, backward<double>},
    {step<float>, step<double>},
    {step_back<float>, step_back<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT

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

constexpr int64_t kOnlineBytes = int64_t(16) << 10;  // of the rows taken together, to stay in L1

// x (A, M, K) with K = 1 (rows: A = N C) or K = C (channels-last: A = N).
struct OnlineCall : ChannelCall {
  int64_t samples, channels;
  OnlineWork s{};
  Tensor state[4];
  const ChannelTable& passes = pick_channel_norm_table();
  const OnlineScanTable& table = pick_online_scan_table();

  OnlineCall(const Tensor& x_in, const OptTensor& weight, const Tensor& first, const Tensor& second,
             double alpha, double eps)
      : ChannelCall(x_in, extent(x_in, 0), extent(x_in, 1), extent(x_in, 2)) {
    STD_TORCH_CHECK(first.dim() == 1 && second.dim() == 1 && second.size(0) == first.size(0),
                    "online_norm: expected states (C,)");
    channels = first.size(0);
    STD_TORCH_CHECK(channels > 0 && w.middle > 0 && (w.inner == 1 || w.inner == channels) &&
                        outer * w.inner % channels == 0,
                    "online_norm: x must be (N C, M, 1) or (N, M, C), not empty");
    samples = outer * w.inner / channels;
    s.channels = channels;
    s.alpha = alpha;
    s.eps = eps;
    s.count = double(w.middle);
    s.weight = parameter(weight);
    state[0] = in_double(first);
    state[1] = in_double(second);
  }
  static int64_t extent(const Tensor& x, int64_t i) {
    STD_TORCH_CHECK(x.dim() == 3, "online_norm: x must be (A, M, K)");
    return x.size(i);
  }
  const void* parameter(const OptTensor& t) {
    if (!t.has_value()) return nullptr;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels,
                    "online_norm: weight and bias must be (C,)");
    return number(*t);
  }
  // (N, C) or (N + 1, C) numbers from forward.
  void* numbers(const Tensor& t, int64_t rows) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == channels,
                    "online_norm: expected (N, C) moments and (N + 1, C) states");
    return const_cast<void*>(number(t));
  }
  Tensor rows_of(int64_t rows) const {
    const int64_t size[] = {rows, channels};
    return empty_like(x, Sizes(size, 2), acc);
  }
  Tensor in_double(const Tensor& t) const {
    const int64_t size[] = {channels};
    Tensor out = empty_like(x, Sizes(size, 1), ScalarType::Double);
    const Tensor given =
        dense(t.scalar_type() == ScalarType::Double ? t : torch::stable::to(t, ScalarType::Double));
    std::memcpy(out.mutable_data_ptr(), given.const_data_ptr(), size_t(channels) * 8);
    return out;
  }
  Tensor zeros() const {
    const int64_t size[] = {channels};
    Tensor out = empty_like(x, Sizes(size, 1), ScalarType::Double);
    std::memset(out.mutable_data_ptr(), 0, size_t(channels) * 8);
    return out;
  }
  Tensor narrowed(const Tensor& t) const {
    return acc == ScalarType::Double ? t : torch::stable::to(t, acc);
  }
  static double* doubles(Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

  // kernel leaves its two sums in one and other (N, C), step moves the state, after takes both
  // into `out`, if there is one.
  template <class Merge, class Step>
  void walk(ChannelTable::Run kernel, Merge merge, void* one, void* other, Step step,
            ChannelTable::Run after, void* out, int streams) {
    ChannelWork early = w, merged = w, late = w;
    merged.first = early.first = one;
    merged.second = early.second = other;
    early.streaming = false;
    if (w.slabs > 1) {
      early.first = scratch(new_stats(w.slabs));
      early.second = scratch(new_stats(w.slabs));
    }
    late.first = out;
    late.second = nullptr;
    const auto finish = [&](int64_t a, int64_t end) {
      if (w.slabs > 1) merge(merged, early.first, early.second, a, end);
    };
    const int64_t cut = w.slabs * w.chunks;
    if (w.inner == 1 && channels >= 4 * int64_t(torch::stable::get_num_threads())) {
      const int64_t row = w.middle * int64_t(x.element_size());
      const int64_t block = row < kOnlineBytes ? kOnlineBytes / row : 1;
      parallel_for(0, channels, grain_for(row * samples), [&](int64_t begin, int64_t end) {
        ChannelWork after_row = late;
        for (int64_t n = 0; n < samples; ++n) {
          for (int64_t c = begin; c < end; c += block) {
            const int64_t stop = c + block < end ? c + block : end;
            const int64_t a = n * channels + c, last = n * channels + stop;
            kernel(early, a * cut, last * cut);
            finish(a, last);
            step(s, n, c, stop);
            const int64_t left = stop < end ? stop - c : channels - (c - begin);
            after_row.ahead = ahead_of(left * w.middle, block * w.middle, streams - 1);
            if (out) after(after_row, a * cut, last * cut);
          }
        }
        if (late.streaming) passes.fence();
      });
      return;
    }
    const int64_t grain = grain_for(piece_bytes * streams);
    parallel_for(0, items, grain, [&](int64_t b, int64_t e) { kernel(early, b, e); });
    parallel_for(0, outer, grain_for(w.slabs * w.inner * 8), finish);
    parallel_for(0, channels, grain_for(64 * samples), [&](int64_t begin, int64_t end) {
      for (int64_t n = 0; n < samples; ++n) step(s, n, begin, end);
    });
    if (out)
      parallel_for(0, items, grain, [&](int64_t b, int64_t e) {
        after(late, b, e);
        if (late.streaming) passes.fence();
      });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> online_norm(const Tensor& x, OptTensor weight,
                                                               OptTensor bias, const Tensor& m,
                                                               const Tensor& v, double alpha,
                                                               double eps) {
  OnlineCall call(x, weight, m, v, alpha, eps);
  OnlineWork& s = call.s;
  const int64_t N = call.samples;
  s.bias = call.parameter(bias);
  Tensor y = call.new_data(true), mean = call.rows_of(N), var = call.rows_of(N);
  Tensor ms = call.rows_of(N + 1), vs = call.rows_of(N + 1);
  const size_t row = size_t(call.channels) * ms.element_size();
  std::memcpy(ms.mutable_data_ptr(), call.number(m), row);
  std::memcpy(vs.mutable_data_ptr(), call.number(v), row);
  s.mean = mean.mutable_data_ptr();
  s.var = var.mutable_data_ptr();
  s.ms = ms.mutable_data_ptr();
  s.vs = vs.mutable_data_ptr();
  s.m = call.doubles(call.state[0]);
  s.v = call.doubles(call.state[1]);
  call.w.center = s.ms;
  call.w.scale = s.scale = call.scratch(call.rows_of(N));
  call.w.shift = s.shift = call.scratch(call.rows_of(N));
  const bool wide = call.dtype == kFloat64;
  call.walk(call.passes.moments[call.dtype], call.passes.merge[wide], mean.mutable_data_ptr(),
            var.mutable_data_ptr(), call.table.step[wide], call.passes.affine[call.dtype],
            y.mutable_data_ptr(), 2);
  return {y, mean, var, ms, vs};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> online_norm_backward(
    const Tensor& dy, const Tensor& x, OptTensor weight, const Tensor& mean, const Tensor& var,
    const Tensor& ms, const Tensor& vs, const Tensor& u, const Tensor& w, double alpha, double eps,
    bool need_x) {
  OnlineCall call(x, weight, u, w, alpha, eps);
  OnlineWork& s = call.s;
  const int64_t N = call.samples;
  call.w.dy = call.data(dy);
  s.mean = call.numbers(mean, N);
  s.var = call.numbers(var, N);
  s.ms = call.numbers(ms, N + 1);
  s.vs = call.numbers(vs, N + 1);
  s.u = call.doubles(call.state[0]);
  s.w = call.doubles(call.state[1]);
  Tensor dweight = call.zeros(), dbias = call.zeros(), dx = call.new_data(need_x);
  s.dweight = call.doubles(dweight);
  s.dbias = call.doubles(dbias);
  void *sum_g = call.scratch(call.rows_of(N)), *sum_gd = call.scratch(call.rows_of(N));
  s.sum_g = sum_g;
  s.sum_gd = sum_gd;
  call.w.center = s.ms;
  call.w.shift = s.ms;  // read and not used: there is no activation
  call.w.scale = s.scale = call.scratch(call.rows_of(N));
  call.w.p = s.p = call.scratch(call.rows_of(N));
  call.w.q = s.q = call.scratch(call.rows_of(N));
  const bool wide = call.dtype == kFloat64;
  call.walk(call.passes.reduce[call.dtype], call.passes.add[wide], sum_g, sum_gd,
            call.table.step_back[wide], call.passes.gradient[call.dtype],
            need_x ? dx.mutable_data_ptr() : nullptr, 3);
  return {dx, call.narrowed(dweight), call.narrowed(dbias), call.narrowed(call.state[0]),
          call.narrowed(call.state[1])};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("online_norm", TORCH_BOX(&online_norm));
  m.impl("online_norm_backward", TORCH_BOX(&online_norm_backward));
  m.impl("online_scan", TORCH_BOX(&online_scan));
  m.impl("online_scan_backward", TORCH_BOX(&online_scan_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
