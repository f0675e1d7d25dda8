// Weights that are a function of two tensors (or of one and two numbers), computed inside a forward
// pass. The formulas of mixout and of the mask are in reparam.h; here also
//
//   dropout  P = (1 + sign(g)(g + h) / (|g| + |h| + eps)) / 2,  g <- P > u ? g : (1 - rate) g
//   compand  W = a f(t), t = v / b, f arctan or tanh;  dv = g (a/b) f'(t),
//            da = sum g f(t),  db = -sum t dv
//
// Elements read and written: mixout 2 + 1, backward 1 + 1 (+ 1 with the anchor's); mask 2 + 1,
// backward 3 + 2; dropout 2 + 1; compand 1 + 1, backward 2 + 1. A mask is not among them: its
// Philox words cost about 13 instructions an element on vectors of 16.
#include "reparam.h"

#include "companders.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

void reparam_words(uint64_t seed, uint32_t key, int64_t begin, int64_t end, uint32_t* out) {
  ReparamItem item{};
  item.seed = seed;
  item.key = key;
  each_piece(item, begin, end, [&](int64_t e, const uint32_t* words, int64_t n) {
    memcpy(out + e, words, size_t(n) * sizeof(uint32_t));
  });
}

// The upper 24 bits of a word as a number in [0, 1), exactly.
SOLERA_INLINE vf uniform(const uint32_t* words, int n, float) {
  vu w{};
  memcpy(&w, words, size_t(n) * 4);
  return __builtin_convertvector((vi)(w >> 8), vf) * 0x1p-24f;
}
SOLERA_INLINE vd uniform(const uint32_t* words, int n, double) {
  double lane[kLanes<double>] = {};
  for (int i = 0; i < n; ++i) lane[i] = double(words[i] >> 8) * 0x1p-24;
  return load(lane);
}

template <class T>
void gradient_dropout(const ReparamItem& item, double eps_in, int64_t begin, int64_t end) {
  typedef typename Acc<T>::type S;
  const S eps = S(eps_in), low = S(1 - item.number);
  each_piece(item, begin, end, [&](int64_t e, const uint32_t* words, int64_t n) {
    const T* grad = (const T*)item.weight + e;
    const T* other = (const T*)item.other + e;
    T* out = (T*)item.dweight + e;
    const bool past = item.streaming && can_stream(out);
    strips<kLanes<T>>(n, [&](int64_t j, int m) {
      const AccVec<T> g = get(grad + j, m), h = get(other + j, m);
      const AccVec<T> size = (g < 0 ? -g : g) + (h < 0 ? -h : h) + eps;
      const AccVec<T> sum = g + h;
      const AccVec<T> toward = g > 0 ? sum : (g < 0 ? -sum : AccVec<T>{});
      const AccVec<T> agreement = S(0.5) * (S(1) + toward / size);
      put(out + j, agreement > uniform(words + j, m, S{}) ? g : g * low, m, past);
    });
  });
  if (item.streaming) stream_fence();
}

template <class V>
SOLERA_INLINE V companded(V t, bool tanh) {
  return tanh ? hyperbolic_tangent(t) : arctan(t);
}

template <class T>
void compand(const void* v_in, double a_in, double b_in, int kind, void* out_in, bool streaming,
             int64_t begin, int64_t end) {
  typedef typename Acc<T>::type S;
  const S a = S(a_in), b = S(b_in);
  const T* v = (const T*)v_in + begin;
  T* out = (T*)out_in + begin;
  const bool past = streaming && can_stream(out);
  with_flag(kind == 1, [&](auto tanh) {
    strips<kLanes<T>>(end - begin, [&](int64_t j, int m) {
      put(out + j, a * companded(get(v + j, m) / b, decltype(tanh)::value), m, past);
    });
  });
  if (streaming) stream_fence();
}

// sums: da and db of the range, float lanes summed in double every 1024 elements.
template <class T>
void compand_backward(const void* g_in, const void* v_in, double a_in, double b_in, int kind,
                      void* dv_in, double* sums, bool streaming, int64_t begin, int64_t end) {
  typedef typename Acc<T>::type S;
  const S b = S(b_in), slope = S(a_in) / b;
  T* dv = dv_in ? (T*)dv_in : nullptr;
  const bool past = streaming && dv && can_stream(dv + begin);
  double da = 0, db = 0;
  with_flag(kind == 1, [&](auto tanh) {
    for (int64_t first = begin; first < end; first += 1024) {
      const int64_t n = end - first < 1024 ? end - first : 1024;
      const T* g_at = (const T*)g_in + first;
      const T* v_at = (const T*)v_in + first;
      AccVec<T> sum_a{}, sum_b{};
      strips<kLanes<T>>(n, [&](int64_t j, int m) {
        const AccVec<T> g = get(g_at + j, m), t = get(v_at + j, m) / b;
        const AccVec<T> f = companded(t, decltype(tanh)::value);
        AccVec<T> d = g * slope;
        if constexpr (decltype(tanh)::value)
          d *= S(1) - f * f;
        else
          d /= S(1) + t * t;
        sum_a += g * f;
        sum_b -= keep<T>(t * d, m);
        if (dv) put(dv + first + j, d, m, past);
      });
      da += double(lane_sum(sum_a));
      db += double(lane_sum(sum_b));
    }
  });
  sums[0] = da;
  sums[1] = db;
  if (streaming) stream_fence();
}

template <class S>
void add_to(const void* from_in, void* to_in, int64_t n) {
  const S* from = (const S*)from_in;
  S* to = (S*)to_in;
  strips<kLanes<S>>(n,
                    [&](int64_t j, int m) { put(to + j, get(to + j, m) + get(from + j, m), m); });
}

}  // namespace

extern const ReparamTable reparam_table;
const ReparamTable reparam_table = {
    {reparam_run<float, float>, reparam_run<double, double>, reparam_run<bf16, bf16>,
     reparam_run<f16, f16>},
    {reparam_run<float, float>, reparam_run<double, double>, reparam_run<bf16, float>,
     reparam_run<f16, float>},
    reparam_words,
    {gradient_dropout<float>, gradient_dropout<double>, gradient_dropout<bf16>,
     gradient_dropout<f16>},
    {compand<float>, compand<double>, compand<bf16>, compand<f16>},
    {compand_backward<float>, compand_backward<double>, compand_backward<bf16>,
     compand_backward<f16>},
    {sum_chunks<float>, sum_chunks<double>},
    {add_to<float>, add_to<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "reparam_front.h"

namespace solera {

namespace {

constexpr int64_t kReparamSpan = 16384;  // elements a task, whole chunks of a mask

template <class F>
void reparam_spans(int64_t elements, const F& body) {
  parallel_for(0, (elements + kReparamSpan - 1) / kReparamSpan, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kReparamSpan;
      body(first, std::min(elements, first + kReparamSpan), i);
    }
  });
}

bool reparam_streams(const Tensor& out) {
  return out.numel() * int64_t(out.element_size()) >= int64_t(16) << 20;
}

Tensor reparam_forward(const Tensor& weight_in, const OptTensor& other_in, ReparamItem item) {
  const Tensor weight = dense(weight_in);
  const OptTensor other = dense_or_none(other_in);
  Tensor out = empty_like(weight, weight.sizes());
  item.weight = weight.const_data_ptr();
  item.other = data_or_null(other);
  item.streaming = reparam_streams(out);
  const auto run = pick_reparam_table().own[dtype_of(weight)];
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const int64_t size = out.element_size();
  reparam_spans(weight.numel(), [&](int64_t begin, int64_t end, int64_t) {
    run(item, begin, end, data + begin * size, nullptr);
  });
  return out;
}

std::tuple<Tensor, Tensor> reparam_backward(const Tensor& grad_in, const Tensor& weight_in,
                                            const OptTensor& other_in, ReparamItem item,
                                            bool need_weight, bool need_other) {
  const Tensor grad = dense(grad_in), weight = dense(weight_in);
  const OptTensor other = dense_or_none(other_in);
  Tensor dweight = gradient_like(grad, need_weight), dother = gradient_like(grad, need_other);
  item.weight = weight.const_data_ptr();
  item.other = data_or_null(other);
  item.dweight = need_weight ? dweight.mutable_data_ptr() : nullptr;
  item.dother = need_other ? dother.mutable_data_ptr() : nullptr;
  item.streaming = reparam_streams(grad);
  const auto run = pick_reparam_table().own[dtype_of(grad)];
  const char* data = static_cast<const char*>(grad.const_data_ptr());
  const int64_t size = grad.element_size();
  reparam_spans(grad.numel(), [&](int64_t begin, int64_t end, int64_t) {
    run(item, begin, end, nullptr, data + begin * size);
  });
  return {dweight, dother};
}

Tensor mixout(const Tensor& weight, const OptTensor& anchor, const Tensor& seed, double p,
              int64_t key, bool column) {
  same_shape("mixout: anchor", anchor, weight);
  const MixoutMask mask(weight, seed, p, key, column);
  return reparam_forward(weight, anchor, mask.item);
}

std::tuple<Tensor, Tensor> mixout_backward(const Tensor& grad, const Tensor& seed, double p,
                                           int64_t key, bool column, bool need_weight,
                                           bool need_anchor) {
  const MixoutMask mask(grad, seed, p, key, column);
  return reparam_backward(grad, grad, OptTensor(), mask.item, need_weight, need_anchor);
}

Tensor masked_weight(const Tensor& weight, const Tensor& score, double threshold) {
  same_shape("masked_weight: score", OptTensor(score), weight);
  return reparam_forward(weight, OptTensor(score), threshold_item(threshold));
}

std::tuple<Tensor, Tensor> masked_weight_backward(const Tensor& grad, const Tensor& weight,
                                                  const Tensor& score, double threshold,
                                                  bool need_weight, bool need_score) {
  same_shape("masked_weight: score", OptTensor(score), weight);
  same_shape("masked_weight: grad", OptTensor(grad), weight);
  return reparam_backward(grad, weight, OptTensor(score), threshold_item(threshold), need_weight,
                          need_score);
}

Tensor gradient_dropout(const Tensor& grad_in, const Tensor& other_in, const Tensor& seed,
                        double rate, double eps, int64_t key) {
  same_shape("gradient_dropout: other", OptTensor(other_in), grad_in);
  const Tensor grad = dense(grad_in), other = dense(other_in);
  Tensor out = empty_like(grad, grad.sizes());
  ReparamItem item{};
  item.weight = grad.const_data_ptr();
  item.other = other.const_data_ptr();
  item.dweight = out.mutable_data_ptr();
  item.seed = seed_of(seed);
  item.key = uint32_t(key);
  item.number = rate;
  item.streaming = reparam_streams(out);
  const auto run = pick_reparam_table().dropout[dtype_of(grad)];
  reparam_spans(grad.numel(),
                [&](int64_t begin, int64_t end, int64_t) { run(item, eps, begin, end); });
  return out;
}

double number_of(const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == 1, "weight_compand: a and b are single numbers");
  return t.scalar_type() == ScalarType::Double
             ? *static_cast<const double*>(t.const_data_ptr())
             : double(*static_cast<const float*>(t.const_data_ptr()));
}

Tensor weight_compand(const Tensor& v_in, const Tensor& a_in, const Tensor& b_in, int64_t kind) {
  const Tensor v = dense(v_in);
  Tensor out = empty_like(v, v.sizes());
  const double a = number_of(a_in), b = number_of(b_in);
  const auto run = pick_reparam_table().compand[dtype_of(v)];
  reparam_spans(v.numel(), [&](int64_t begin, int64_t end, int64_t) {
    run(v.const_data_ptr(), a, b, int(kind), out.mutable_data_ptr(), reparam_streams(out), begin,
        end);
  });
  return out;
}

std::tuple<Tensor, Tensor> weight_compand_backward(const Tensor& grad_in, const Tensor& v_in,
                                                   const Tensor& a_in, const Tensor& b_in,
                                                   int64_t kind, bool need_v) {
  same_shape("weight_compand: grad", OptTensor(grad_in), v_in);
  const Tensor grad = dense(grad_in), v = dense(v_in);
  Tensor dv = gradient_like(v, need_v);
  Tensor sums = empty_like(v, std::vector<int64_t>{2}, ScalarType::Double);
  const double a = number_of(a_in), b = number_of(b_in);
  std::vector<double> partial(size_t((v.numel() + kReparamSpan - 1) / kReparamSpan) * 2);
  const auto run = pick_reparam_table().compand_backward[dtype_of(v)];
  void* data = need_v ? dv.mutable_data_ptr() : nullptr;
  reparam_spans(v.numel(), [&](int64_t begin, int64_t end, int64_t i) {
    run(grad.const_data_ptr(), v.const_data_ptr(), a, b, int(kind), data, &partial[size_t(i) * 2],
        reparam_streams(v), begin, end);
  });
  double* total = static_cast<double*>(sums.mutable_data_ptr());
  total[0] = total[1] = 0;
  for (size_t i = 0; i < partial.size(); ++i) total[i % 2] += partial[i];
  return {dv, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("mixout", TORCH_BOX(&mixout));
  m.impl("mixout_backward", TORCH_BOX(&mixout_backward));
  m.impl("masked_weight", TORCH_BOX(&masked_weight));
  m.impl("masked_weight_backward", TORCH_BOX(&masked_weight_backward));
  m.impl("gradient_dropout", TORCH_BOX(&gradient_dropout));
  m.impl("weight_compand", TORCH_BOX(&weight_compand));
  m.impl("weight_compand_backward", TORCH_BOX(&weight_compand_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
