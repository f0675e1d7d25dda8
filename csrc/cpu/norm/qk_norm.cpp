// Heads normalised over their d elements and turned by a rotary embedding, forward and backward.
//
//   mu = mean(x) (layer) or 0
//   r = 1 / sqrt(mean((x - mu)^2) + eps) (rms, layer), 1 / max(|x|, eps) (l2),
//       1 / sqrt(|x|^2 + eps) (l2_add)
//   v = (x - mu) * r * w;   y = v with its first R elements turned in pairs by the position's
//   angle: y_a = v_a cos - v_b sin, y_b = v_b cos + v_a sin
//
// Backward turns dy back (e), then with n = (x - mu) * r, h = e * w:
//   dx = r * (h - c * n * sum(h * n) - [mean(h)]), c = 1/d, or 1 (l2, l2_add), or 0 where |x| was
//   clamped dw = sum over rows of e * n
//
// Bytes a row: forward reads x and writes y; backward reads x and dy and writes dx; 5 d both ways.
// The angles (a table of positions x R/2, shared by heads and batch) come from cache. x and dy may
// have any strides with 1 as the last; rows are walked in the order of the output. The weight
// gradient is summed over few rows, then over chunks of a fixed number of rows, then over the
// chunks in order (in double).
#include "../strips.h"

namespace solera {

enum HeadKind : int { kHeadRms = 0, kHeadLayer = 1, kHeadL2 = 2, kHeadL2Add = 3 };

struct HeadNorm {
  const void *dy, *x;             // dy in backward only
  int64_t dy_step[3], x_step[3];  // strides of the first three dimensions, in elements
  int64_t size[3];                // of these; the last is walked fastest
  const void* weight;             // accumulator type, never null
  int64_t weight_step;            // from head to head: d, or 0
  const void *cos, *sin;          // accumulator type, (positions, `angles`); null: no rotation
  int64_t cos_batch;              // from one batch item to the next, in elements
  int64_t angles;                 // R / 2; interleaved: R, each cosine twice, sines signed
  const void *mean, *rstd;        // backward
  void *y, *out_mean, *out_rstd;  // forward
  void *dx, *dweight;             // backward; may be null; dweight: (heads or 1, d) per chunk
  int64_t rows, columns, rotary, chunk_rows, inner_rows, dweight_step;
  double eps;
  int kind, heads;  // heads: which of the dimensions 1, 2
  bool interleaved, streaming;
};

struct HeadNormTable {
  void (*forward[4])(const HeadNorm&, int64_t begin, int64_t end);
  // scratch: d, and with dweight its size once more, elements of the accumulator type
  void (*backward[4])(const HeadNorm&, void* scratch, int64_t first_chunk, int64_t last_chunk);
  void (*sum_chunks[2])(const void* partial, void* out, int64_t chunks, int64_t columns,
                        int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

// Each even lane exchanged with the odd one after it.
SOLERA_INLINE vf swap_pairs(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_permute_ps((__m512)v, 0xb1);
#elif defined(__AVX2__)
  return (vf)_mm256_permute_ps((__m256)v, 0xb1);
#else
  vf out;
  for (int i = 0; i < Vec<float>::lanes; ++i) out[i] = v[i ^ 1];
  return out;
#endif
}
SOLERA_INLINE vd swap_pairs(vd v) {
#if defined(__AVX512F__)
  return (vd)_mm512_permute_pd((__m512d)v, 0x55);
#elif defined(__AVX2__)
  return (vd)_mm256_permute_pd((__m256d)v, 0x5);
#else
  vd out;
  for (int i = 0; i < Vec<double>::lanes; ++i) out[i] = v[i ^ 1];
  return out;
#endif
}

// Walks the rows in order and knows where each lies.
struct HeadWalk {
  int64_t at[3];
  SOLERA_INLINE HeadWalk(const HeadNorm& p, int64_t row) {
    at[2] = row % p.size[2];
    at[1] = row / p.size[2] % p.size[1];
    at[0] = row / p.size[2] / p.size[1];
  }
  SOLERA_INLINE void next(const HeadNorm& p) {
    if (++at[2] < p.size[2]) return;
    at[2] = 0;
    if (++at[1] < p.size[1]) return;
    at[1] = 0;
    ++at[0];
  }
  SOLERA_INLINE int64_t offset(const int64_t step[3]) const {
    return at[0] * step[0] + at[1] * step[1] + at[2] * step[2];
  }
  SOLERA_INLINE int64_t head(const HeadNorm& p) const { return at[p.heads]; }
  SOLERA_INLINE int64_t angle(const HeadNorm& p) const {
    return at[0] * p.cos_batch + at[3 - p.heads] * p.angles;
  }
};

// Calls to(j, count, v) for every element of a row turned by the angle (backwards if kBack), where
// from(j, count) gives the elements before.
template <class T, bool kBack, class From, class To>
SOLERA_INLINE void turn_row(const HeadNorm& p, int64_t angle, const From& from, const To& to) {
  constexpr int L = kLanes<T>;
  const int64_t R = p.cos ? p.rotary : 0;
  const A<T>*cos = (const A<T>*)p.cos + angle, *sin = (const A<T>*)p.sin + angle;
  if (R > 0 && p.interleaved) {
    strips<L>(R, [&](int64_t j, int n) {
      const AccVec<T> v = from(j, n), other = swap_pairs(v) * get(sin + j, n);
      const AccVec<T> kept = v * get(cos + j, n);
      to(j, n, kBack ? kept - other : kept + other);
    });
  } else if (R > 0) {
    const int64_t half = R / 2;
    strips<L>(half, [&](int64_t j, int n) {
      const AccVec<T> a = from(j, n), b = from(half + j, n);
      const AccVec<T> c = get(cos + j, n), s = kBack ? -get(sin + j, n) : get(sin + j, n);
      to(j, n, a * c - b * s);
      to(half + j, n, b * c + a * s);
    });
  }
  strips<L>(p.columns - R, [&](int64_t j, int n) { to(R + j, n, from(R + j, n)); });
}

template <class T>
void head_forward(const HeadNorm& p, int64_t begin, int64_t end) {
  const int64_t d = p.columns;
  const A<T> inverse = A<T>(1) / A<T>(d), eps = A<T>(p.eps);
  HeadWalk walk(p, begin);
  for (int64_t row = begin; row < end; ++row, walk.next(p)) {
    const T* x = (const T*)p.x + walk.offset(p.x_step);
    const A<T>* weight = (const A<T>*)p.weight + walk.head(p) * p.weight_step;
    T* y = (T*)p.y + row * d;
    A<T> mean = 0;
    if (p.kind == kHeadLayer)
      mean = row_sum<T>(d, [&](int64_t j, int n) { return get(x + j, n); }) * inverse;
    const A<T> square = row_sum<T>(d, [&](int64_t j, int n) {
      const AccVec<T> v = keep<T>(get(x + j, n) - mean, n);
      return v * v;
    });
    A<T> rstd;
    if (p.kind == kHeadL2) {
      const A<T> norm = square_root(square);
      rstd = A<T>(1) / (norm < eps ? eps : norm);  // NaN stays
    } else {
      rstd = A<T>(1) / square_root((p.kind == kHeadL2Add ? square : square * inverse) + eps);
    }
    const bool streaming = p.streaming && can_stream(y);
    turn_row<T, false>(
        p, walk.angle(p),
        [&](int64_t j, int n) { return (get(x + j, n) - mean) * rstd * get(weight + j, n); },
        [&](int64_t j, int n, AccVec<T> v) { put(y + j, v, n, streaming && can_stream(y + j)); });
    if (p.kind == kHeadLayer) ((A<T>*)p.out_mean)[row] = mean;
    ((A<T>*)p.out_rstd)[row] = rstd;
  }
  if (p.streaming) stream_fence();
}

template <class T>
SOLERA_INLINE void head_backward_row(const HeadNorm& p, const HeadWalk& walk, int64_t row, A<T>* e,
                                     A<T>* dweight_of_chunk) {
  constexpr int L = kLanes<T>;
  const int64_t d = p.columns;
  const T* x = (const T*)p.x + walk.offset(p.x_step);
  const T* dy = (const T*)p.dy + walk.offset(p.dy_step);
  const A<T>* weight = (const A<T>*)p.weight + walk.head(p) * p.weight_step;
  const bool layer = p.kind == kHeadLayer;
  const A<T> mean = layer ? ((const A<T>*)p.mean)[row] : A<T>(0), rstd = ((const A<T>*)p.rstd)[row];
  A<T>* dweight = dweight_of_chunk ? dweight_of_chunk + walk.head(p) * p.dweight_step : nullptr;
  turn_row<T, true>(
      p, walk.angle(p), [&](int64_t j, int n) { return get(dy + j, n); },
      [&](int64_t j, int n, AccVec<T> v) { put(e + j, v, n); });
  AccVec<T> sum_h{}, sum_hn{};
  strips<L>(d, [&](int64_t j, int n) {
    const AccVec<T> v = get(e + j, n), normal = keep<T>(get(x + j, n) - mean, n) * rstd;
    const AccVec<T> h = rounded(v * get(weight + j, n));
    sum_h += h;
    sum_hn += h * normal;
    if (dweight) put(dweight + j, get(dweight + j, n) + v * normal, n);
  });
  if (!p.dx) return;
  T* dx = (T*)p.dx + row * d;
  A<T> share = lane_sum(sum_hn);
  if (p.kind == kHeadRms || layer) share /= A<T>(d);
  if (p.kind == kHeadL2 && rstd >= A<T>(1) / A<T>(p.eps)) share = 0;
  const A<T> mean_h = layer ? lane_sum(sum_h) / A<T>(d) : A<T>(0);
  strips<L>(d, [&](int64_t j, int n) {
    AccVec<T> v = rounded(get(e + j, n) * get(weight + j, n)) - mean_h;
    v = (v - (get(x + j, n) - mean) * rstd * share) * rstd;
    put(dx + j, v, n, p.streaming && can_stream(dx + j));
  });
}

template <class T>
void head_backward(const HeadNorm& p, void* scratch, int64_t first_chunk, int64_t last_chunk) {
  constexpr int L = kLanes<T>;
  const int64_t part = p.dweight_step ? p.dweight_step * p.size[p.heads] : p.columns;
  A<T>*e = (A<T>*)scratch, *inner = p.dweight ? e + p.columns : nullptr;
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    A<T>* dweight = p.dweight ? (A<T>*)p.dweight + chunk * part : nullptr;
    if (dweight) memset((void*)dweight, 0, size_t(part) * sizeof(A<T>));
    int64_t row = chunk * p.chunk_rows;
    const int64_t end = row + p.chunk_rows < p.rows ? row + p.chunk_rows : p.rows;
    HeadWalk walk(p, row);
    while (row < end) {
      if (inner) memset((void*)inner, 0, size_t(part) * sizeof(A<T>));
      const int64_t stop = row + p.inner_rows < end ? row + p.inner_rows : end;
      for (; row < stop; ++row, walk.next(p)) head_backward_row<T>(p, walk, row, e, inner);
      if (dweight)
        strips<L>(part, [&](int64_t j, int n) {
          put(dweight + j, get(dweight + j, n) + get(inner + j, n), n);
        });
    }
  }
  if (p.streaming) stream_fence();
}

}  // namespace

extern const HeadNormTable head_norm_table;
const HeadNormTable head_norm_table = {
    {head_forward<float>, head_forward<double>, head_forward<bf16>, head_forward<f16>},
    {head_backward<float>, head_backward<double>, head_backward<bf16>, head_backward<f16>},
    {sum_chunks<float>, sum_chunks<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <cmath>

#include "../parallel.h"

namespace solera {

SOLERA_PICK(HeadNormTable, head_norm_table)

namespace {

constexpr int64_t kHeadStreamBytes = int64_t(16) << 20;

// What both ways share: the tensors that the pointers in p belong to stay alive beside it.
struct HeadCall {
  HeadNorm p{};
  Dtype dtype;
  ScalarType acc;
  Tensor x, weight, cos, sin;
  std::vector<int64_t> leading;

  HeadCall(const Tensor& x_in, const OptTensor& weight_in, const OptTensor& cos_in,
           const OptTensor& sin_in, int64_t kind, double eps, int64_t positions, bool interleaved)
      : dtype(dtype_of(x_in)), acc(accumulate_type(x_in)), x(x_in) {
    STD_TORCH_CHECK(x.dim() == 4 && (positions == 1 || positions == 2) && kind >= 0 && kind < 4,
                    "solera: head_norm takes x of four dimensions");
    if (x.stride(3) != 1 && x.size(3) > 1) x = torch::stable::contiguous(x);
    p.rows = 1;
    for (int i = 0; i < 3; ++i) {
      p.size[i] = x.size(i);
      p.x_step[i] = x.stride(i);
      p.rows *= p.size[i];
      leading.push_back(p.size[i]);
    }
    p.columns = x.size(3);
    p.x = x.const_data_ptr();
    p.heads = int(3 - positions);
    p.kind = int(kind);
    p.eps = eps;
    p.interleaved = interleaved;
    p.streaming = x.numel() * int64_t(x.element_size()) >= kHeadStreamBytes;
    take_weight(weight_in);
    if (cos_in.has_value()) take_angles(*cos_in, *sin_in, positions);
  }
  bool per_head = false;

 private:
  void take_weight(const OptTensor& given) {
    if (!given.has_value()) {
      weight = empty_like(x, Sizes(&p.columns, 1), acc);
      torch::stable::fill_(weight, 1.0);
    } else {
      per_head = given->dim() == 2;
      STD_TORCH_CHECK(given->size(given->dim() - 1) == p.columns &&
                          (!per_head || given->size(0) == p.size[p.heads]),
                      "solera: weight does not fit x");
      weight = dense(given->scalar_type() == acc ? *given : torch::stable::to(*given, acc));
      if (per_head) p.weight_step = p.columns;
    }
    p.weight = weight.const_data_ptr();
  }
  void take_angles(const Tensor& cos_in, const Tensor& sin_in, int64_t positions) {
    cos = dense(cos_in);
    sin = dense(sin_in);
    const int64_t half = cos.size(2);
    STD_TORCH_CHECK(cos.scalar_type() == acc && sin.scalar_type() == acc && 2 * half <= p.columns &&
                        cos.size(1) == p.size[positions] && sin.numel() == cos.numel() &&
                        (cos.size(0) == 1 || cos.size(0) == p.size[0]),
                    "solera: cos and sin do not fit x");
    p.rotary = 2 * half;
    p.angles = half;
    if (p.interleaved) {
      p.angles = p.rotary;
      spread(half);
    }
    p.cos_batch = cos.size(0) == 1 ? 0 : cos.size(1) * p.angles;
    p.cos = cos.const_data_ptr();
    p.sin = sin.const_data_ptr();
  }
  // Each cosine twice, each sine with a minus first: then a pair turns by one product and a swap.
  void spread(int64_t half) {
    const int64_t wide[] = {cos.size(0), cos.size(1), 2 * half};
    Tensor c = empty_like(cos, Sizes(wide, 3)), s = empty_like(cos, Sizes(wide, 3));
    const auto fill = [&](auto zero) {
      using Number = decltype(zero);
      const auto *from_c = static_cast<const Number*>(cos.const_data_ptr()),
                 *from_s = static_cast<const Number*>(sin.const_data_ptr());
      auto *to_c = static_cast<Number*>(c.mutable_data_ptr()),
           *to_s = static_cast<Number*>(s.mutable_data_ptr());
      for (int64_t i = 0, n = cos.numel(); i < n; ++i) {
        to_c[2 * i] = to_c[2 * i + 1] = from_c[i];
        to_s[2 * i] = -from_s[i];
        to_s[2 * i + 1] = from_s[i];
      }
    };
    if (acc == ScalarType::Double)
      fill(double{});
    else
      fill(float{});
    cos = c;
    sin = s;
  }
};

std::tuple<Tensor, Tensor, Tensor> head_norm(const Tensor& x, OptTensor weight, OptTensor cos,
                                             OptTensor sin, int64_t kind, double eps,
                                             int64_t positions, bool interleaved) {
  HeadCall call(x, weight, cos, sin, kind, eps, positions, interleaved);
  HeadNorm& p = call.p;
  const int64_t zero[] = {0};
  const Sizes rows(call.leading.data(), 3), none(zero, 1);
  Tensor y = empty_like(x, x.sizes());
  Tensor mean = empty_like(x, kind == kHeadLayer ? rows : none, call.acc);
  Tensor rstd = empty_like(x, rows, call.acc);
  p.y = y.mutable_data_ptr();
  p.out_mean = mean.mutable_data_ptr();
  p.out_rstd = rstd.mutable_data_ptr();
  const auto kernel = pick_head_norm_table().forward[call.dtype];
  if (p.rows > 0 && p.columns > 0)
    parallel_for(0, p.rows, grain_for(2 * p.columns * int64_t(x.element_size())),
                 [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor> head_norm_backward(const Tensor& dy_in, const Tensor& x,
                                              OptTensor weight, OptTensor cos, OptTensor sin,
                                              const Tensor& mean_in, const Tensor& rstd_in,
                                              int64_t kind, double eps, int64_t positions,
                                              bool interleaved, bool need_x, bool need_weight) {
  HeadCall call(x, weight, cos, sin, kind, eps, positions, interleaved);
  HeadNorm& p = call.p;
  Tensor dy = dy_in;
  if (dy.stride(3) != 1 && dy.size(3) > 1) dy = torch::stable::contiguous(dy);
  const Tensor mean = dense(mean_in), rstd = dense(rstd_in);
  const bool each = need_weight && call.per_head;
  const int64_t heads = each ? p.size[p.heads] : 1, part = heads * p.columns;
  // A chunk's share of the gradient is small beside the rows it comes from.
  p.chunk_rows = 256 > 16 * heads ? 256 : 16 * heads;
  p.inner_rows = 16 > 2 * heads ? 16 : 2 * heads;
  const int64_t chunks = (p.rows + p.chunk_rows - 1) / p.chunk_rows;
  const int64_t zero[] = {0}, all[] = {chunks, heads, p.columns};
  const Sizes none(zero, 1);
  Tensor dx = empty_like(x, need_x ? x.sizes() : none);
  Tensor dweight =
      empty_like(x, need_weight ? Sizes(each ? all + 1 : all + 2, each ? 2 : 1) : none, call.acc);
  Tensor partial = empty_like(x, need_weight ? Sizes(all, 3) : none, call.acc);
  for (int i = 0; i < 3; ++i) p.dy_step[i] = dy.stride(i);
  p.dy = dy.const_data_ptr();
  p.mean = mean.const_data_ptr();
  p.rstd = rstd.const_data_ptr();
  p.dx = need_x ? dx.mutable_data_ptr() : nullptr;
  p.dweight = need_weight ? partial.mutable_data_ptr() : nullptr;
  p.dweight_step = each ? p.columns : 0;
  const auto& table = pick_head_norm_table();
  if (p.rows > 0 && p.columns > 0)
    parallel_for(0, chunks, grain_for(3 * p.chunk_rows * p.columns * int64_t(x.element_size())),
                 [&](int64_t begin, int64_t end) {
                   std::unique_ptr<double[]> scratch(new double[p.columns + part]);
                   table.backward[call.dtype](p, scratch.get(), begin, end);
                 });
  if (need_weight)
    parallel_for(0, part, grain_for(chunks * 4), [&](int64_t begin, int64_t end) {
      table.sum_chunks[call.acc == ScalarType::Double](
          partial.const_data_ptr(), dweight.mutable_data_ptr(), chunks, part, begin, end);
    });
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("head_norm", TORCH_BOX(&head_norm));
  m.impl("head_norm_backward", TORCH_BOX(&head_norm_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
