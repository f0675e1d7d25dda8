// Moments per channel, and the affine map with them, forward and backward.
//
// x is (A, M, K) and statistics run over M: a contiguous image batch has K = 1 and A = N C, a
// channels-last one A = N and K = C.
//
//   moments   mean, var                         of x over M
//   affine    y = act(z), z = (x - c) s + t [+ residual]
//   reduce    dt = sum g, ds = sum g d          g = dy act'(z), d = x - c
//   gradient  dx = g s + p d + q, dresidual = g
//
// Bytes, in passes over x: moments reads 1; affine reads 1 and writes 1; reduce reads 2; gradient
// reads 2 and writes 1 (each reads one more with a residual and an activation). So forward and
// backward of a norm move 8; 5 if the second read of each pair comes from cache.
//
// Work is cut into pieces (one a, a slab of M, a chunk of K) whose borders depend on M, K and the
// dtype alone. Within a slab moments are centred exactly: the mean first, then the deviations, from
// the cache. Slabs are merged in order, in double: same bits for any number of threads.
#include "channel_columns.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

// ---- K = 1: one row, scalars for centre, scale and shift ----

template <class T>
SOLERA_INLINE void moments_row(const ChannelWork& w, const Piece& i) {
  constexpr int L = kLanes<T>;
  const T* x = (const T*)w.x + i.data;
  const A<T> count = A<T>(i.valid);
  A<T> mean = total(i.valid, x);
  if (i.valid > 0 || w.finished) mean /= count;
  AccVec<T> sum[2] = {}, squares[2] = {};
  const auto add = [&](AccVec<T> v, int n, int to) {
    const AccVec<T> d = only<T>(v - mean, n);
    sum[to] += d;
    squares[to] += d * d;
  };
  int64_t j = 0;
  for (; j + 2 * L <= i.valid; j += 2 * L) {
    const Two<T> two = take_two(x + j);
    add(two.one, L, 0);
    add(two.other, L, 1);
  }
  strips<L>(i.valid - j, [&](int64_t k, int n) { add(take(x + j + k, n), n, 0); });
  A<T> square = lane_sum(squares[0] + squares[1]);
  if (i.valid > 0) correct(mean, square, lane_sum(sum[0] + sum[1]), count);
  ((A<T>*)w.first)[i.part] = mean;
  ((A<T>*)w.second)[i.part] = w.finished ? square / count : square;
}

template <class T, int kAct, bool kResidual>
SOLERA_INLINE void affine_row(const ChannelWork& w, const Piece& i) {
  const T* x = (const T*)w.x + i.data;
  const T* residual = (const T*)w.residual + (kResidual ? i.data : 0);
  T* y = (T*)w.first + i.data;
  const A<T> c = ((const A<T>*)w.center)[i.stats], s = ((const A<T>*)w.scale)[i.stats];
  const A<T> t = ((const A<T>*)w.shift)[i.stats];
  const bool streaming = w.streaming && can_stream_two(y);
  constexpr int L = kLanes<T>;
  const auto map = [&](AccVec<T> v, AccVec<T> add) {
    AccVec<T> z = (v - c) * s + t;
    if (kResidual) z += add;
    return act<T>(z, kAct);
  };
  int64_t j = 0;
  for (; j + 2 * L <= i.valid; j += 2 * L) {
    ask_two(x + j + w.ahead);
    if (kResidual) ask_two(residual + j + w.ahead);
    const Two<T> v = take_two(x + j), r = kResidual ? take_two(residual + j) : Two<T>{};
    give_two(y + j, Two<T>{map(v.one, r.one), map(v.other, r.other)}, streaming);
  }
  strips<L>(i.valid - j, [&](int64_t k, int n) {
    const AccVec<T> r = kResidual ? take(residual + j + k, n) : AccVec<T>{};
    give(y + j + k, map(take(x + j + k, n), r), n, streaming);
  });
  if (i.valid < i.rows) memset((void*)(y + i.valid), 0, size_t(i.rows - i.valid) * sizeof(T));
}

template <class T, int kAct, bool kResidual>
SOLERA_INLINE void reduce_row(const ChannelWork& w, const Piece& i) {
  constexpr int L = kLanes<T>;
  const T* x = (const T*)w.x + i.data;
  const T* dy = (const T*)w.dy + i.data;
  const T* residual = (const T*)w.residual + (kResidual ? i.data : 0);
  const A<T> c = ((const A<T>*)w.center)[i.stats], s = ((const A<T>*)w.scale)[i.stats];
  const A<T> t = ((const A<T>*)w.shift)[i.stats];
  AccVec<T> g0{}, g1{}, d0{}, d1{};
  const auto add = [&](AccVec<T> v, AccVec<T> g, AccVec<T> r, int n, AccVec<T>& sum_g,
                       AccVec<T>& sum_gd) {
    const AccVec<T> d = v - c;
    if (kAct != kNone) {
      AccVec<T> z = d * s + t;
      if (kResidual) z += r;
      g = only<T>(act_slope<A<T>>(g, z, kAct), n);
    }
    sum_g += g;
    sum_gd += g * only<T>(d, n);
  };
  constexpr bool kRead = kResidual && kAct != kNone;
  int64_t j = 0;
  for (; j + 2 * L <= i.valid; j += 2 * L) {
    const Two<T> v = take_two(x + j), g = take_two(dy + j);
    const Two<T> r = kRead ? take_two(residual + j) : Two<T>{};
    add(v.one, g.one, r.one, L, g0, d0);
    add(v.other, g.other, r.other, L, g1, d1);
  }
  strips<L>(i.valid - j, [&](int64_t k, int n) {
    const AccVec<T> r = kRead ? take(residual + j + k, n) : AccVec<T>{};
    add(take(x + j + k, n), take(dy + j + k, n), r, n, g0, d0);
  });
  ((A<T>*)w.first)[i.part] = lane_sum(g0 + g1);
  ((A<T>*)w.second)[i.part] = lane_sum(d0 + d1);
}

template <class T, int kAct, bool kResidual>
SOLERA_INLINE void gradient_row(const ChannelWork& w, const Piece& i) {
  const T* x = (const T*)w.x + i.data;
  const T* dy = (const T*)w.dy + i.data;
  const T* residual = (const T*)w.residual + (kResidual ? i.data : 0);
  const A<T> c = ((const A<T>*)w.center)[i.stats], s = ((const A<T>*)w.scale)[i.stats];
  const A<T> t = ((const A<T>*)w.shift)[i.stats];
  const A<T> p = ((const A<T>*)w.p)[i.stats], q = ((const A<T>*)w.q)[i.stats];
  T* dx = w.first ? (T*)w.first + i.data : nullptr;
  T* dresidual = w.second ? (T*)w.second + i.data : nullptr;
  const bool streaming = w.streaming && can_stream_two(dx) && can_stream_two(dresidual);
  constexpr int L = kLanes<T>;
  constexpr bool kRead = kResidual && kAct != kNone;
  with_flag(dx != nullptr, [&](auto has_dx) {
    with_flag(dresidual != nullptr, [&](auto has_dresidual) {
      // g becomes dresidual; the result is dx.
      const auto map = [&](AccVec<T> v, AccVec<T>& g, AccVec<T> r) {
        const AccVec<T> d = v - c;
        if (kAct != kNone) {
          AccVec<T> z = d * s + t;
          if (kResidual) z += r;
          g = act_slope<T>(g, z, kAct);
        }
        return g * s + (d * p + q);
      };
      int64_t j = 0;
      for (; j + 2 * L <= i.valid; j += 2 * L) {
        ask_two(x + j + w.ahead);
        ask_two(dy + j + w.ahead);
        if (kRead) ask_two(residual + j + w.ahead);
        const Two<T> v = take_two(x + j), r = kRead ? take_two(residual + j) : Two<T>{};
        Two<T> g = take_two(dy + j);
        const Two<T> to{map(v.one, g.one, r.one), map(v.other, g.other, r.other)};
        if (has_dx.value) give_two(dx + j, to, streaming);
        if (has_dresidual.value) give_two(dresidual + j, g, streaming);
      }
      strips<L>(i.valid - j, [&](int64_t k, int n) {
        AccVec<T> g = take(dy + j + k, n);
        const AccVec<T> r = kRead ? take(residual + j + k, n) : AccVec<T>{};
        const AccVec<T> to = map(take(x + j + k, n), g, r);
        if (has_dx.value) give(dx + j + k, to, n, streaming);
        if (has_dresidual.value) give(dresidual + j + k, g, n, streaming);
      });
    });
  });
  const size_t rest = size_t(i.rows - i.valid) * sizeof(T);
  if (rest && dx) memset((void*)(dx + i.valid), 0, rest);
  if (rest && dresidual) memset((void*)(dresidual + i.valid), 0, rest);
}

// ---- pieces ----

template <class T>
void moments(const ChannelWork& w, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (w.inner == 1)
      moments_row<T>(w, Piece(w, i));
    else
      moments_columns<T>(w, Piece(w, i));
  }
}

#define SOLERA_CHANNEL_RUN(name)                                                                \
  template <class T>                                                                            \
  void name(const ChannelWork& w, int64_t begin, int64_t end) {                                 \
    with_activation(w.activation, [&](auto act) {                                               \
      with_flag(w.residual != nullptr, [&](auto residual) {                                     \
        constexpr int kAct = decltype(act)::value;                                              \
        constexpr bool kResidual = decltype(residual)::value;                                   \
        if (w.inner == 1) {                                                                     \
          for (int64_t i = begin; i < end; ++i) name##_row<T, kAct, kResidual>(w, Piece(w, i)); \
        } else {                                                                                \
          for (int64_t i = begin; i < end; ++i)                                                 \
            name##_columns<T, kAct, kResidual>(w, Piece(w, i));                                 \
        }                                                                                       \
      });                                                                                       \
    });                                                                                         \
  }
SOLERA_CHANNEL_RUN(affine)
SOLERA_CHANNEL_RUN(reduce)
SOLERA_CHANNEL_RUN(gradient)
#undef SOLERA_CHANNEL_RUN

void fence() { stream_fence(); }

SOLERA_INLINE int64_t valid_in(const ChannelWork& w, int64_t a, int64_t slab) {
  int64_t end = w.lengths && w.lengths[a] < w.middle ? w.lengths[a] : w.middle;
  const int64_t left = end - slab * w.slab;
  return left < 0 ? 0 : left < w.slab ? left : w.slab;
}

// Chan's rule, all slabs at once: M2 = sum M2_i + sum n_i (mean_i - mean)^2.
template <class A>
void merge(const ChannelWork& w, const void* means, const void* squares, int64_t begin,
           int64_t end) {
  constexpr int kBlock = 64;
  for (int64_t a = begin; a < end; ++a) {
    double count = 0;
    for (int64_t s = 0; s < w.slabs; ++s) count += double(valid_in(w, a, s));
    for (int64_t k = 0; k < w.inner; k += kBlock) {
      const int n = int(w.inner - k < kBlock ? w.inner - k : kBlock);
      const A* mean = (const A*)means + a * w.slabs * w.inner + k;
      const A* square = (const A*)squares + a * w.slabs * w.inner + k;
      double total[kBlock] = {}, sum[kBlock] = {};
      for (int64_t s = 0; s < w.slabs; ++s) {
        const double here = double(valid_in(w, a, s));
        for (int j = 0; j < n; ++j) total[j] += here * double(mean[s * w.inner + j]);
      }
      for (int j = 0; j < n; ++j) total[j] /= count;
      for (int64_t s = 0; s < w.slabs; ++s) {
        const double here = double(valid_in(w, a, s));
        for (int j = 0; j < n; ++j) {
          const double d = double(mean[s * w.inner + j]) - total[j];
          sum[j] += double(square[s * w.inner + j]) + (here > 0 ? here * d * d : 0.0);
        }
      }
      for (int j = 0; j < n; ++j) {
        ((A*)w.first)[a * w.inner + k + j] = A(total[j]);
        ((A*)w.second)[a * w.inner + k + j] = A(sum[j] / count);
      }
    }
  }
}

template <class A>
void add(const ChannelWork& w, const void* first, const void* second, int64_t begin, int64_t end) {
  constexpr int kBlock = 64;
  for (int64_t a = begin; a < end; ++a) {
    for (int64_t k = 0; k < w.inner; k += kBlock) {
      const int n = int(w.inner - k < kBlock ? w.inner - k : kBlock);
      const int64_t from = a * w.slabs * w.inner + k;
      double one[kBlock] = {}, other[kBlock] = {};
      for (int64_t s = 0; s < w.slabs; ++s) {
        for (int j = 0; j < n; ++j) {
          one[j] += double(((const A*)first)[from + s * w.inner + j]);
          other[j] += double(((const A*)second)[from + s * w.inner + j]);
        }
      }
      for (int j = 0; j < n; ++j) {
        ((A*)w.first)[a * w.inner + k + j] = A(one[j]);
        ((A*)w.second)[a * w.inner + k + j] = A(other[j]);
      }
    }
  }
}

}  // namespace

const ChannelTable channel_norm_table = {
    {moments<float>, moments<double>, moments<bf16>, moments<f16>},
    {affine<float>, affine<double>, affine<bf16>, affine<f16>},
    {reduce<float>, reduce<double>, reduce<bf16>, reduce<f16>},
    {gradient<float>, gradient<double>, gradient<bf16>, gradient<f16>},
    fence,
    {merge<float>, merge<double>},
    {add<float>, add<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT

namespace solera {
namespace {

struct ChannelOp : ChannelCall {
  ChannelOp(const Tensor& x_in, const OptTensor& lengths)
      : ChannelCall(x_in, extent(x_in, 0), extent(x_in, 1), extent(x_in, 2)) {
    if (!lengths.has_value()) return;
    STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long && lengths->dim() == 1 &&
                        lengths->size(0) == outer,
                    "solera: lengths must be (A,) int64");
    w.lengths = static_cast<const int64_t*>(keep(dense(*lengths)));
  }
  static int64_t extent(const Tensor& x, int64_t i) {
    STD_TORCH_CHECK(x.dim() == 3, "solera: x must be (A, M, K)");
    return x.size(i);
  }
  const void* stats(const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == outer && t.size(1) == w.inner,
                    "solera: center, scale, shift, p and q must be (A, K)");
    return number(t);
  }
  void affine(const Tensor& center, const Tensor& scale, const Tensor& shift,
              const OptTensor& residual, int64_t code) {
    w.center = stats(center);
    w.scale = stats(scale);
    w.shift = stats(shift);
    if (residual.has_value()) w.residual = data(*residual);
    activation(code);
  }
  // Two statistics (A, K) by a kernel that leaves them per slab.
  template <class Merge>
  std::tuple<Tensor, Tensor> sums(ChannelTable::Run kernel, Merge merge, int streams) {
    Tensor first = new_stats(), second = new_stats();
    w.streaming = false;
    if (w.slabs == 1) {
      w.first = first.mutable_data_ptr();
      w.second = second.mutable_data_ptr();
      run(kernel, streams);
      return {first, second};
    }
    Tensor one = new_stats(w.slabs), other = new_stats(w.slabs);
    w.first = one.mutable_data_ptr();
    w.second = other.mutable_data_ptr();
    run(kernel, streams);
    w.first = first.mutable_data_ptr();
    w.second = second.mutable_data_ptr();
    parallel_for(0, outer, grain_for(w.slabs * w.inner * 8), [&](int64_t begin, int64_t end) {
      merge(w, one.const_data_ptr(), other.const_data_ptr(), begin, end);
    });
    return {first, second};
  }
};

std::tuple<Tensor, Tensor> channel_moments(const Tensor& x, OptTensor lengths) {
  ChannelOp call(x, lengths);
  const auto& table = pick_channel_norm_table();
  return call.sums(table.moments[call.dtype], table.merge[call.dtype == kFloat64], 1);
}

Tensor channel_affine(const Tensor& x, const Tensor& center, const Tensor& scale,
                      const Tensor& shift, OptTensor residual, OptTensor lengths,
                      int64_t activation) {
  ChannelOp call(x, lengths);
  call.affine(center, scale, shift, residual, activation);
  Tensor y = call.new_data(true);
  call.w.first = y.mutable_data_ptr();
  call.run(pick_channel_norm_table().affine[call.dtype], 2);
  return y;
}

std::tuple<Tensor, Tensor> channel_reduce(const Tensor& dy, const Tensor& x, const Tensor& center,
                                          const Tensor& scale, const Tensor& shift,
                                          OptTensor residual, OptTensor lengths,
                                          int64_t activation) {
  ChannelOp call(x, lengths);
  call.affine(center, scale, shift, residual, activation);
  call.w.dy = call.data(dy);
  const auto& table = pick_channel_norm_table();
  return call.sums(table.reduce[call.dtype], table.add[call.dtype == kFloat64], 2);
}

std::tuple<Tensor, Tensor> channel_gradient(const Tensor& dy, const Tensor& x, const Tensor& center,
                                            const Tensor& scale, const Tensor& shift,
                                            OptTensor residual, OptTensor lengths,
                                            int64_t activation, const Tensor& p, const Tensor& q,
                                            bool need_x, bool need_residual) {
  ChannelOp call(x, lengths);
  call.affine(center, scale, shift, residual, activation);
  call.w.dy = call.data(dy);
  call.w.p = call.stats(p);
  call.w.q = call.stats(q);
  Tensor dx = call.new_data(need_x), dresidual = call.new_data(need_residual);
  call.w.first = need_x ? dx.mutable_data_ptr() : nullptr;
  call.w.second = need_residual ? dresidual.mutable_data_ptr() : nullptr;
  if (need_x || need_residual) call.run(pick_channel_norm_table().gradient[call.dtype], 3);
  return {dx, dresidual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("channel_moments", TORCH_BOX(&channel_moments));
  m.impl("channel_affine", TORCH_BOX(&channel_affine));
  m.impl("channel_reduce", TORCH_BOX(&channel_reduce));
  m.impl("channel_gradient", TORCH_BOX(&channel_gradient));
}

}  // namespace solera
#endif  // SOLERA_FRONT
