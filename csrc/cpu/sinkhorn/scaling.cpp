// Column and row log-sum-exps of a tall matrix, alternately: the loop, its memory and its threads.
// What a pass computes is in scaling_passes.h.
//
// `steps` iterations on n x k read n k logits a step, once more for a start from the columns and
// once for the assignment: (steps + 2) n k reads and exponentials, n k elements written.
#include "scaling_skinny.h"

namespace solera {

struct ScalingTable {
  void (*column_parts)(const ScalingProblem&, void*, int64_t, int64_t);
  double (*first_maximum)(const ScalingProblem&);
  void (*near_start)(const ScalingProblem&, void*, int64_t, int64_t);
  // With a maximum a row, and where exponents are known to be in range.
  void (*row_pass[2])(const ScalingProblem&, void*, int64_t, int64_t);
  void (*assign[2])(const ScalingProblem&, void*, void*, int64_t, int64_t);
  void (*to_planes)(const ScalingProblem&, const void*, void*, int64_t, int64_t);
  void (*skinny_column_parts)(const ScalingProblem&, void*, int64_t, int64_t);
  void (*skinny_row_pass)(const ScalingProblem&, void*, int64_t, int64_t);
  void (*skinny_assign)(const ScalingProblem&, void*, void*, int64_t, int64_t);
  void (*merge_columns)(const ScalingProblem&, void*);
  int64_t (*add_columns)(const ScalingProblem&, void*);
  void (*backward_rows)(const void*, const void*, const void*, const void*, void*, int64_t, int64_t,
                        int64_t);
  int64_t lanes;
};
struct ScalingTables {
  ScalingTable of[4];
};

namespace SOLERA_ISA {
namespace {

template <class T, class A = typename Acc<T>::type>
constexpr ScalingTable scaling_table_of() {
  return {column_parts<T>,
          first_maximum<T>,
          near_start<T>,
          {row_pass<T, false>, row_pass<T, true>},
          {assign<T, false>, assign<T, true>},
          to_planes<T>,
          skinny_column_parts<A>,
          skinny_row_pass<A>,
          skinny_assign<T>,
          merge_columns<A>,
          add_columns<A>,
          backward_rows<T>,
          kLanes<T>};
}

}  // namespace

extern const ScalingTables scaling_tables;
const ScalingTables scaling_tables = {{scaling_table_of<float>(), scaling_table_of<double>(),
                                       scaling_table_of<bf16>(), scaling_table_of<f16>()}};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <algorithm>
#include <cmath>

#include "../parallel.h"

namespace solera {

SOLERA_PICK(ScalingTables, scaling_tables)

namespace {

// Runs body(worker, first, last) over [0, count) in `workers` equal shares.
template <class F>
void in_shares(int64_t workers, int64_t count, const F& body) {
  if (workers <= 1) {
    if (count > 0) body(0, int64_t(0), count);
    return;
  }
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      const int64_t first = count * w / workers, last = count * (w + 1) / workers;
      if (first < last) body(w, first, last);
    }
  });
}

// Whole vectors of rows, a matter of the shape alone; at most 256 blocks.
int64_t scaling_block_rows(int64_t n) {
  const int64_t even = (n + 255) / 256;
  return even <= 64 ? 64 : (even + 15) / 16 * 16;
}

template <class A>
struct Scaling {
  const ScalingTable& table;
  int64_t n, k, workers;
  bool skinny;
  Tensor memory;
  ScalingProblem p{};
  A *g, *sums, *again, *planes, *extremes;
  double low, high;  // of scale x, NaN where it is not known
  char* scratch;
  int64_t scratch_bytes, element;

  Scaling(const ScalingTable& table, const Tensor& like, int64_t n, int64_t k, double scale,
          int64_t workers)
      : table(table), n(n), k(k), workers(workers), skinny(k < kScalingSkinny) {
    p.n = n;
    p.k = k;
    p.stride = (k + table.lanes - 1) / table.lanes * table.lanes;
    p.rows = (n + table.lanes - 1) / table.lanes * table.lanes;
    p.block_rows = scaling_block_rows(n);
    p.blocks = (n + p.block_rows - 1) / p.block_rows;
    p.scale = scale;
    element = like.element_size();
    scratch_bytes = kScalingRows * p.stride * int64_t(sizeof(A));
    const int64_t counts[] = {n,
                              p.stride,
                              p.stride,
                              p.stride,
                              p.blocks * p.stride,
                              p.blocks * p.stride,
                              skinny ? k * p.rows : 0,
                              workers * kScalingRows * p.stride,
                              2 * p.blocks};
    int64_t total = 0;
    for (int64_t c : counts) total += (c + 15) / 16 * 16;
    memory = empty_like(like, {total + 1}, accumulate_type(like));
    A* at = static_cast<A*>(memory.mutable_data_ptr());
    A* starts[9];
    for (int i = 0; i < 9; ++i) {
      starts[i] = at;
      at += (counts[i] + 15) / 16 * 16;
    }
    p.f = starts[0];
    p.g = g = starts[1];
    sums = starts[2];
    again = starts[3];
    p.top = starts[4];
    p.sum = starts[5];
    planes = starts[6];
    scratch = reinterpret_cast<char*>(starts[7]);
    p.extremes = extremes = starts[8];
  }

  template <class Pass>
  void over_blocks(const Pass& pass) {
    in_shares(workers, p.blocks, [&](int64_t worker, int64_t first, int64_t last) {
      pass(scratch + worker * scratch_bytes, first, last);
    });
  }
  void take(const void* logits, const A* weight) {
    p.weight = weight;
    p.total = 0;
    for (int64_t i = 0; i < n; ++i) p.total += double(weight[i]);
    p.x = logits;
    p.near = false;
    low = high = NAN;
    if (!skinny) return;
    p.x = planes;
    over_blocks([&](void*, int64_t first, int64_t last) {
      const int64_t end = last * p.block_rows < n ? last * p.block_rows : p.rows;
      table.to_planes(p, logits, planes, first * p.block_rows, end);
    });
  }
  void put_g(const A* from) {
    for (int64_t j = 0; j < p.stride; ++j)
      g[j] = from && j < k ? from[j] : A(j < k ? 0 : -INFINITY);
  }
  void columns(A* out) {
    const auto pass = skinny ? table.skinny_column_parts : table.column_parts;
    over_blocks([&](void* s, int64_t first, int64_t last) { pass(p, s, first, last); });
    table.merge_columns(p, out);
  }
  // The first column sums (F = 0): in one pass, if the exponents relative to the first row's
  // maximum turn out to be in range.
  void first_columns() {
    p.shift = skinny ? NAN : table.first_maximum(p);
    if (std::isfinite(p.shift)) {
      over_blocks(
          [&](void* s, int64_t first, int64_t last) { table.near_start(p, s, first, last); });
      low = high = 0;
      for (int64_t b = 0; b < p.blocks; ++b) {
        if (!(extremes[2 * b] >= low)) low = extremes[2 * b];
        high = std::max(high, double(extremes[2 * b + 1]));
      }
      if (low >= -kScalingReach && high <= kScalingReach) {
        low += p.shift;
        high += p.shift;
        return table.merge_columns(p, sums);
      }
      low = high = NAN;
    }
    for (int64_t i = 0; i < n; ++i) static_cast<A*>(p.f)[i] = 0;
    columns(sums);
  }
  void rows() {
    const auto pass = skinny ? table.skinny_row_pass : table.row_pass[p.near];
    over_blocks([&](void* s, int64_t first, int64_t last) { pass(p, s, first, last); });
    if (table.add_columns(p, sums) == 0) return;
    columns(again);
    for (int64_t j = 0; j < k; ++j)
      if (std::isnan(sums[j])) sums[j] = again[j];
  }
  void update(const A* log_target) {
    for (int64_t j = 0; j < k; ++j) {
      // A column without mass to come, or in which nothing is allowed.
      if (log_target[j] == -INFINITY)
        g[j] = -INFINITY;
      else
        g[j] = sums[j] == -INFINITY ? A(0) : log_target[j] - sums[j];
    }
    const auto range = std::minmax_element(g, g + k);
    const double least = *range.first, most = *range.second;
    p.near = high - low + most - least <= 2 * kScalingReach;  // false for NaN
    // Centred: a constant in G is a constant in F, and in neither product.
    const A centre = p.near ? A((high + low + most + least) / 2) : A(0);
    for (int64_t j = 0; j < k; ++j) g[j] -= centre;
    for (int64_t j = k; j < p.stride; ++j) g[j] = p.near ? A(kScalingPad) : A(-INFINITY);
  }
  double error(const A* log_target) const {
    double total = 0;
    for (int64_t j = 0; j < k; ++j)
      total +=
          std::fabs(std::exp2(double(sums[j]) + double(g[j])) - std::exp2(double(log_target[j])));
    return total;
  }

  void assign(void* to) {
    over_blocks([&](void* s, int64_t first, int64_t last) {
      if (skinny)
        table.skinny_assign(p, to, s, first, last);
      else
        table.assign[p.near](p, to, s, first * p.block_rows, std::min(n, last * p.block_rows));
    });
  }

  int64_t solve(const A* log_target, const A* start, int64_t steps, double tolerance) {
    put_g(start);
    if (start == nullptr) {
      first_columns();
      update(log_target);
    }
    int64_t step = 0;
    while (step < steps) {
      rows();
      ++step;
      if (tolerance > 0 && error(log_target) <= tolerance) break;
      update(log_target);
    }
    return step;
  }
};

// Calls body(item, solver's workers) for every item: threads inside an item if it is large and the
// batch is small, else items side by side. Neither changes a bit.
template <class A, class F>
void over_items(const ScalingTable& table, const Tensor& like, double scale, const F& body) {
  const int64_t batch = like.size(0), n = like.size(1), k = like.size(2);
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  if (n * k >= 65536 && batch < 2 * threads) {
    Scaling<A> s(table, like, n, k, scale, threads);
    for (int64_t item = 0; item < batch; ++item) body(s, item);
    return;
  }
  parallel_for(0, batch, grain_for(n * k * 16), [&](int64_t begin, int64_t end) {
    Scaling<A> s(table, like, n, k, scale, 1);
    for (int64_t item = begin; item < end; ++item) body(s, item);
  });
}

template <class F>
void in_accumulation_type(const Tensor& x, const F& run) {
  if (dtype_of(x) == kFloat64)
    run(double(0));
  else
    run(float(0));
}

const char* item_of(const Tensor& x, int64_t item) {
  const int64_t size = x.size(1) * x.size(2) * int64_t(x.element_size());
  return static_cast<const char*>(x.const_data_ptr()) + item * size;
}

std::tuple<Tensor, Tensor, Tensor> scaling_solve(const Tensor& logits_in, const Tensor& weight_in,
                                                 const Tensor& target_in, OptTensor g_in,
                                                 double scale, int64_t steps, double tolerance) {
  const Tensor logits = dense(logits_in), weight = dense(weight_in), target = dense(target_in);
  const int64_t batch = logits.size(0), n = logits.size(1), k = logits.size(2);
  const ScalingTable& table = pick_scaling_tables().of[dtype_of(logits)];
  Tensor start;
  if (g_in.has_value()) start = dense(*g_in);
  Tensor g = empty_like(weight, {batch, k}), sums = empty_like(weight, {batch, k});
  Tensor done = empty_like(weight, {batch}, ScalarType::Long);
  in_accumulation_type(logits, [&](auto zero) {
    using A = decltype(zero);
    over_items<A>(table, logits, scale, [&](Scaling<A>& s, int64_t item) {
      const auto row = [&](const Tensor& t, int64_t width) {
        return static_cast<const A*>(t.const_data_ptr()) + item * width;
      };
      s.take(item_of(logits, item), row(weight, n));
      static_cast<int64_t*>(done.mutable_data_ptr())[item] =
          s.solve(row(target, k), g_in.has_value() ? row(start, k) : nullptr, steps, tolerance);
      std::memcpy(static_cast<A*>(g.mutable_data_ptr()) + item * k, s.g, size_t(k) * sizeof(A));
      std::memcpy(static_cast<A*>(sums.mutable_data_ptr()) + item * k, s.sums,
                  size_t(k) * sizeof(A));
    });
  });
  return {g, sums, done};
}

Tensor scaling_assign(const Tensor& logits_in, const Tensor& weight_in, const Tensor& g_in,
                      double scale) {
  const Tensor logits = dense(logits_in), weight = dense(weight_in), g = dense(g_in);
  const int64_t n = logits.size(1), k = logits.size(2);
  const ScalingTable& table = pick_scaling_tables().of[dtype_of(logits)];
  Tensor out = empty_like(logits, logits.sizes());
  in_accumulation_type(logits, [&](auto zero) {
    using A = decltype(zero);
    over_items<A>(table, logits, scale, [&](Scaling<A>& s, int64_t item) {
      s.take(item_of(logits, item), static_cast<const A*>(weight.const_data_ptr()) + item * n);
      s.put_g(static_cast<const A*>(g.const_data_ptr()) + item * k);
      char* to = static_cast<char*>(out.mutable_data_ptr()) + item * n * k * s.element;
      s.assign(to);
    });
  });
  return out;
}

Tensor scaling_balance(const Tensor& logits_in, const Tensor& weight_in, const Tensor& target_in,
                       double scale, int64_t iterations) {
  const Tensor logits = dense(logits_in), weight = dense(weight_in), target = dense(target_in);
  const int64_t n = logits.size(1), k = logits.size(2);
  const ScalingTable& table = pick_scaling_tables().of[dtype_of(logits)];
  Tensor out = empty_like(logits, logits.sizes());
  in_accumulation_type(logits, [&](auto zero) {
    using A = decltype(zero);
    over_items<A>(table, logits, scale, [&](Scaling<A>& s, int64_t item) {
      s.take(item_of(logits, item), static_cast<const A*>(weight.const_data_ptr()) + item * n);
      s.solve(static_cast<const A*>(target.const_data_ptr()) + item * k, nullptr, iterations - 1,
              0.0);
      s.assign(static_cast<char*>(out.mutable_data_ptr()) + item * n * k * s.element);
    });
  });
  return out;
}

Tensor scaling_backward(OptTensor grad_in, const Tensor& q_in, const Tensor& y_in,
                        const Tensor& weight_in) {
  const Tensor q = dense(q_in), y = dense(y_in), weight = dense(weight_in);
  Tensor grad;
  if (grad_in.has_value()) grad = dense(*grad_in);
  const int64_t batch = q.size(0), n = q.size(1), k = q.size(2);
  Tensor out = empty_like(q, q.sizes());
  const auto kernel = pick_scaling_tables().of[dtype_of(q)].backward_rows;
  const int64_t size = q.element_size(), wide = weight.element_size();
  const auto from = [](const Tensor& t, int64_t bytes) {
    return static_cast<const char*>(t.const_data_ptr()) + bytes;
  };
  parallel_for(0, batch * n, grain_for(k * size), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t item = begin / n, stop = std::min(end, (item + 1) * n), at = item * n;
      kernel(from(q, at * k * size), grad_in.has_value() ? from(grad, at * k * size) : nullptr,
             from(y, item * k * wide), from(weight, at * wide),
             static_cast<char*>(out.mutable_data_ptr()) + at * k * size, k, begin - at, stop - at);
      begin = stop;
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("scaling_solve", TORCH_BOX(&scaling_solve));
  m.impl("scaling_balance", TORCH_BOX(&scaling_balance));
  m.impl("scaling_assign", TORCH_BOX(&scaling_assign));
  m.impl("scaling_backward", TORCH_BOX(&scaling_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
