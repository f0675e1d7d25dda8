// Moment exchange: every sample with the moments of another, forward and backward.
//
//   y_n = (x_n - m_n) r_n + m_d,  r_n = s_d / s_n,  d = index[n],  s = sqrt(ratio var + eps)
//   dx_n = dy_n r_n + p_n (x_n - m_n) + dm_n / M,   p_n = ratio ds_n / (s_n M)
//   dm_n = -r_n sum dy_n + sum of (sum dy_k) over the receivers k of n
//   ds_n = -(r_n / s_n) sum dy_n (x_n - m_n) + sum of (sum dy_k (x_k - m_k)) / s_k
//
// x is (N, R, M, K), moments over M; R or K is 1. Bytes, in passes over x: forward reads 1 and
// writes 1, backward reads 2 and writes 1: 5, where moments and affine as passes of their own
// move 8. For that a block of sets is taken through all samples before the next block, in an order
// in which a sample's donor (backward: its receivers) comes before it: then what was read is
// written from the copy in the cache at once. The order exists but for cycles of index, whose first
// sample is held until the end of the cycle. No set depends on how sets are cut into blocks.
#include "channel_columns.h"

namespace solera {

enum ExchangeAction : int { kExchangeBoth = 0, kExchangeHold = 1, kExchangeRelease = 2 };
struct ExchangeStep {
  int64_t sample;
  int action;
};
struct ExchangeWork {
  const void *x, *dy;         // (N, R, M, K)
  void* out;                  // y or dx
  void *mean, *deviation;     // (N, R K) in the accumulator type; written forward, read backward
  const int64_t* index;       // (N)
  const ExchangeStep* steps;  // in forward's or backward's order
  int64_t count, samples, middle, inner, sets;  // of steps; N, M, K, R K
  int64_t block;                                // sets in a block
  double eps, ratio;
  bool streaming;
};
struct ExchangeTable {
  // Over blocks [begin, end); scratch of the size that exchange_scratch gives.
  typedef void (*Run)(const ExchangeWork&, void* scratch, int64_t begin, int64_t end);
  Run forward[4], backward[4];
};
// Accumulators of scratch: two copies of a block (of x, or of x and dy), its coefficients and
// sums, and what comes to each sample's mean and deviation.
inline int64_t exchange_scratch(int64_t block, int64_t middle, int64_t samples, bool backward) {
  return block * (backward ? 4 * middle + 5 + 2 * samples : 2 * middle + 1);
}

namespace SOLERA_ISA {
namespace {

// A block of sets [first, first + width) of one sample: where an element lies, there and in a copy.
struct ExchangeBlock {
  int64_t first, width, middle, inner, sets;
  SOLERA_INLINE int64_t data(int64_t sample) const {
    return inner == 1 ? (sample * sets + first) * middle : sample * sets * middle + first;
  }
  SOLERA_INLINE int64_t stats(int64_t sample) const { return sample * sets + first; }
};

// Calls body(offset in memory, offset in the copy, offset in the statistics, lanes) in memory's
// order.
template <class T, class F>
SOLERA_INLINE void exchange_columns(const ExchangeBlock& b, const F& body) {
  for (int64_t m = 0; m < b.middle; ++m)
    strips<kLanes<T>>(b.width,
                      [&](int64_t k, int n) { body(m * b.inner + k, m * b.width + k, k, n); });
}

template <class T>
SOLERA_INLINE void moments_of_columns(const ExchangeBlock& b, const T* x, A<T>* copy, A<T>* mean,
                                      A<T>* var) {
  constexpr int L = kLanes<T>;
  const A<T> count = A<T>(b.middle);
  column_blocks<T, 8>(b.width, [&](auto width, int64_t k, int n) {
    constexpr int kW = decltype(width)::value;
    AccVec<T> center[kW] = {}, rest[kW] = {}, square[kW] = {};
    for (int64_t from = 0; from < b.middle; from += kRun) {
      const int64_t end = b.middle - from < kRun ? b.middle : from + kRun;
      AccVec<T> sum[kW] = {};
      for (int64_t m = from; m < end; ++m) {
        for (int v = 0; v < kW; ++v) {
          const AccVec<T> value = take(x + m * b.inner + k + v * L, n);
          give(copy + m * b.width + k + v * L, value, n, false);
          sum[v] += value;
        }
      }
      for (int v = 0; v < kW; ++v) center[v] += sum[v];
    }
    for (int v = 0; v < kW; ++v) center[v] /= count;
    for (int64_t from = 0; from < b.middle; from += kRun) {
      const int64_t end = b.middle - from < kRun ? b.middle : from + kRun;
      AccVec<T> one[kW] = {}, other[kW] = {};
      for (int64_t m = from; m < end; ++m) {
        for (int v = 0; v < kW; ++v) {
          const AccVec<T> d = take(copy + m * b.width + k + v * L, n) - center[v];
          one[v] += d;
          other[v] += d * d;
        }
      }
      for (int v = 0; v < kW; ++v) {
        rest[v] += one[v];
        square[v] += other[v];
      }
    }
    for (int v = 0; v < kW; ++v) {
      correct(center[v], square[v], rest[v], count);
      give(mean + k + v * L, center[v], n, false);
      give(var + k + v * L, square[v] / count, n, false);
    }
  });
}

template <class T>
SOLERA_INLINE void moments_of_rows(const ExchangeBlock& b, const T* x, A<T>* copy, A<T>* mean,
                                   A<T>* var) {
  const A<T> count = A<T>(b.middle);
  for (int64_t i = 0; i < b.width; ++i) {
    const T* from = x + i * b.middle;
    A<T>* to = copy + i * b.middle;
    A<T> center = row_sum<T>(b.middle, [&](int64_t j, int n) {
      const AccVec<T> v = take(from + j, n);
      give(to + j, v, n, false);
      return v;
    });
    center /= count;
    AccVec<T> rest{};
    A<T> square = row_sum<T>(b.middle, [&](int64_t j, int n) {
      const AccVec<T> d = only<T>(take(to + j, n) - center, n);
      rest += d;
      return d * d;
    });
    correct(center, square, lane_sum(rest), count);
    mean[i] = center;
    var[i] = square / count;
  }
}

template <class T>
void forward(const ExchangeWork& w, void* scratch, int64_t begin, int64_t end) {
  const int64_t size = w.block * w.middle;
  A<T>* copies[2] = {(A<T>*)scratch, (A<T>*)scratch + size};
  A<T>* scale = (A<T>*)scratch + 2 * size;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t first = at * w.block, left = w.sets - first;
    const ExchangeBlock b{first, left < w.block ? left : w.block, w.middle, w.inner, w.sets};
    for (int64_t i = 0; i < w.count; ++i) {
      const ExchangeStep step = w.steps[i];
      A<T>* copy = copies[step.action != kExchangeBoth];
      A<T>* mean = (A<T>*)w.mean + b.stats(step.sample);
      A<T>* deviation = (A<T>*)w.deviation + b.stats(step.sample);
      if (step.action != kExchangeRelease) {
        const T* x = (const T*)w.x + b.data(step.sample);
        if (w.inner == 1)
          moments_of_rows(b, x, copy, mean, deviation);
        else
          moments_of_columns(b, x, copy, mean, deviation);
        for (int64_t k = 0; k < b.width; ++k)
          deviation[k] = square_root(deviation[k] * A<T>(w.ratio) + A<T>(w.eps));
      }
      if (step.action == kExchangeHold) continue;
      const int64_t donor = b.stats(w.index[step.sample]);
      const A<T>* shift = (const A<T>*)w.mean + donor;
      for (int64_t k = 0; k < b.width; ++k)
        scale[k] = ((const A<T>*)w.deviation)[donor + k] / deviation[k];
      T* y = (T*)w.out + b.data(step.sample);
      if (w.inner == 1) {
        for (int64_t k = 0; k < b.width; ++k) {
          T* to = y + k * w.middle;
          const bool streaming = w.streaming && can_stream(to);
          strips<kLanes<T>>(w.middle, [&](int64_t j, int n) {
            const AccVec<T> v = take(copy + k * w.middle + j, n);
            give(to + j, (v - mean[k]) * scale[k] + shift[k], n, streaming);
          });
        }
        continue;
      }
      const bool streaming = w.streaming && can_stream(y) && w.inner % kLanes<T> == 0;
      exchange_columns<T>(b, [&](int64_t to, int64_t from, int64_t k, int n) {
        const AccVec<T> d = take(copy + from, n) - take(mean + k, n);
        give(y + to, d * take(scale + k, n) + take(shift + k, n), n, streaming);
      });
    }
  }
  if (w.streaming) stream_fence();
}

// Sums of dy and of dy (x - mean) of each set; copies of both factors.
template <class T>
SOLERA_INLINE void sums_of_columns(const ExchangeBlock& b, const T* x, const T* dy,
                                   const A<T>* mean, A<T>* d_copy, A<T>* g_copy, A<T>* sum_g,
                                   A<T>* sum_gd) {
  constexpr int L = kLanes<T>;
  column_blocks<T, 4>(b.width, [&](auto width, int64_t k, int n) {
    constexpr int kW = decltype(width)::value;
    AccVec<T> center[kW], total[2 * kW] = {};
    for (int v = 0; v < kW; ++v) center[v] = take(mean + k + v * L, n);
    for (int64_t from = 0; from < b.middle; from += kRun) {
      const int64_t end = b.middle - from < kRun ? b.middle : from + kRun;
      AccVec<T> sum[2 * kW] = {};
      for (int64_t m = from; m < end; ++m) {
        for (int v = 0; v < kW; ++v) {
          const int64_t in = m * b.inner + k + v * L, out = m * b.width + k + v * L;
          const AccVec<T> d = take(x + in, n) - center[v], g = take(dy + in, n);
          give(d_copy + out, d, n, false);
          give(g_copy + out, g, n, false);
          sum[v] += g;
          sum[kW + v] += g * d;
        }
      }
      for (int v = 0; v < 2 * kW; ++v) total[v] += sum[v];
    }
    for (int v = 0; v < kW; ++v) {
      give(sum_g + k + v * L, total[v], n, false);
      give(sum_gd + k + v * L, total[kW + v], n, false);
    }
  });
}

template <class T>
SOLERA_INLINE void sums_of_rows(const ExchangeBlock& b, const T* x, const T* dy, const A<T>* mean,
                                A<T>* d_copy, A<T>* g_copy, A<T>* sum_g, A<T>* sum_gd) {
  for (int64_t i = 0; i < b.width; ++i) {
    const int64_t row = i * b.middle;
    AccVec<T> plain{};
    sum_gd[i] = row_sum<T>(b.middle, [&](int64_t j, int n) {
      const AccVec<T> d = only<T>(take(x + row + j, n) - mean[i], n), g = take(dy + row + j, n);
      give(d_copy + row + j, d, n, false);
      give(g_copy + row + j, g, n, false);
      plain += g;
      return g * d;
    });
    sum_g[i] = lane_sum(plain);
  }
}

template <class T>
void backward(const ExchangeWork& w, void* scratch, int64_t begin, int64_t end) {
  const int64_t size = w.block * w.middle;
  A<T>* next = (A<T>*)scratch;
  const auto part = [&](int64_t n) {
    A<T>* here = next;
    next += n;
    return here;
  };
  A<T>* d_copies[2] = {part(size), part(size)};
  A<T>* g_copies[2] = {part(size), part(size)};
  A<T>*scale = part(w.block), *p = part(w.block), *q = part(w.block);
  A<T>*sum_g = part(w.block), *sum_gd = part(w.block);
  A<T>*dmeans = part(w.block * w.samples), *ddeviations = part(w.block * w.samples);
  const A<T> count = A<T>(w.middle), ratio = A<T>(w.ratio);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t first = at * w.block, left = w.sets - first;
    const ExchangeBlock b{first, left < w.block ? left : w.block, w.middle, w.inner, w.sets};
    memset((void*)dmeans, 0, size_t(2 * w.block * w.samples) * sizeof(A<T>));
    for (int64_t i = 0; i < w.count; ++i) {
      const ExchangeStep step = w.steps[i];
      const int64_t donor = w.index[step.sample];
      A<T>* d_copy = d_copies[step.action != kExchangeBoth];
      A<T>* g_copy = g_copies[step.action != kExchangeBoth];
      const A<T>* mean = (const A<T>*)w.mean + b.stats(step.sample);
      const A<T>* deviation = (const A<T>*)w.deviation + b.stats(step.sample);
      const A<T>* given = (const A<T>*)w.deviation + b.stats(donor);
      A<T>*dmean = dmeans + step.sample * w.block,
      *ddeviation = ddeviations + step.sample * w.block;
      for (int64_t k = 0; k < b.width; ++k) scale[k] = given[k] / deviation[k];
      if (step.action != kExchangeRelease) {
        const T *x = (const T*)w.x + b.data(step.sample),
                *dy = (const T*)w.dy + b.data(step.sample);
        if (w.inner == 1)
          sums_of_rows(b, x, dy, mean, d_copy, g_copy, sum_g, sum_gd);
        else
          sums_of_columns(b, x, dy, mean, d_copy, g_copy, sum_g, sum_gd);
        A<T>*to_mean = dmeans + donor * w.block, *to_deviation = ddeviations + donor * w.block;
        for (int64_t k = 0; k < b.width; ++k) {
          dmean[k] -= scale[k] * sum_g[k];
          to_mean[k] += sum_g[k];
          const A<T> share = sum_gd[k] / deviation[k];
          ddeviation[k] -= scale[k] * share;
          to_deviation[k] += share;
        }
      }
      if (step.action == kExchangeHold) continue;
      for (int64_t k = 0; k < b.width; ++k) {
        p[k] = ratio * ddeviation[k] / (deviation[k] * count);
        q[k] = dmean[k] / count;
      }
      T* dx = (T*)w.out + b.data(step.sample);
      if (w.inner == 1) {
        for (int64_t k = 0; k < b.width; ++k) {
          const int64_t row = k * w.middle;
          const bool streaming = w.streaming && can_stream(dx + row);
          strips<kLanes<T>>(w.middle, [&](int64_t j, int n) {
            const AccVec<T> g = take(g_copy + row + j, n), d = take(d_copy + row + j, n);
            give(dx + row + j, g * scale[k] + (d * p[k] + q[k]), n, streaming);
          });
        }
        continue;
      }
      const bool streaming = w.streaming && can_stream(dx) && w.inner % kLanes<T> == 0;
      exchange_columns<T>(b, [&](int64_t to, int64_t from, int64_t k, int n) {
        const AccVec<T> g = take(g_copy + from, n), d = take(d_copy + from, n);
        const AccVec<T> rest = d * take(p + k, n) + take(q + k, n);
        give(dx + to, g * take(scale + k, n) + rest, n, streaming);
      });
    }
  }
  if (w.streaming) stream_fence();
}

}  // namespace

extern const ExchangeTable moment_exchange_table;
const ExchangeTable moment_exchange_table = {
    {forward<float>, forward<double>, forward<bf16>, forward<f16>},
    {backward<float>, backward<double>, backward<bf16>, backward<f16>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <algorithm>

namespace solera {

SOLERA_PICK(ExchangeTable, moment_exchange_table)

namespace {

constexpr int64_t kExchangeBytes = int64_t(128) << 10;  // of a block's copy
constexpr int64_t kExchangeSets = 16;                   // at least, side by side: a cache line

// Receivers before donors: leaves first, then each cycle, its first sample held until its end.
std::vector<ExchangeStep> receivers_first(const int64_t* index, int64_t n) {
  std::vector<int64_t> receivers(size_t(n), 0), ready;
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < n, "solera: index out of range");
    ++receivers[size_t(index[i])];
  }
  for (int64_t i = 0; i < n; ++i)
    if (receivers[size_t(i)] == 0) ready.push_back(i);
  std::vector<ExchangeStep> steps;
  std::vector<bool> done(size_t(n), false);
  for (size_t i = 0; i < ready.size(); ++i) {
    const int64_t sample = ready[i], donor = index[sample];
    steps.push_back({sample, kExchangeBoth});
    done[size_t(sample)] = true;
    if (--receivers[size_t(donor)] == 0) ready.push_back(donor);
  }
  for (int64_t first = 0; first < n; ++first) {
    if (done[size_t(first)]) continue;
    const bool alone = index[first] == first;
    steps.push_back({first, alone ? kExchangeBoth : kExchangeHold});
    done[size_t(first)] = true;
    for (int64_t i = index[first]; i != first; i = index[i]) {
      steps.push_back({i, kExchangeBoth});
      done[size_t(i)] = true;
    }
    if (!alone) steps.push_back({first, kExchangeRelease});
  }
  return steps;
}
// The same backwards: donors before receivers.
std::vector<ExchangeStep> donors_first(const int64_t* index, int64_t n) {
  std::vector<ExchangeStep> steps = receivers_first(index, n);
  std::reverse(steps.begin(), steps.end());
  for (ExchangeStep& step : steps)
    if (step.action != kExchangeBoth) step.action = kExchangeHold + kExchangeRelease - step.action;
  return steps;
}

struct ExchangeCall {
  Tensor x, index;
  ExchangeWork w{};
  int64_t item;

  ExchangeCall(const Tensor& x_in, const Tensor& index_in)
      : x(dense(x_in)), index(dense(index_in)) {
    STD_TORCH_CHECK(x.dim() == 4 && (x.size(1) == 1 || x.size(3) == 1),
                    "solera: x must be (N, R, M, K), R or K 1");
    STD_TORCH_CHECK(
        index.scalar_type() == ScalarType::Long && index.dim() == 1 && index.size(0) == x.size(0),
        "solera: index must be (N,) int64");
    item = dtype_of(x) == kFloat64 ? 8 : 4;
    w.samples = x.size(0);
    w.middle = x.size(2);
    w.inner = x.size(3);
    w.sets = x.size(1) * w.inner;
    const int64_t least = w.inner == 1 ? 1 : kExchangeSets;
    const int64_t fit = kExchangeBytes / std::max<int64_t>(1, w.middle * item);
    w.block = std::min(std::max(least, fit / least * least), std::max<int64_t>(1, w.sets));
    w.streaming = x.numel() * int64_t(x.element_size()) >= kChannelStreamBytes;
    w.x = x.const_data_ptr();
    w.index = static_cast<const int64_t*>(index.const_data_ptr());
  }
  void run(ExchangeTable::Run kernel, const std::vector<ExchangeStep>& steps, bool backward) {
    w.steps = steps.data();
    w.count = int64_t(steps.size());
    const int64_t blocks = x.numel() == 0 ? 0 : (w.sets + w.block - 1) / w.block;
    const int64_t bytes = exchange_scratch(w.block, w.middle, w.samples, backward) * item;
    const int64_t grain = grain_for(w.samples * w.block * w.middle * int64_t(x.element_size()));
    parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> scratch(new char[size_t(bytes)]);
      kernel(w, scratch.get(), begin, end);
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> moment_exchange(const Tensor& x, const Tensor& index, double eps,
                                                   double ratio) {
  ExchangeCall call(x, index);
  const int64_t size[] = {call.w.samples, call.w.sets};
  const ScalarType acc = accumulate_type(call.x);
  Tensor y = empty_like(call.x, call.x.sizes());
  Tensor mean = empty_like(call.x, Sizes(size, 2), acc);
  Tensor deviation = empty_like(call.x, Sizes(size, 2), acc);
  call.w.out = y.mutable_data_ptr();
  call.w.mean = mean.mutable_data_ptr();
  call.w.deviation = deviation.mutable_data_ptr();
  call.w.eps = eps;
  call.w.ratio = ratio;
  call.run(pick_moment_exchange_table().forward[dtype_of(call.x)],
           donors_first(call.w.index, call.w.samples), false);
  return {y, mean, deviation};
}

Tensor moment_exchange_backward(const Tensor& dy_in, const Tensor& x, const Tensor& index,
                                const Tensor& mean_in, const Tensor& deviation_in, double ratio) {
  ExchangeCall call(x, index);
  const Tensor dy = dense(dy_in), mean = dense(mean_in), deviation = dense(deviation_in);
  STD_TORCH_CHECK(dy.numel() == call.x.numel() && dy.scalar_type() == call.x.scalar_type(),
                  "solera: dy must have the shape and the dtype of x");
  for (const Tensor& t : {mean, deviation})
    STD_TORCH_CHECK(
        t.numel() == call.w.samples * call.w.sets && t.scalar_type() == accumulate_type(call.x),
        "solera: mean and deviation must be (N, sets) in the accumulator's dtype");
  Tensor dx = empty_like(call.x, call.x.sizes());
  call.w.dy = dy.const_data_ptr();
  call.w.out = dx.mutable_data_ptr();
  call.w.mean = const_cast<void*>(mean.const_data_ptr());
  call.w.deviation = const_cast<void*>(deviation.const_data_ptr());
  call.w.ratio = ratio;
  call.run(pick_moment_exchange_table().backward[dtype_of(call.x)],
           receivers_first(call.w.index, call.w.samples), true);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("moment_exchange", TORCH_BOX(&moment_exchange));
  m.impl("moment_exchange_backward", TORCH_BOX(&moment_exchange_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
