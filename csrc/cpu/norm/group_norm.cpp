// A norm over groups of channels, or over the batch, whole: moments, statistics and affine map in
// one op, and its gradient in another. The passes are those of channel_norm.cpp.
//
//   y = act((x - mu) r w + b [+ residual]),    r = 1 / sqrt(correction var + eps)
//
// With g = dy act'(z), d = x - mu, s = r w, and n values a group:
//   dbias = sum g       dweight = r sum g d        over positions, for each (sample, channel)
//   p = -correction r^3 sum(w sum g d) / n         q = -sum(s sum g) / n        over the group
//   dx = g s + p d + q
//
// Bytes, in passes over x: forward reads 1 and writes 1, backward reads 2 and writes 1, since the
// work goes unit by unit (a group; a channel of the whole batch; a channels-last sample) and a unit
// stays in the L2 cache between its two reads. Where there are too few units for the threads, each
// pass runs over everything instead: the same sums in the same order, so the same bits.
#include "channel_norm.h"

namespace solera {

struct GroupWork {
  int64_t middle, inner;                 // as in ChannelWork
  int64_t rows, stride, first;           // a unit's rows of A: u * first + i * stride, i < rows
  int64_t groups;                        // of the columns of a row (1 where K is 1)
  int64_t channels;                      // C: weight[a / C][a % C] where K is 1, else weight[a][k]
  const void *weight, *bias;             // in the accumulator type, or null
  int64_t weight_stride, bias_stride;    // from sample to sample: 0, or C
  void *one, *other;                     // (A, K): mean and var; or sum g and sum g d
  void *mean, *var;                      // per group
  void *center, *scale, *shift, *p, *q;  // (A, K)
  double eps, correction;
  bool batch;
};
struct GroupTable {
  void (*statistics[2])(const GroupWork&, int64_t unit);
  void (*coefficients[2])(const GroupWork&, int64_t unit);
  void (*cotangents[2])(const GroupWork&, int64_t unit);
  void (*over_samples[2])(const void* each, void* sum, int64_t samples, int64_t channels);
};

namespace SOLERA_ISA {
namespace {

// Where the parameters of a unit's i-th row begin; with K = 1 that is one number.
template <class A>
SOLERA_INLINE const A* parameters(const void* values, int64_t stride, const GroupWork& w,
                                  int64_t unit, int64_t i) {
  if (!values) return nullptr;
  const int64_t a = unit * w.first + i * w.stride;
  if (w.inner > 1) return (const A*)values + a * stride;
  if (stride) return (const A*)values + a;
  return (const A*)values + (w.batch ? unit : unit % (w.channels / w.rows) * w.rows + i);
}

// From the moments of the pieces to those of the groups.
template <class A>
void statistics(const GroupWork& w, int64_t unit) {
  const int64_t columns = w.inner / w.groups;
  const double parts = double(w.rows * columns);
  for (int64_t j = 0; j < w.groups; ++j) {
    double mean = 0, var = 0;
    for (int64_t i = 0; i < w.rows; ++i) {
      const A* one = (const A*)w.one + (unit * w.first + i * w.stride) * w.inner + j * columns;
      for (int64_t k = 0; k < columns; ++k) mean += double(one[k]);
    }
    mean /= parts;
    for (int64_t i = 0; i < w.rows; ++i) {
      const int64_t at = (unit * w.first + i * w.stride) * w.inner + j * columns;
      const A *one = (const A*)w.one + at, *other = (const A*)w.other + at;
      for (int64_t k = 0; k < columns; ++k) {
        const double d = double(one[k]) - mean;
        var += double(other[k]) + d * d;
      }
    }
    ((A*)w.mean)[unit * w.groups + j] = A(mean);
    ((A*)w.var)[unit * w.groups + j] = A(var / parts);
  }
}

template <class A>
SOLERA_INLINE A rstd_of(const GroupWork& w, int64_t group) {
  const double var = double(((const A*)w.var)[group]) * w.correction + w.eps;
  return A(1.0 / __builtin_sqrt(var));
}

// centre, scale and shift of each (a, k) from the moments of its group.
template <class A>
void coefficients(const GroupWork& w, int64_t unit) {
  const int64_t columns = w.inner / w.groups;
  for (int64_t j = 0; j < w.groups; ++j) {
    const int64_t group = unit * w.groups + j;
    const A mean = ((const A*)w.mean)[group], rstd = rstd_of<A>(w, group);
    for (int64_t i = 0; i < w.rows; ++i) {
      const int64_t a = unit * w.first + i * w.stride, at = a * w.inner;
      const A* weight = parameters<A>(w.weight, w.weight_stride, w, unit, i);
      const A* bias = parameters<A>(w.bias, w.bias_stride, w, unit, i);
      A *center = (A*)w.center + at, *scale = (A*)w.scale + at, *shift = (A*)w.shift + at;
      for (int64_t k = j * columns; k < (j + 1) * columns; ++k) {
        center[k] = mean;
        scale[k] = weight ? rstd * weight[k] : rstd;
        shift[k] = bias ? bias[k] : A(0);
      }
    }
  }
}

// p and q from sum g and sum g d of each (a, k), and the latter made the gradient of the weight.
template <class A>
void cotangents(const GroupWork& w, int64_t unit) {
  const int64_t columns = w.inner / w.groups;
  const double count = double(w.rows * columns) * double(w.middle);
  for (int64_t j = 0; j < w.groups; ++j) {
    const double rstd = double(rstd_of<A>(w, unit * w.groups + j));
    double of_rstd = 0, of_center = 0;
    for (int64_t i = 0; i < w.rows; ++i) {
      const int64_t a = unit * w.first + i * w.stride;
      const A* weight = parameters<A>(w.weight, w.weight_stride, w, unit, i);
      const A* sum_g = (const A*)w.one + a * w.inner;
      A* sum_gd = (A*)w.other + a * w.inner;
      for (int64_t k = j * columns; k < (j + 1) * columns; ++k) {
        const double scale = weight ? double(weight[k]) : 1.0;
        of_rstd += scale * double(sum_gd[k]);
        of_center -= scale * rstd * double(sum_g[k]);
        sum_gd[k] = A(rstd * double(sum_gd[k]));
      }
    }
    const A p = A(-w.correction * rstd * rstd * rstd * of_rstd / count), q = A(of_center / count);
    for (int64_t i = 0; i < w.rows; ++i) {
      const int64_t at = (unit * w.first + i * w.stride) * w.inner;
      for (int64_t k = j * columns; k < (j + 1) * columns; ++k) {
        ((A*)w.p)[at + k] = p;
        ((A*)w.q)[at + k] = q;
      }
    }
  }
}

template <class A>
void over_samples(const void* each, void* sum, int64_t samples, int64_t channels) {
  constexpr int kBlock = 64;
  for (int64_t c = 0; c < channels; c += kBlock) {
    const int n = int(channels - c < kBlock ? channels - c : kBlock);
    double total[kBlock] = {};
    for (int64_t i = 0; i < samples; ++i)
      for (int k = 0; k < n; ++k) total[k] += double(((const A*)each)[i * channels + c + k]);
    for (int k = 0; k < n; ++k) ((A*)sum)[c + k] = A(total[k]);
  }
}

}  // namespace

extern const GroupTable group_norm_table;
const GroupTable group_norm_table = {
    {statistics<float>, statistics<double>},
    {coefficients<float>, coefficients<double>},
    {cotangents<float>, cotangents<double>},
    {over_samples<float>, over_samples<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT

namespace solera {

SOLERA_PICK(GroupTable, group_norm_table)

namespace {

// x is (N, C, S), or (N, S, C) if `last`.
struct GroupCall : ChannelCall {
  int64_t samples, channels, units, group_total;
  bool fused;
  GroupWork g{};
  const GroupTable& table = pick_group_norm_table();
  const ChannelTable& passes = pick_channel_norm_table();

  static int64_t outer_of(const Tensor& x, bool batch, bool last) {
    STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0, "solera: x must be (N, C, S), not empty");
    return !last ? x.size(0) * x.size(1) : batch ? 1 : x.size(0);
  }
  static int64_t middle_of(const Tensor& x, bool batch, bool last) {
    return !last ? x.size(2) : batch ? x.size(0) * x.size(1) : x.size(1);
  }
  GroupCall(const Tensor& x_in, const OptTensor& weight, const OptTensor& bias,
            const OptTensor& residual, int64_t groups, bool batch, bool last, double eps,
            double correction, int64_t code)
      : ChannelCall(x_in, outer_of(x_in, batch, last), middle_of(x_in, batch, last),
                    last ? x_in.size(2) : 1) {
    samples = x.size(0);
    channels = x.size(last ? 2 : 1);
    if (batch) groups = channels;
    STD_TORCH_CHECK(groups > 0 && channels % groups == 0, "solera: groups must divide C");
    STD_TORCH_CHECK(eps >= 0, "solera: eps must not be negative");
    group_total = batch ? channels : samples * groups;
    if (last) {
      g.rows = 1;
      g.stride = g.first = 1;
      g.groups = groups;
      units = outer;
    } else if (batch) {
      g.rows = samples;
      g.stride = channels;
      g.first = 1;
      g.groups = 1;
      units = channels;
    } else {
      g.rows = channels / groups;
      g.stride = 1;
      g.first = g.rows;
      g.groups = 1;
      units = samples * groups;
    }
    g.middle = w.middle;
    g.inner = w.inner;
    g.channels = channels;
    g.eps = eps;
    g.correction = correction;
    g.batch = batch;
    g.weight = affine_parameter(weight, batch, g.weight_stride);
    g.bias = affine_parameter(bias, batch, g.bias_stride);
    if (residual.has_value()) w.residual = data(*residual);
    activation(code);
    fused = units >= 4 * int64_t(torch::stable::get_num_threads());
  }
  const void* affine_parameter(const OptTensor& t, bool batch, int64_t& stride) {
    stride = 0;
    if (!t.has_value()) return nullptr;
    const bool each = t->dim() == 2;
    STD_TORCH_CHECK((t->dim() == 1 && t->size(0) == channels) ||
                        (each && !batch && t->size(0) == samples && t->size(1) == channels),
                    "solera: weight and bias must be (C,) or (N, C)");
    if (each) stride = channels;
    return number(*t);
  }
  Tensor per_group(bool batch) const {
    const int64_t flat[] = {batch ? 1 : samples, batch ? channels : group_total / samples};
    return empty_like(x, Sizes(flat, 2), acc);
  }
  void coefficients_at(Tensor center, Tensor scale, Tensor shift) {
    w.center = g.center = scratch(center);
    w.scale = g.scale = scratch(scale);
    w.shift = g.shift = scratch(shift);
  }
  // before(unit), the first kernel's two sums into g.one and g.other, between(unit), the second
  // kernel into first and second.
  template <class Before, class Between>
  void run_both(ChannelTable::Run kernel, bool merging, ChannelTable::Run after, void* first,
                void* second, int streams, const Before& before, const Between& between) {
    ChannelWork early = w, merged = w, late = w;
    merged.first = early.first = g.one;
    merged.second = early.second = g.other;
    if (w.slabs > 1) {
      early.first = scratch(new_stats(w.slabs));
      early.second = scratch(new_stats(w.slabs));
    }
    late.first = first;
    late.second = second;
    const bool writes = first || second, wide = dtype == kFloat64;
    const auto merge = merging ? passes.merge[wide] : passes.add[wide];
    const auto finish = [&](int64_t unit) {
      for (int64_t i = 0; w.slabs > 1 && i < g.rows; ++i) {
        const int64_t a = unit * g.first + i * g.stride;
        merge(merged, early.first, early.second, a, a + 1);
      }
      between(unit);
    };
    const int64_t row = w.slabs * w.chunks;
    // Units side by side in memory: whole units in turn, or (over the batch) their part of each
    // sample, so that short rows are still read a few pages at a time.
    const auto rows_of = [&](ChannelTable::Run run, const ChannelWork& work, int64_t u, int64_t n) {
      if (g.stride == 1)
        return run(work, u * g.first * row, (u + n - 1) * g.first * row + g.rows * row);
      for (int64_t i = 0; i < g.rows; ++i)
        run(work, (u + i * g.stride) * row, (u + n + i * g.stride) * row);
    };
    if (fused) {
      const int64_t bytes = piece_bytes * row;
      const int64_t together = g.stride > 1 && bytes < 4096 ? (4096 + bytes - 1) / bytes : 1;
      const int64_t blocks = (units + together - 1) / together;
      const int64_t grain = grain_for(bytes * g.rows * streams * together);
      const int64_t unit = g.rows * w.middle * together;
      late.ahead = ahead_of(g.stride > 1 ? together * w.middle : unit, unit, streams - 1);
      parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t u = block * together, n = units - u < together ? units - u : together;
          for (int64_t i = 0; i < n; ++i) before(u + i);
          rows_of(kernel, early, u, n);
          for (int64_t i = 0; i < n; ++i) finish(u + i);
          if (writes) rows_of(after, late, u, n);
        }
        if (late.streaming) passes.fence();
      });
      return;
    }
    const int64_t grain = grain_for(piece_bytes * streams);
    for (int64_t unit = 0; unit < units; ++unit) before(unit);
    parallel_for(0, items, grain, [&](int64_t b, int64_t e) { kernel(early, b, e); });
    for (int64_t unit = 0; unit < units; ++unit) finish(unit);
    if (!writes) return;
    parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
      after(late, begin, end);
      if (late.streaming) passes.fence();
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor& x, OptTensor weight, OptTensor bias,
                                              OptTensor residual, int64_t groups, bool batch,
                                              bool last, double eps, double correction,
                                              int64_t activation) {
  GroupCall call(x, weight, bias, residual, groups, batch, last, eps, correction, activation);
  Tensor y = call.new_data(true), mean = call.per_group(batch), var = call.per_group(batch);
  call.g.mean = mean.mutable_data_ptr();
  call.g.var = var.mutable_data_ptr();
  call.coefficients_at(call.new_stats(), call.new_stats(), call.new_stats());
  call.g.one = call.g.center;  // the moments of each (a, k), until its coefficients are known
  call.g.other = call.g.scale;
  const bool wide = call.dtype == kFloat64;
  const auto statistics = call.table.statistics[wide], finish = call.table.coefficients[wide];
  call.run_both(
      call.passes.moments[call.dtype], true, call.passes.affine[call.dtype], y.mutable_data_ptr(),
      nullptr, 2, [](int64_t) {},
      [&](int64_t unit) {
        statistics(call.g, unit);
        finish(call.g, unit);
      });
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_backward(
    const Tensor& dy, const Tensor& x, OptTensor weight, OptTensor bias, OptTensor residual,
    const Tensor& mean, const Tensor& var, int64_t groups, bool batch, bool last, double eps,
    double correction, int64_t activation, bool need_x, bool need_residual, bool need_affine) {
  GroupCall call(x, weight, bias, residual, groups, batch, last, eps, correction, activation);
  STD_TORCH_CHECK(mean.numel() == call.group_total && var.numel() == call.group_total,
                  "solera: mean and var must be one a group");
  call.w.dy = call.data(dy);
  call.g.mean = const_cast<void*>(call.number(mean));
  call.g.var = const_cast<void*>(call.number(var));
  call.coefficients_at(call.new_stats(), call.new_stats(), call.new_stats());
  call.w.p = call.g.p = call.scratch(call.new_stats());
  call.w.q = call.g.q = call.scratch(call.new_stats());
  Tensor dweight_each = call.new_stats(), dbias_each = call.new_stats();
  call.g.one = dbias_each.mutable_data_ptr();
  call.g.other = dweight_each.mutable_data_ptr();
  Tensor dx = call.new_data(need_x), dresidual = call.new_data(need_residual);
  const bool wide = call.dtype == kFloat64;
  const auto prepare = call.table.coefficients[wide], finish = call.table.cotangents[wide];
  call.run_both(
      call.passes.reduce[call.dtype], false, call.passes.gradient[call.dtype],
      need_x ? dx.mutable_data_ptr() : nullptr,
      need_residual ? dresidual.mutable_data_ptr() : nullptr, 3,
      [&](int64_t unit) { prepare(call.g, unit); }, [&](int64_t unit) { finish(call.g, unit); });
  const int64_t zero[] = {0}, one[] = {call.channels}, all[] = {call.samples, call.channels};
  const int64_t rows = call.outer * call.w.inner / call.channels;
  const auto over_samples = call.table.over_samples[wide];
  const auto gathered = [&](const Tensor& each, const OptTensor& parameter) {
    if (!need_affine || !parameter.has_value()) return empty_like(x, Sizes(zero, 1), call.acc);
    const bool per_sample = parameter->dim() == 2;
    Tensor sum = empty_like(x, per_sample ? Sizes(all, 2) : Sizes(one, 1), call.acc);
    if (per_sample)
      std::memcpy(sum.mutable_data_ptr(), each.const_data_ptr(),
                  each.numel() * each.element_size());
    else
      over_samples(each.const_data_ptr(), sum.mutable_data_ptr(), rows, call.channels);
    return sum;
  };
  return {dx, dresidual, gathered(dweight_each, weight), gathered(dbias_each, bias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&group_norm));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
