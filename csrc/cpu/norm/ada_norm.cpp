// Layer and RMS normalisation of x + gate * branch with modulation, forward and backward.
//
//   h = x + gate * branch            (rounded to the dtype of x, as the unfused sum is)
//   n = (h - mean) * rstd            y = n * W + C
//   W = weight * (1 + scale)         C = bias * (1 + scale) + shift
//
// W, C and the gate are made once a sample, in rows that stay in L1: the loops over rows are those
// of a plain norm whatever the parameters' forms and dtypes are.
//
// Backward, with g = dy * W and delta = rstd * (g - n * mean(g * n) - [mean(g) if centred]) + dh:
//   dx = delta     dbranch = gate * delta
//   P = sum dy * n     Q = sum dy     E = sum delta * branch       over the rows of a sample
// and the gradients of the parameters from P, Q and E (see ada_norm_finish).
//
// Bytes a row of D elements: forward reads x and branch, writes h and y; backward reads dy, dh, h
// and branch, writes dx and dbranch. P, Q and E are summed over chunks of 64 rows of one sample (or
// over whole samples of less), whatever the thread count, then in order in double.
#include "ada_parameters.h"

namespace solera {

struct AdaForward {
  const void *x, *branch;  // branch may be null
  void *y, *h;             // h is written only when there is a branch
  void *mean, *rstd;       // in A; mean only if centred
  void* scratch;           // three rows of A, one of T
  AdaParameters parameter;
  int64_t tokens, columns;
  double eps;
  bool centred, streaming;
};
struct AdaBackward {
  const void *dy, *dh, *h, *branch;  // dh and branch may be null
  const void *mean, *rstd;
  void *dx, *dbranch, *dgate, *dscale;  // dgate and dscale here only where they are per token
  void *P, *Q, *E;                      // in A, one row a part; may be null
  AdaParameters parameter;
  int64_t samples, tokens, columns, parts, together;  // parts a sample; samples a chunk
  bool need_delta, centred, streaming;
};
constexpr int64_t kAdaChunkRows = 64;

struct AdaNormTable {
  void (*forward[4])(const AdaForward&, int64_t begin, int64_t end);
  void (*backward[4])(const AdaBackward&, void* scratch, int64_t chunk);
  void (*finish[4])(const AdaFinish&, int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

template <class T>
void ada_forward(const AdaForward& p, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int64_t D = p.columns;
  const AdaParameters& q = p.parameter;
  const A<T> inverse = A<T>(1) / A<T>(D);
  const int64_t padded = ada_padded(D);
  A<T>*W = (A<T>*)p.scratch, *C = W + padded, *G = C + padded;
  T* row_buffer = (T*)(G + padded);
  const bool affine = q.weight.data || q.bias.data || q.scale.data || q.shift.data;
  const bool every_token = q.scale.token_step || q.shift.token_step || q.gate.token_step;
  int64_t ready = -1;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / p.tokens, token = row - sample * p.tokens;
    if (every_token || sample != ready) {
      if (affine) ada_affine<T>(q, sample, token, D, W, C);
      if (p.branch) ada_copy<T>(AdaRow<T>(q.gate, sample, token), D, 0, 1, G);
      ready = sample;
    }
    const T* x = (const T*)p.x + row * D;
    T* y = (T*)p.y + row * D;
    if (p.branch) {
      const T* branch = (const T*)p.branch + row * D;
      T* h = (T*)p.h + row * D;
      T* held = p.streaming && can_stream(h) ? row_buffer : h;
      strips<L>(D, [&](int64_t j, int n) {
        __builtin_prefetch(x + D + j);
        __builtin_prefetch(branch + D + j);
        const AccVec<T> sum = get(x + j, n) + get(G + j, n) * get(branch + j, n);
        put(held + j, sum, n);
        if (held != h) put(h + j, sum, n, true);
      });
      x = held;
    }
    A<T> mean = 0;
    if (p.centred) mean = row_sum<T>(D, [&](int64_t j, int n) { return get(x + j, n); }) * inverse;
    const T* next = (const T*)p.x + (row + 1) * D;
    const A<T> square = row_sum<T>(D, [&](int64_t j, int n) {
      if (!p.branch) __builtin_prefetch(next + j);
      const AccVec<T> d = keep<T>(get(x + j, n) - mean, n);
      return d * d;
    });
    const A<T> rstd = A<T>(1) / square_root(square * inverse + A<T>(p.eps));
    const bool streaming = p.streaming && can_stream(y);
    with_flag(affine, [&](auto has_affine) {
      strips<L>(D, [&](int64_t j, int n) {
        AccVec<T> v = (get(x + j, n) - mean) * rstd;
        if (has_affine.value) v = v * get(W + j, n) + get(C + j, n);
        put(y + j, v, n, streaming);
      });
    });
    if (p.centred) ((A<T>*)p.mean)[row] = mean;
    ((A<T>*)p.rstd)[row] = rstd;
  }
  if (p.streaming) stream_fence();
}

// One row: its two sums as it streams in, then everything else from L1.
template <class T, bool kDelta, bool kCentred, bool kBranch>
SOLERA_INLINE void ada_backward_row(const AdaBackward& p, const AdaScratch<T>& s, int64_t row,
                                    A<T>* P, A<T>* Q, A<T>* E) {
  constexpr int L = kLanes<T>;
  const int64_t D = p.columns;
  const A<T> inverse = A<T>(1) / A<T>(D);
  const T* dy = (const T*)p.dy + row * D;
  const T* h = (const T*)p.h + row * D;
  const T* dh = p.dh ? (const T*)p.dh + row * D : nullptr;
  const T* branch = kBranch && p.branch ? (const T*)p.branch + row * D : nullptr;
  T* dx = p.dx ? (T*)p.dx + row * D : nullptr;
  T* dbranch = kBranch && p.dbranch ? (T*)p.dbranch + row * D : nullptr;
  const A<T> mean = kCentred ? ((const A<T>*)p.mean)[row] : A<T>(0);
  const A<T> rstd = ((const A<T>*)p.rstd)[row];
  const bool streaming = p.streaming && can_stream(dx) && can_stream(dbranch);
  A<T> mean_g = 0, mean_gn = 0;
  if (kDelta) {
    AccVec<T> g0{}, g1{}, n0{}, n1{};
    auto add = [&](int64_t j, int n, AccVec<T>& sum_g, AccVec<T>& sum_gn) {
      const AccVec<T> g = rounded(get(dy + j, n) * get(s.W + j, n));
      if (kCentred) sum_g += g;
      sum_gn += g * (get(h + j, n) - mean);
    };
    int64_t j = 0;
    for (; j + 2 * L <= D; j += 2 * L) {
      __builtin_prefetch(dy + D + j);
      __builtin_prefetch(h + D + j);
      add(j, L, g0, n0);
      add(j + L, L, g1, n1);
    }
    strips<L>(D - j, [&](int64_t k, int n) { add(j + k, n, g0, n0); });
    mean_g = lane_sum(g0 + g1) * inverse;
    mean_gn = lane_sum(n0 + n1) * rstd * inverse;
  }
  const bool token_scale = p.parameter.scale.dim == 3;
  const bool token_gate = p.parameter.gate.dim == 3;
  strips<L>(D, [&](int64_t j, int n) {
    const AccVec<T> dy_j = get(dy + j, n);
    const AccVec<T> normal = (get(h + j, n) - mean) * rstd;
    AccVec<T> summed = dy_j;
    if (token_scale) {
      summed *= get(s.S + j, n);
      if (p.dscale)
        ada_put_gradient<T>(p.dscale, p.parameter.scale.wide, row * D + j,
                            dy_j * (normal * get(s.w + j, n) + get(s.b + j, n)), n);
    }
    if (P) put(P + j, get(P + j, n) + summed * normal, n);
    if (Q) put(Q + j, get(Q + j, n) + summed, n);
    if (kDelta) {
      AccVec<T> delta = rounded(dy_j * get(s.W + j, n));
      if (kCentred) delta -= mean_g;
      delta = (delta - normal * mean_gn) * rstd;
      if (dh) delta += get(dh + j, n);
      if (dx) put(dx + j, delta, n, streaming);
      if (kBranch) {
        if (dbranch) put(dbranch + j, delta * get(s.G + j, n), n, streaming);
        if (branch) {
          const AccVec<T> e = delta * get(branch + j, n);
          if (token_gate)
            ada_put_gradient<T>(p.dgate, p.parameter.gate.wide, row * D + j, e, n);
          else
            put(E + j, get(E + j, n) + e, n);
        }
      }
    }
  });
}

template <class T, bool kDelta, bool kCentred, bool kBranch>
void ada_backward_chunk(const AdaBackward& p, void* scratch, int64_t chunk) {
  const int64_t D = p.columns, part = chunk % p.parts;
  const AdaParameters& q = p.parameter;
  const AdaScratch<T> s(scratch, ada_padded(D));
  const int64_t first = chunk / p.parts * p.together;
  const int64_t last = first + p.together < p.samples ? first + p.together : p.samples;
  const int64_t begin = p.parts == 1 ? 0 : part * kAdaChunkRows;
  int64_t end = p.parts == 1 ? p.tokens : begin + kAdaChunkRows;
  if (end > p.tokens) end = p.tokens;
  const bool token_scale = q.scale.dim == 3, every_token = token_scale || q.gate.dim == 3;
  for (int64_t sample = first; sample < last; ++sample) {
    const int64_t at = (sample * p.parts + part) * D;
    A<T>* const sums[3] = {p.P ? (A<T>*)p.P + at : nullptr, p.Q ? (A<T>*)p.Q + at : nullptr,
                           p.E ? (A<T>*)p.E + at : nullptr};
    for (A<T>* sum : sums)
      if (sum) memset((void*)sum, 0, size_t(D) * sizeof(A<T>));
    for (int64_t token = begin; token < end; ++token) {
      if (token == begin || every_token) {
        ada_affine<T>(q, sample, token, D, s.W, nullptr);
        if (kBranch) ada_copy<T>(AdaRow<T>(q.gate, sample, token), D, 0, 1, s.G);
        if (token_scale) {
          ada_copy<T>(AdaRow<T>(q.scale, sample, token), D, 1, 1, s.S);
          ada_copy<T>(AdaRow<T>(q.weight, sample, token), D, 0, 1, s.w);
          ada_copy<T>(AdaRow<T>(q.bias, sample, token), D, 0, 0, s.b);
        }
      }
      ada_backward_row<T, kDelta, kCentred, kBranch>(p, s, sample * p.tokens + token, sums[0],
                                                     sums[1], sums[2]);
    }
  }
  if (p.streaming) stream_fence();
}

template <class T>
void ada_backward(const AdaBackward& p, void* scratch, int64_t chunk) {
  with_flag(p.need_delta, [&](auto delta) {
    with_flag(delta.value && (p.dbranch || p.branch), [&](auto branch) {
      with_flag(p.centred, [&](auto centred) {
        constexpr bool kDelta = decltype(delta)::value, kBranch = decltype(branch)::value;
        ada_backward_chunk<T, kDelta, decltype(centred)::value, kDelta && kBranch>(p, scratch,
                                                                                   chunk);
      });
    });
  });
}

}  // namespace

extern const AdaNormTable ada_norm_table;
const AdaNormTable ada_norm_table = {
    {ada_forward<float>, ada_forward<double>, ada_forward<bf16>, ada_forward<f16>},
    {ada_backward<float>, ada_backward<double>, ada_backward<bf16>, ada_backward<f16>},
    {ada_norm_finish<float>, ada_norm_finish<double>, ada_norm_finish<bf16>, ada_norm_finish<f16>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <cmath>

#include "../parallel.h"

namespace solera {

SOLERA_PICK(AdaNormTable, ada_norm_table)

namespace {

// Rows of the accumulator's type that start on a cache line, so that no load crosses two.
struct AdaMemory {
  std::unique_ptr<double[]> owner;
  void* data;
  explicit AdaMemory(int64_t elements) : owner(new double[elements + 8]) {
    data = (void*)((uintptr_t(owner.get()) + 63) / 64 * 64);
  }
};

// x as samples of tokens of columns.
struct AdaShape {
  Sizes sizes;
  Dtype dtype;
  ScalarType acc;
  int64_t samples, tokens = 1, columns, row_bytes;
  bool streaming;
  explicit AdaShape(const Tensor& x) : sizes(x.sizes()), dtype(dtype_of(x)) {
    STD_TORCH_CHECK(sizes.size() == 2 || sizes.size() == 3, "solera: x needs 2 or 3 dimensions");
    acc = accumulate_type(x);
    samples = sizes[0];
    if (sizes.size() == 3) tokens = sizes[1];
    columns = sizes[sizes.size() - 1];
    row_bytes = columns * int64_t(x.element_size());
    constexpr int64_t kStreamBytes = int64_t(16) << 20;  // past the caches beside the inputs
    streaming = rows() * row_bytes >= kStreamBytes;
  }
  int64_t rows() const { return samples * tokens; }
};

// A parameter's rows, read in place if its last dimension has no gaps and its dtype is one of two.
struct AdaOperand {
  AdaRows rows;
  std::optional<Tensor> kept;
  AdaOperand(const OptTensor& t, const AdaShape& x, const OptTensor& index = std::nullopt) {
    if (!t.has_value()) return;
    const int64_t dim = t->dim(), D = x.columns;
    const bool table = index.has_value();
    STD_TORCH_CHECK(dim >= 1 && dim <= 3 && t->size(dim - 1) == D &&
                        (dtype_of(*t) != kFloat64 || x.acc == ScalarType::Double) &&
                        (dim < 2 || table || t->size(0) == x.samples) &&
                        (dim < 3 || t->size(1) == x.tokens) && (!table || dim == 2),
                    "solera: a parameter does not fit x");
    const ScalarType dtype = t->scalar_type();
    kept = *t;
    if (dtype != x.acc && dtype_of(*t) != x.dtype) kept = torch::stable::to(*kept, x.acc);
    if (D > 1 && kept->stride(dim - 1) != 1) kept = torch::stable::contiguous(*kept);
    rows.data = kept->const_data_ptr();
    rows.wide = kept->scalar_type() == x.acc;
    rows.dim = int(dim);
    if (dim > 1) rows.sample_step = kept->stride(0);
    if (dim > 2) rows.token_step = kept->stride(1);
    if (table) rows.index = static_cast<const int64_t*>(index->const_data_ptr());
  }
};

OptTensor ada_index(const OptTensor& index, const OptTensor& weight, const AdaShape& x) {
  if (!index.has_value()) return std::nullopt;
  STD_TORCH_CHECK(weight.has_value() && index->dim() == 1 && index->size(0) == x.samples &&
                      index->scalar_type() == ScalarType::Long,
                  "solera: an index does not fit x");
  const Tensor out = dense(*index);
  const auto* data = static_cast<const int64_t*>(out.const_data_ptr());
  for (int64_t i = 0; i < x.samples; ++i)
    STD_TORCH_CHECK(data[i] >= 0 && data[i] < weight->size(0), "solera: index ", data[i],
                    " is outside the ", weight->size(0), " sets");
  return out;
}

void* pointer(bool need, const Tensor& t) { return need ? t.mutable_data_ptr() : nullptr; }

// Parameters of one row each need no samples: all rows are one.
void ada_merge(const AdaParameters& p, AdaShape& x) {
  if (p.gate.dim < 2 && p.scale.dim < 2 && p.shift.dim < 2 && p.weight.dim < 2 && p.bias.dim < 2) {
    x.tokens *= x.samples;
    x.samples = 1;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ada_norm(const Tensor& x_in, OptTensor branch_in,
                                                    OptTensor gate_in, OptTensor scale_in,
                                                    OptTensor shift_in, OptTensor weight_in,
                                                    OptTensor bias_in, OptTensor index_in,
                                                    double eps, bool centred) {
  const Tensor x = dense(x_in);
  AdaShape shape(x);
  STD_TORCH_CHECK(eps >= 0 && eps < INFINITY, "solera: eps must be finite and not negative");
  const OptTensor index = ada_index(index_in, weight_in, shape);
  const AdaOperand gate(gate_in, shape), scale(scale_in, shape), shift(shift_in, shape);
  const AdaOperand weight(weight_in, shape, index), bias(bias_in, shape, index);
  const int64_t zero[] = {0};
  const Sizes none(zero, 1), leading(shape.sizes.data(), shape.sizes.size() - 1);
  const Tensor branch = branch_in.has_value() ? dense(*branch_in) : Tensor();
  Tensor y = empty_like(x, shape.sizes);
  Tensor h = empty_like(x, branch_in.has_value() ? shape.sizes : none);
  Tensor mean = empty_like(x, centred ? leading : none, shape.acc);
  Tensor rstd = empty_like(x, leading, shape.acc);
  AdaForward p{};
  p.x = x.const_data_ptr();
  p.branch = branch_in.has_value() ? branch.const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.h = h.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr();
  p.parameter = {gate.rows, scale.rows, shift.rows, weight.rows, bias.rows};
  ada_merge(p.parameter, shape);
  p.tokens = shape.tokens;
  p.columns = shape.columns;
  p.eps = eps;
  p.centred = centred;
  p.streaming = shape.streaming;
  const auto kernel = pick_ada_norm_table().forward[shape.dtype];
  if (shape.columns > 0)
    parallel_for(0, shape.rows(), grain_for(shape.row_bytes), [&](int64_t begin, int64_t end) {
      const AdaMemory scratch(4 * ada_padded(shape.columns));
      AdaForward mine = p;
      mine.scratch = scratch.data;
      kernel(mine, begin, end);
    });
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ada_norm_backward(
    const Tensor& dy_in, OptTensor dh_in, const Tensor& h_in, OptTensor branch_in,
    OptTensor gate_in, OptTensor scale_in, OptTensor weight_in, OptTensor bias_in,
    OptTensor index_in, const Tensor& mean, const Tensor& rstd, bool centred, int64_t shift_dim,
    std::vector<bool> needs) {
  const Tensor dy = dense(dy_in), h = dense(h_in);
  AdaShape shape(h);
  STD_TORCH_CHECK(needs.size() == 7 && shift_dim >= 0 && shift_dim <= 2, "solera: wrong needs");
  const bool need_branch = needs[1], need_gate = needs[2], need_scale = needs[3];
  const bool need_shift = needs[4], need_weight = needs[5], need_bias = needs[6];
  const OptTensor index = ada_index(index_in, weight_in, shape);
  const AdaOperand gate(gate_in, shape), scale(scale_in, shape);
  const AdaOperand weight(weight_in, shape, index), bias(bias_in, shape, index);
  STD_TORCH_CHECK((!need_gate || (branch_in.has_value() && gate_in.has_value())) &&
                      (!need_scale || scale_in.has_value()) &&
                      (!need_weight || weight_in.has_value()) &&
                      (!need_bias || bias_in.has_value()) && (!need_shift || shift_dim > 0) &&
                      (!need_shift || scale.rows.dim < 3),
                  "solera: a gradient of nothing was asked for");
  const Tensor dh = dh_in.has_value() ? dense(*dh_in) : Tensor();
  const Tensor branch = need_gate ? dense(*branch_in) : Tensor();
  const int64_t zero[] = {0}, each[] = {shape.samples, shape.columns};
  const Sizes none(zero, 1), one(each + 1, 1);
  const auto gradient = [&](bool need, int64_t dim, const AdaOperand* like) {
    if (!need) return empty_like(h, none, shape.acc);
    if (dim == 1) return empty_like(h, one, shape.acc);
    if (dim == 2) return empty_like(h, Sizes(each, 2), shape.acc);
    return empty_like(h, shape.sizes, like->kept->scalar_type());
  };
  Tensor dx = empty_like(h, needs[0] ? shape.sizes : none);
  Tensor dbranch = empty_like(h, need_branch ? shape.sizes : none);
  Tensor dgate = gradient(need_gate, gate.rows.dim, &gate);
  Tensor dscale = gradient(need_scale, scale.rows.dim, &scale);
  Tensor dshift = gradient(need_shift, shift_dim, nullptr);
  const auto table = [&](bool need, const OptTensor& t) {
    return need && index.has_value() ? empty_like(h, t->sizes(), shape.acc)
                                     : gradient(need, 1, nullptr);
  };
  Tensor dweight = table(need_weight, weight_in), dbias = table(need_bias, bias_in);

  AdaBackward p{};
  p.parameter = {gate.rows, scale.rows, AdaRows(), weight.rows, bias.rows};
  AdaParameters forms = p.parameter;
  forms.shift.dim = int(shift_dim);
  ada_merge(forms, shape);
  p.samples = shape.samples;
  p.tokens = shape.tokens;
  p.columns = shape.columns;
  p.parts = shape.tokens > kAdaChunkRows ? (shape.tokens + kAdaChunkRows - 1) / kAdaChunkRows : 1;
  p.together = p.parts > 1 || shape.tokens == 0 ? 1 : kAdaChunkRows / shape.tokens;
  const int64_t part_sizes[] = {shape.samples * p.parts, shape.columns};
  const bool token_scale = scale.rows.dim == 3, token_gate = gate.rows.dim == 3;
  const bool group_scale = need_scale && !token_scale;
  const auto sums = [&](bool need) {
    return empty_like(h, need ? Sizes(part_sizes, 2) : none, shape.acc);
  };
  const bool need_P = group_scale || need_weight;
  const bool need_Q = need_shift || need_bias || (group_scale && bias_in.has_value());
  const bool need_E = need_gate && !token_gate;
  Tensor P = sums(need_P), Q = sums(need_Q), E = sums(need_E);
  p.dy = dy.const_data_ptr();
  p.dh = dh_in.has_value() ? dh.const_data_ptr() : nullptr;
  p.h = h.const_data_ptr();
  p.branch = need_gate ? branch.const_data_ptr() : nullptr;
  p.mean = mean.const_data_ptr();
  p.rstd = rstd.const_data_ptr();
  p.dx = pointer(needs[0], dx);
  p.dbranch = pointer(need_branch, dbranch);
  p.dgate = pointer(need_gate && token_gate, dgate);
  p.dscale = pointer(need_scale && token_scale, dscale);
  p.P = pointer(need_P, P);
  p.Q = pointer(need_Q, Q);
  p.E = pointer(need_E, E);
  p.need_delta = needs[0] || need_branch || need_gate;
  p.centred = centred;
  p.streaming = shape.streaming;
  const auto& kernels = pick_ada_norm_table();
  const int64_t chunks = (shape.samples + p.together - 1) / p.together * p.parts;
  if (shape.columns == 0) return {dx, dbranch, dgate, dscale, dshift, dweight, dbias};
  parallel_for(0, chunks, grain_for(shape.row_bytes * p.together * (p.parts > 1 ? 64 : p.tokens)),
               [&](int64_t begin, int64_t end) {
                 const AdaMemory scratch(5 * ada_padded(shape.columns));
                 for (int64_t chunk = begin; chunk < end; ++chunk)
                   kernels.backward[shape.dtype](p, scratch.data, chunk);
               });

  AdaFinish f{};
  f.P = p.P;
  f.Q = p.Q;
  f.E = p.E;
  f.parameter = p.parameter;
  f.samples = shape.samples;
  f.parts = p.parts;
  f.columns = shape.columns;
  f.dgate = pointer(need_E, dgate);
  f.dscale = pointer(group_scale, dscale);
  f.dshift = pointer(need_shift, dshift);
  f.dweight = pointer(need_weight, dweight);
  f.dbias = pointer(need_bias, dbias);
  f.gate_dim = gate.rows.dim;
  f.scale_dim = scale.rows.dim;
  f.shift_dim = int(shift_dim);
  std::vector<double> weight_sets, bias_sets;
  if (index.has_value() && need_weight) weight_sets.resize(size_t(dweight.numel()));
  if (index.has_value() && need_bias) bias_sets.resize(size_t(dbias.numel()));
  f.weight_sets = weight_sets.empty() ? nullptr : weight_sets.data();
  f.bias_sets = bias_sets.empty() ? nullptr : bias_sets.data();
  if (need_P || need_Q || need_E)
    parallel_for(0, shape.columns, grain_for(shape.samples * p.parts * 8),
                 [&](int64_t begin, int64_t end) { kernels.finish[shape.dtype](f, begin, end); });
  const auto narrow = [&](const std::vector<double>& sets, Tensor& out) {
    for (size_t i = 0; i < sets.size(); ++i)
      if (shape.acc == ScalarType::Double)
        static_cast<double*>(out.mutable_data_ptr())[i] = sets[i];
      else
        static_cast<float*>(out.mutable_data_ptr())[i] = float(sets[i]);
  };
  narrow(weight_sets, dweight);
  narrow(bias_sets, dbias);
  return {dx, dbranch, dgate, dscale, dshift, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("ada_norm", TORCH_BOX(&ada_norm));
  m.impl("ada_norm_backward", TORCH_BOX(&ada_norm_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
