// RMS normalisation with a gate, forward and backward; a row of D elements is cut into groups of C.
//
//   a = act(gate)
//   norm first:  n = x * r, r = 1 / sqrt(mean(x^2) + eps), y = (n * w + b) * a
//   gate first:  n = u * r, u = x * a, r = 1 / sqrt(mean(u^2) + eps), y = n * w + b
//
// Backward, with h = (dy * a or dy) * w and dv = r * (h - n * mean(h * n)), means over the group:
//   norm first:  dx = dv,      dgate = dy * (n * w + b) * act'(gate),  dw = sum dy * a * n
//   gate first:  dx = dv * a,  dgate = dv * x * act'(gate),            dw = sum dy * n
//
// Bytes a row: forward reads x and gate, writes y; backward reads dy, x and gate, writes dx and
// dgate: 8 D elements both ways. The exponential of the activation is taken once each way: its
// value (and slope) stays in a row buffer in L1 between the passes. The gradients of weight and
// bias are summed over chunks of 64 rows, whatever the thread count, then over the chunks in order
// (in double).
#include "../activation.h"
#include "../exponential.h"
#include "../strips.h"

namespace solera {

// Rows of x, gate and dy may lie apart: their strides are in elements. Outputs are contiguous.
struct GatedNorm {
  const void *dy, *x, *gate;  // dy in backward only
  int64_t dy_step, x_step, gate_step;
  const void *weight, *bias, *rstd;  // in the accumulator type; weight is never null, bias may be
  void *y, *out_rstd;                // forward
  void *dx, *dgate;                  // backward; may be null
  void *dweight, *dbias;             // one row of D per chunk; may be null
  int64_t rows, columns, groups;     // columns of a group
  double eps;
  int activation;
  bool norm_first, streaming;
};
constexpr int64_t kGatedChunkRows = 64;

struct GatedNormTable {
  // scratch: forward D, backward 2 D elements of the accumulator type
  void (*forward[4])(const GatedNorm&, void* scratch, int64_t begin, int64_t end);
  void (*backward[4])(const GatedNorm&, void* scratch, int64_t first_chunk, int64_t last_chunk);
  void (*sum_chunks[2])(const void* partial, void* out, int64_t chunks, int64_t columns,
                        int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

template <class V>
SOLERA_INLINE V exact_sigmoid(V z) {
  return 1 / (1 + expv(-z));
}
// For half precision: a shorter exponential, and a reciprocal estimate with one Newton step where
// there is one of 14 bits. 2e-7 off; the exponent is held below where the step would meet infinity.
SOLERA_INLINE vf quick_sigmoid(vf z) {
  const vf e = 1 + fast_exp2(at_most(120.0f, z * -1.44269504088896341f));
#if defined(__AVX512F__)
  const vf estimate = (vf)_mm512_rcp14_ps((__m512)e);
  return estimate * (2 - e * estimate);
#else
  return 1 / e;
#endif
}
template <bool kHalf>
SOLERA_INLINE vf gate_sigmoid(vf z) {
  return kHalf ? quick_sigmoid(z) : exact_sigmoid(z);
}
template <bool kHalf>
SOLERA_INLINE vd gate_sigmoid(vd z) {
  return exact_sigmoid(z);
}

// act(z) and act'(z); the exponential, where there is one, is shared.
template <int kActivation, bool kHalf, class V>
SOLERA_INLINE void value_and_slope(V z, V& value, V& slope_of) {
  if (kActivation == kSilu) {
    const V sigmoid = gate_sigmoid<kHalf>(z);
    value = z * sigmoid;
    slope_of = sigmoid * (1 + z * (1 - sigmoid));
  } else if (kActivation == kSigmoid) {
    value = gate_sigmoid<kHalf>(z);
    slope_of = value * (1 - value);
  } else if (kActivation == kGelu) {
    V cdf, bell;
    normal_cdf(z, cdf, bell);
    const auto scale = decltype(z[0] + z[0])(0.39894228040143267794);
    value = z * cdf;
    slope_of = cdf + z * bell * scale;
  } else if (kActivation == kRelu) {
    value = z <= 0 ? V{} : z;
    slope_of = z <= 0 ? V{} : V{} + 1;
  } else {
    value = z;
    slope_of = V{} + 1;
  }
}

// a (and, in backward, s) of a row of gates; asks for the row `ahead` elements further on
// meanwhile.
template <class T, int kActivation, bool kSlope>
SOLERA_INLINE void gate_row_of(const T* gate, int64_t ahead, A<T>* a, A<T>* s, int64_t n) {
  strips<kLanes<T>>(n, [&](int64_t j, int count) {
    AccVec<T> value, slope_of;
    __builtin_prefetch(gate + ahead + j);
    value_and_slope<kActivation, sizeof(T) == 2>(get(gate + j, count), value, slope_of);
    put(a + j, value, count);
    if (kSlope) put(s + j, slope_of, count);
  });
}
template <class T, bool kSlope>
void gate_row(const T* gate, int64_t ahead, A<T>* a, A<T>* s, int64_t n, int activation) {
  switch (activation) {
    case kRelu:
      return gate_row_of<T, kRelu, kSlope>(gate, ahead, a, s, n);
    case kGelu:
      return gate_row_of<T, kGelu, kSlope>(gate, ahead, a, s, n);
    case kSilu:
      return gate_row_of<T, kSilu, kSlope>(gate, ahead, a, s, n);
    case kSigmoid:
      return gate_row_of<T, kSigmoid, kSlope>(gate, ahead, a, s, n);
    default:
      return gate_row_of<T, kNone, kSlope>(gate, ahead, a, s, n);
  }
}

template <class T>
void gated_forward(const GatedNorm& p, void* scratch, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int64_t C = p.columns, D = C * p.groups;
  const A<T> inverse = A<T>(1) / A<T>(C), eps = A<T>(p.eps);
  A<T>* a_row = (A<T>*)scratch;
  for (int64_t row = begin; row < end; ++row) {
    gate_row<T, false>((const T*)p.gate + row * p.gate_step, p.gate_step, a_row, nullptr, D,
                       p.activation);
    for (int64_t group = 0; group < p.groups; ++group) {
      const T* x = (const T*)p.x + row * p.x_step + group * C;
      T* y = (T*)p.y + row * D + group * C;
      A<T>* a = a_row + group * C;
      const A<T>* weight = (const A<T>*)p.weight + group * C;
      const A<T>* bias = p.bias ? (const A<T>*)p.bias + group * C : nullptr;
      const bool streaming = p.streaming && can_stream(y);
      A<T> square;
      if (p.norm_first) {
        square = row_sum<T>(C, [&](int64_t j, int n) {
          __builtin_prefetch(x + p.x_step + j);
          const AccVec<T> v = get(x + j, n);
          return v * v;
        });
      } else {
        square = row_sum<T>(C, [&](int64_t j, int n) {
          __builtin_prefetch(x + p.x_step + j);
          const AccVec<T> u = get(x + j, n) * get(a + j, n);
          put(a + j, u, n);
          return u * u;
        });
      }
      const A<T> rstd = A<T>(1) / square_root(square * inverse + eps);
      ((A<T>*)p.out_rstd)[row * p.groups + group] = rstd;
      with_flag(p.norm_first, [&](auto norm_first) {
        with_flag(bias != nullptr, [&](auto has_bias) {
          strips<L>(C, [&](int64_t j, int n) {
            const AccVec<T> v = norm_first.value ? get(x + j, n) : get(a + j, n);
            AccVec<T> m = v * rstd * get(weight + j, n);
            if (has_bias.value) m += get(bias + j, n);
            if (norm_first.value) m *= get(a + j, n);
            put(y + j, m, n, streaming);
          });
        });
      });
    }
  }
  if (p.streaming) stream_fence();
}

// One group of one row. a and s hold act and act' of the gate; a receives h.
template <class T, bool kNormFirst, bool kBias>
SOLERA_INLINE void backward_group(const GatedNorm& p, int64_t row, int64_t group, A<T>* a, A<T>* s,
                                  A<T>* dweight, A<T>* dbias) {
  constexpr int L = kLanes<T>;
  const int64_t C = p.columns, at = row * C * p.groups + group * C;
  const T* dy = (const T*)p.dy + row * p.dy_step + group * C;
  const T* x = (const T*)p.x + row * p.x_step + group * C;
  const A<T>* weight = (const A<T>*)p.weight + group * C;
  const A<T>* bias = kBias ? (const A<T>*)p.bias + group * C : nullptr;
  const A<T> rstd = ((const A<T>*)p.rstd)[row * p.groups + group];
  T* dx = p.dx ? (T*)p.dx + at : nullptr;
  T* dgate = p.dgate ? (T*)p.dgate + at : nullptr;
  const bool stream_dx = p.streaming && can_stream(dx);
  const bool stream_dgate = p.streaming && can_stream(dgate);
  AccVec<T> total{};
  strips<L>(C, [&](int64_t j, int n) {
    __builtin_prefetch(dy + p.dy_step + j);
    __builtin_prefetch(x + p.x_step + j);
    const AccVec<T> g = get(dy + j, n), w = get(weight + j, n), value = get(a + j, n);
    const AccVec<T> normal = (kNormFirst ? get(x + j, n) : get(x + j, n) * value) * rstd;
    const AccVec<T> e = kNormFirst ? g * value : g;
    const AccVec<T> h = e * w;
    total += h * normal;
    if (dweight) put(dweight + j, get(dweight + j, n) + e * normal, n);
    if (dbias) put(dbias + j, get(dbias + j, n) + e, n);
    if (kNormFirst) {
      put(a + j, h, n);
      if (dgate) {
        AccVec<T> m = normal * w;
        if (kBias) m += get(bias + j, n);
        put(dgate + j, g * m * get(s + j, n), n, stream_dgate);
      }
    }
  });
  if (!dx && (kNormFirst || !dgate)) return;
  const A<T> mean = lane_sum(total) / A<T>(C);
  strips<L>(C, [&](int64_t j, int n) {
    const AccVec<T> v = get(x + j, n), value = get(a + j, n);
    if (kNormFirst) {
      put(dx + j, (value - v * rstd * mean) * rstd, n, stream_dx);
    } else {
      const AccVec<T> h = get(dy + j, n) * get(weight + j, n);
      const AccVec<T> du = (h - v * value * rstd * mean) * rstd;
      if (dx) put(dx + j, du * value, n, stream_dx);
      if (dgate) put(dgate + j, du * v * get(s + j, n), n, stream_dgate);
    }
  });
}

template <class T>
void gated_backward(const GatedNorm& p, void* scratch, int64_t first_chunk, int64_t last_chunk) {
  const int64_t C = p.columns, D = C * p.groups;
  A<T>*a = (A<T>*)scratch, *s = a + D;
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    A<T>* dweight = p.dweight ? (A<T>*)p.dweight + chunk * D : nullptr;
    A<T>* dbias = p.dbias ? (A<T>*)p.dbias + chunk * D : nullptr;
    if (dweight) memset((void*)dweight, 0, size_t(D) * sizeof(A<T>));
    if (dbias) memset((void*)dbias, 0, size_t(D) * sizeof(A<T>));
    const int64_t row = chunk * kGatedChunkRows;
    const int64_t end = row + kGatedChunkRows < p.rows ? row + kGatedChunkRows : p.rows;
    with_flag(p.norm_first, [&](auto first) {
      with_flag(p.bias != nullptr, [&](auto biased) {
        for (int64_t r = row; r < end; ++r) {
          gate_row<T, true>((const T*)p.gate + r * p.gate_step, p.gate_step, a, s, D, p.activation);
          for (int64_t group = 0; group < p.groups; ++group)
            backward_group<T, decltype(first)::value, decltype(biased)::value>(
                p, r, group, a + group * C, s + group * C, dweight ? dweight + group * C : nullptr,
                dbias ? dbias + group * C : nullptr);
        }
      });
    });
  }
  if (p.streaming) stream_fence();
}

}  // namespace

extern const GatedNormTable gated_norm_table;
const GatedNormTable gated_norm_table = {
    {gated_forward<float>, gated_forward<double>, gated_forward<bf16>, gated_forward<f16>},
    {gated_backward<float>, gated_backward<double>, gated_backward<bf16>, gated_backward<f16>},
    {sum_chunks<float>, sum_chunks<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <cmath>

#include "../parallel.h"

namespace solera {

SOLERA_PICK(GatedNormTable, gated_norm_table)

namespace {

// Outputs past this size do not fit the caches beside their inputs, and are stored past them.
constexpr int64_t kGatedStreamBytes = int64_t(16) << 20;

// A tensor as rows a fixed step apart: itself if its leading dimensions merge, else a dense copy.
struct GatedRows {
  Tensor t;
  int64_t step = 0;
  explicit GatedRows(const Tensor& in) : t(in) {
    const int64_t dims = in.dim();
    STD_TORCH_CHECK(dims > 0, "solera: x needs a dimension");
    const auto size = in.sizes();
    const auto stride = in.strides();
    int64_t span = -1;  // what the next dimension's stride must be; -1 until the first is met
    bool regular = stride[dims - 1] == 1 || size[dims - 1] < 2;
    for (int64_t i = dims - 2; i >= 0 && regular; --i) {
      if (size[i] < 2) continue;
      if (span < 0)
        step = stride[i];
      else
        regular = stride[i] == span;
      span = stride[i] * size[i];
    }
    if (!regular) {
      t = torch::stable::contiguous(in);
      step = size[dims - 1];
    }
  }
  const void* data() const { return t.const_data_ptr(); }
};

// weight or bias as a contiguous row of the accumulator type.
OptTensor gated_row(const OptTensor& t, int64_t columns, ScalarType acc) {
  if (!t.has_value()) return std::nullopt;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == columns, "solera: weight or bias does not fit x");
  return dense(t->scalar_type() == acc ? *t : torch::stable::to(*t, acc));
}

struct GatedShape {
  Sizes sizes;
  Dtype dtype;
  ScalarType acc;
  int64_t rows = 1, columns, row_bytes;
  bool streaming;
  explicit GatedShape(const Tensor& x) : sizes(x.sizes()), dtype(dtype_of(x)) {
    acc = accumulate_type(x);
    columns = sizes[sizes.size() - 1];
    row_bytes = columns * int64_t(x.element_size());
    for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
    streaming = rows * row_bytes >= kGatedStreamBytes;
  }
};

Tensor gated_ones(const Tensor& x, int64_t columns, ScalarType acc) {
  const int64_t width[] = {columns};
  Tensor one = empty_like(x, Sizes(width, 1), acc);
  torch::stable::fill_(one, 1.0);
  return one;
}

void check_gated(const Tensor& x, const Tensor& gate, int64_t groups) {
  bool same = x.dim() == gate.dim() && x.scalar_type() == gate.scalar_type();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == gate.size(i);
  STD_TORCH_CHECK(same, "solera: gate does not fit x");
  STD_TORCH_CHECK(groups > 0 && x.dim() > 0 && x.size(x.dim() - 1) % groups == 0,
                  "solera: the groups do not divide the row");
}

std::tuple<Tensor, Tensor> gated_norm(const Tensor& x_in, const Tensor& gate_in, OptTensor weight,
                                      OptTensor bias, double eps, int64_t activation,
                                      bool norm_first, int64_t groups) {
  check_gated(x_in, gate_in, groups);
  const GatedRows x(x_in), gate(gate_in);
  const GatedShape shape(x_in);
  const OptTensor w = gated_row(weight, shape.columns, shape.acc);
  const OptTensor b = gated_row(bias, shape.columns, shape.acc);
  const Tensor one = w.has_value() ? *w : gated_ones(x_in, shape.columns, shape.acc);
  std::vector<int64_t> kept(shape.sizes.begin(), shape.sizes.end());
  kept.back() = groups;
  Tensor y = empty_like(x_in, shape.sizes);
  Tensor rstd = empty_like(x_in, Sizes(kept.data(), kept.size()), shape.acc);
  GatedNorm p{};
  p.x = x.data();
  p.gate = gate.data();
  p.x_step = x.step;
  p.gate_step = gate.step;
  p.weight = one.const_data_ptr();
  p.bias = data_or_null(b);
  p.y = y.mutable_data_ptr();
  p.out_rstd = rstd.mutable_data_ptr();
  p.rows = shape.rows;
  p.columns = shape.columns / groups;
  p.groups = groups;
  p.eps = eps;
  p.activation = int(activation);
  p.norm_first = norm_first;
  p.streaming = shape.streaming;
  const auto kernel = pick_gated_norm_table().forward[shape.dtype];
  if (shape.columns == 0) return {y, rstd};
  parallel_for(0, shape.rows, grain_for(2 * shape.row_bytes), [&](int64_t begin, int64_t end) {
    std::unique_ptr<double[]> scratch(new double[shape.columns]);
    kernel(p, scratch.get(), begin, end);
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_norm_backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& gate_in, OptTensor weight,
    OptTensor bias, const Tensor& rstd, int64_t activation, bool norm_first, bool need_x,
    bool need_gate, bool need_weight, bool need_bias) {
  const int64_t groups = rstd.size(rstd.dim() - 1);
  check_gated(x_in, gate_in, groups);
  check_gated(x_in, dy_in, groups);
  const GatedRows dy(dy_in), x(x_in), gate(gate_in);
  const GatedShape shape(x_in);
  const ScalarType acc = shape.acc;
  const OptTensor w = gated_row(weight, shape.columns, acc);
  const OptTensor b = gated_row(bias, shape.columns, acc);
  const Tensor one = w.has_value() ? *w : gated_ones(x_in, shape.columns, acc);
  const Tensor r = dense(rstd);
  const int64_t chunks = (shape.rows + kGatedChunkRows - 1) / kGatedChunkRows;
  const int64_t zero[] = {0}, part[] = {chunks, shape.columns};
  const Sizes none(zero, 1), row(part + 1, 1), all(part, 2);
  Tensor dx = empty_like(x_in, need_x ? shape.sizes : none);
  Tensor dgate = empty_like(x_in, need_gate ? shape.sizes : none);
  Tensor dweight = empty_like(x_in, need_weight ? row : none, acc);
  Tensor dbias = empty_like(x_in, need_bias ? row : none, acc);
  Tensor dweight_part = empty_like(x_in, need_weight ? all : none, acc);
  Tensor dbias_part = empty_like(x_in, need_bias ? all : none, acc);
  GatedNorm p{};
  p.dy = dy.data();
  p.x = x.data();
  p.gate = gate.data();
  p.dy_step = dy.step;
  p.x_step = x.step;
  p.gate_step = gate.step;
  p.weight = one.const_data_ptr();
  p.bias = data_or_null(b);
  p.rstd = r.const_data_ptr();
  p.dx = need_x ? dx.mutable_data_ptr() : nullptr;
  p.dgate = need_gate ? dgate.mutable_data_ptr() : nullptr;
  p.dweight = need_weight ? dweight_part.mutable_data_ptr() : nullptr;
  p.dbias = need_bias ? dbias_part.mutable_data_ptr() : nullptr;
  p.rows = shape.rows;
  p.columns = shape.columns / groups;
  p.groups = groups;
  p.activation = int(activation);
  p.norm_first = norm_first;
  p.streaming = shape.streaming;
  const auto& table = pick_gated_norm_table();
  if (shape.columns > 0)
    parallel_for(0, chunks, grain_for(3 * shape.row_bytes * kGatedChunkRows),
                 [&](int64_t begin, int64_t end) {
                   std::unique_ptr<double[]> scratch(new double[2 * shape.columns]);
                   table.backward[shape.dtype](p, scratch.get(), begin, end);
                 });
  const auto finish = [&](const Tensor& from, Tensor& to) {
    parallel_for(0, shape.columns, grain_for(chunks * 4), [&](int64_t begin, int64_t end) {
      table.sum_chunks[acc == ScalarType::Double](from.const_data_ptr(), to.mutable_data_ptr(),
                                                  chunks, shape.columns, begin, end);
    });
  };
  if (need_weight) finish(dweight_part, dweight);
  if (need_bias) finish(dbias_part, dbias);
  return {dx, dgate, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("gated_norm", TORCH_BOX(&gated_norm));
  m.impl("gated_norm_backward", TORCH_BOX(&gated_norm_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
