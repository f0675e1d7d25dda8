// Layer and RMS normalisation over the last dimension, forward and backward.
//
//   u = x + alpha * residual                     (rounded to the dtype of x, as the unfused sum is)
//   mu = mean(u) or 0        rstd = 1 / sqrt(mean((u - mu)^2) + eps)
//   y = (u - mu) * rstd * w + b                  w = weight + weight_offset
//
// Backward, with n = (u - mu) * rstd and h = dy * w:
//   du = rstd * (h - n * mean(h * n) - [mean(h) if centred])  + what flows into u directly
//   dw = sum over rows of dy * n             db = sum over rows of dy
//
// Bytes a row of D elements: forward reads x, writes y (with a residual: reads 2, writes 2);
// backward reads u and dy, writes du. A row and its operands stay in L1/L2 between passes, so
// memory sees each byte once. The weight gradient is summed over chunks of rows (64, fewer where
// there would not be 16 chunks; never by the thread count), then over the chunks in order (in
// double): same bits for any number of threads.
#include "../strips.h"

namespace solera {

// All pointers are rows of D contiguous elements; the accumulator type A is float, or double for
// double.
struct RowNormForward {
  const void *x, *residual;   // residual may be null
  const void *weight, *bias;  // in A, may be null
  void *y, *u;                // u is written only when there is a residual
  void* row;                  // one row to hold u in while both outputs are streamed; may be null
  void *mean, *rstd;          // in A, may be null
  int64_t columns;
  double eps, alpha;
  bool centred, streaming;
};
struct RowNormBackward {
  const void *dy, *du, *u;           // du (what flows into u directly) may be null
  const void *weight, *mean, *rstd;  // weight is never null here: ones where there is none
  void* dx;                          // may be null
  void *dweight, *dbias;             // in A, one row of D per chunk; may be null
  int64_t rows, columns, chunk_rows;
  bool centred, streaming;
};
constexpr int64_t kChunkRows = 64, kLeastChunkRows = 4, kChunks = 16;

struct RowNormTable {
  void (*forward[4])(const RowNormForward&, int64_t begin, int64_t end);
  void (*backward[4])(const RowNormBackward&, int64_t first_chunk, int64_t last_chunk);
  void (*sum_chunks[2])(const void* partial, void* out, int64_t chunks, int64_t columns,
                        int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

template <class T>
void forward(const RowNormForward& p, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int64_t D = p.columns;
  const A<T>* weight = (const A<T>*)p.weight;
  const A<T>* bias = (const A<T>*)p.bias;
  const A<T> alpha = A<T>(p.alpha), inverse = A<T>(1) / A<T>(D);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)p.x + row * D;
    const T* next = x + D;  // asked for while this row is worked on
    T* y = (T*)p.y + row * D;
    if (p.residual) {
      const T* residual = (const T*)p.residual + row * D;
      T* u = (T*)p.u + row * D;
      T* held = p.row && can_stream(u) ? (T*)p.row : u;
      strips<L>(D, [&](int64_t j, int n) {
        const AccVec<T> sum = get(x + j, n) + alpha * get(residual + j, n);
        put(held + j, sum, n, false);
        if (held != u) put(u + j, sum, n, true);
      });
      x = held;
    }
    A<T> mean = 0;
    if (p.centred) mean = row_sum<T>(D, [&](int64_t j, int n) { return get(x + j, n); }) * inverse;
    A<T> square = row_sum<T>(D, [&](int64_t j, int n) {
      __builtin_prefetch(next + j);
      AccVec<T> d = keep<T>(get(x + j, n) - mean, n);
      return d * d;
    });
    const A<T> rstd = A<T>(1) / square_root(square * inverse + A<T>(p.eps));
    const bool streaming = p.streaming && can_stream(y);
    with_flag(weight != nullptr, [&](auto has_weight) {
      with_flag(bias != nullptr, [&](auto has_bias) {
        strips<L>(D, [&](int64_t j, int n) {
          AccVec<T> v = (get(x + j, n) - mean) * rstd;
          if (has_weight.value) v *= get(weight + j, n);
          if (has_bias.value) v += get(bias + j, n);
          put(y + j, v, n, streaming);
        });
      });
    });
    if (p.mean) ((A<T>*)p.mean)[row] = mean;
    if (p.rstd) ((A<T>*)p.rstd)[row] = rstd;
  }
  if (p.streaming) stream_fence();
}

// One row: its two sums as it streams in (asking for the next row meanwhile), then dx and the
// weight gradient's share from the copy in L1. Several rows at once would touch dweight less often,
// but measured slower: their streams share L1 sets when D is a power of two.
template <class T, bool kDx, bool kDirect, bool kCentred>
SOLERA_INLINE void backward_row(const RowNormBackward& p, int64_t row, A<T>* dweight, A<T>* dbias) {
  constexpr int L = kLanes<T>;
  const int64_t D = p.columns;
  const A<T>* weight = (const A<T>*)p.weight;
  const A<T> inverse = A<T>(1) / A<T>(D);
  const T* dy = (const T*)p.dy + row * D;
  const T* u = (const T*)p.u + row * D;
  const T* direct = kDirect ? (const T*)p.du + row * D : nullptr;
  T* dx = kDx ? (T*)p.dx + row * D : nullptr;
  const A<T> mean = kCentred ? ((const A<T>*)p.mean)[row] : A<T>(0);
  const A<T> rstd = ((const A<T>*)p.rstd)[row];
  const bool streaming = p.streaming && can_stream(dx);
  A<T> mean_h = 0, mean_hn = 0;
  if (kDx) {
    AccVec<T> h0{}, h1{}, n0{}, n1{};
    auto add = [&](int64_t j, int n, AccVec<T>& sum_h, AccVec<T>& sum_hn) {
      AccVec<T> h = rounded(get(dy + j, n) * get(weight + j, n));
      if (kCentred) sum_h += h;
      sum_hn += h * (get(u + j, n) - mean);
    };
    int64_t j = 0;
    for (; j + 2 * L <= D; j += 2 * L) {
      __builtin_prefetch(dy + D + j);
      __builtin_prefetch(u + D + j);
      add(j, L, h0, n0);
      add(j + L, L, h1, n1);
    }
    strips<L>(D - j, [&](int64_t k, int n) { add(j + k, n, h0, n0); });
    mean_h = lane_sum(h0 + h1) * inverse;
    mean_hn = lane_sum(n0 + n1) * rstd * inverse;
  }
  strips<L>(D, [&](int64_t j, int n) {
    const AccVec<T> g = get(dy + j, n);
    const AccVec<T> normal = (get(u + j, n) - mean) * rstd;
    if (dweight) put(dweight + j, get(dweight + j, n) + g * normal, n, false);
    if (dbias) put(dbias + j, get(dbias + j, n) + g, n, false);
    if (kDx) {
      AccVec<T> v = rounded(g * get(weight + j, n));
      if (kCentred) v -= mean_h;
      v = (v - normal * mean_hn) * rstd;
      if (kDirect) v += get(direct + j, n);
      put(dx + j, v, n, streaming);
    }
  });
}

template <class T, bool kDx, bool kDirect, bool kCentred>
void backward_chunks(const RowNormBackward& p, int64_t first_chunk, int64_t last_chunk) {
  const int64_t D = p.columns;
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    A<T>* dweight = p.dweight ? (A<T>*)p.dweight + chunk * D : nullptr;
    A<T>* dbias = p.dbias ? (A<T>*)p.dbias + chunk * D : nullptr;
    if (dweight) memset((void*)dweight, 0, size_t(D) * sizeof(A<T>));
    if (dbias) memset((void*)dbias, 0, size_t(D) * sizeof(A<T>));
    int64_t row = chunk * p.chunk_rows;
    const int64_t end = row + p.chunk_rows < p.rows ? row + p.chunk_rows : p.rows;
    for (; row < end; ++row) backward_row<T, kDx, kDirect, kCentred>(p, row, dweight, dbias);
  }
  if (p.streaming) stream_fence();
}

template <class T>
void backward(const RowNormBackward& p, int64_t first_chunk, int64_t last_chunk) {
  with_flag(p.dx != nullptr, [&](auto dx) {
    with_flag(dx.value && p.du != nullptr, [&](auto direct) {
      with_flag(p.centred, [&](auto centred) {
        constexpr bool kDx = decltype(dx)::value, kDirect = decltype(direct)::value;
        backward_chunks<T, kDx, kDx && kDirect, decltype(centred)::value>(p, first_chunk,
                                                                          last_chunk);
      });
    });
  });
}

}  // namespace

extern const RowNormTable row_norm_table;
const RowNormTable row_norm_table = {
    {forward<float>, forward<double>, forward<bf16>, forward<f16>},
    {backward<float>, backward<double>, backward<bf16>, backward<f16>},
    {sum_chunks<float>, sum_chunks<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <algorithm>
#include <cmath>

#include "../parallel.h"

namespace solera {

SOLERA_PICK(RowNormTable, row_norm_table)

namespace {

// weight or bias as a row of the accumulator type with `offset` added; no copy if it is one
// already. What does not fit is refused in a word: the public function then says which argument and
// why.
struct Row {
  const void* data = nullptr;
  std::optional<Tensor> copy;
  Row(const OptTensor& t, int64_t columns, ScalarType acc, double offset) {
    STD_TORCH_CHECK(std::isfinite(offset), "solera: weight_offset must be finite");
    if (!t.has_value()) return;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == columns &&
                        (dtype_of(*t) != kFloat64 || acc == ScalarType::Double),
                    "solera: weight or bias does not fit x");
    const bool ready = t->scalar_type() == acc && t->is_contiguous();
    if (ready && offset == 0) {
      data = t->const_data_ptr();
      return;
    }
    copy = ready ? torch::stable::clone(*t) : dense(torch::stable::to(*t, acc));
    if (offset != 0 && copy->const_data_ptr() == t->const_data_ptr())
      copy = torch::stable::clone(*copy);
    for (int64_t i = 0, n = offset == 0 ? 0 : copy->numel(); i < n; ++i) {
      if (acc == ScalarType::Double)
        static_cast<double*>(copy->mutable_data_ptr())[i] += offset;
      else
        static_cast<float*>(copy->mutable_data_ptr())[i] += float(offset);
    }
    data = copy->const_data_ptr();
  }
};

// Outputs past this size do not fit the caches beside their inputs, and are stored past them.
constexpr int64_t kStreamBytes = int64_t(16) << 20;

struct Shape {
  Sizes sizes;
  Dtype dtype;
  ScalarType acc;
  int64_t rows = 1, columns, row_bytes;
  bool streaming;
  explicit Shape(const Tensor& x) : sizes(x.sizes()), dtype(dtype_of(x)) {
    STD_TORCH_CHECK(sizes.size() > 0, "solera: x needs a dimension");
    acc = dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
    columns = sizes[sizes.size() - 1];
    row_bytes = columns * (dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2);
    for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
    streaming = rows * row_bytes >= kStreamBytes;
  }
};

void run_forward(RowNormForward& p, const Shape& shape) {
  const auto kernel = pick_row_norm_table().forward[shape.dtype];
  STD_TORCH_CHECK(p.eps >= 0 && p.eps < INFINITY, "solera: eps must be finite and not negative");
  if (shape.columns == 0) return;
  parallel_for(0, shape.rows, grain_for(shape.row_bytes), [&](int64_t begin, int64_t end) {
    RowNormForward mine = p;
    std::unique_ptr<char[]> row;
    if (p.residual && shape.streaming) {
      row.reset(new char[shape.row_bytes]);
      mine.row = row.get();
    }
    kernel(mine, begin, end);
  });
}

Tensor row_norm(const Tensor& x_in, OptTensor weight, OptTensor bias, double eps,
                double weight_offset, bool centred) {
  const Tensor x = dense(x_in);
  const Shape shape(x);
  Tensor y = empty_like(x, shape.sizes);
  const Row w(weight, shape.columns, shape.acc, weight_offset);
  const Row b(bias, shape.columns, shape.acc, 0);
  RowNormForward p{x.const_data_ptr(),
                   nullptr,
                   w.data,
                   b.data,
                   y.mutable_data_ptr(),
                   nullptr,
                   nullptr,
                   nullptr,
                   nullptr,
                   shape.columns,
                   eps,
                   0,
                   centred,
                   shape.streaming};
  run_forward(p, shape);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_norm_stats(const Tensor& x_in, OptTensor residual_in,
                                                          OptTensor weight, OptTensor bias,
                                                          double eps, double residual_scale,
                                                          double weight_offset, bool centred) {
  const Tensor x = dense(x_in);
  const Shape shape(x);
  const int64_t zero[] = {0};
  const Sizes none(zero, 1), leading(shape.sizes.data(), shape.sizes.size() - 1);
  Tensor y = empty_like(x, shape.sizes);
  Tensor u = empty_like(x, residual_in.has_value() ? shape.sizes : none);
  Tensor mean = empty_like(x, centred ? leading : none, shape.acc);
  Tensor rstd = empty_like(x, leading, shape.acc);
  const Row w(weight, shape.columns, shape.acc, weight_offset);
  const Row b(bias, shape.columns, shape.acc, 0);
  Tensor residual;
  if (residual_in.has_value()) residual = dense(*residual_in);
  RowNormForward p{x.const_data_ptr(),
                   residual_in.has_value() ? residual.const_data_ptr() : nullptr,
                   w.data,
                   b.data,
                   y.mutable_data_ptr(),
                   u.mutable_data_ptr(),
                   nullptr,
                   centred ? mean.mutable_data_ptr() : nullptr,
                   rstd.mutable_data_ptr(),
                   shape.columns,
                   eps,
                   residual_scale,
                   centred,
                   shape.streaming};
  run_forward(p, shape);
  return {y, u, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> row_norm_backward(const Tensor& dy_in, OptTensor du_in,
                                                     const Tensor& u_in, OptTensor weight,
                                                     const Tensor& mean, const Tensor& rstd,
                                                     double weight_offset, bool centred,
                                                     bool need_x, bool need_weight,
                                                     bool need_bias) {
  const Tensor dy = dense(dy_in), u = dense(u_in);
  const Shape shape(u);
  const ScalarType acc = shape.acc;
  Tensor du;
  if (du_in.has_value()) du = dense(*du_in);
  if (!weight.has_value()) {
    const int64_t width[] = {shape.columns};
    weight = empty_like(u, Sizes(width, 1), acc);
    torch::stable::fill_(*weight, 1.0);
    weight_offset = 0;
  }
  const Row w(weight, shape.columns, acc, weight_offset);
  const int64_t spread = (shape.rows + kChunks - 1) / kChunks;
  const int64_t chunk_rows = std::max(kLeastChunkRows, std::min(kChunkRows, spread));
  const int64_t chunks = (shape.rows + chunk_rows - 1) / chunk_rows;
  const int64_t zero[] = {0}, part[] = {chunks, shape.columns};
  const Sizes none(zero, 1), one(part + 1, 1), all(part, 2);
  Tensor dx = empty_like(u, need_x ? shape.sizes : none);
  Tensor dweight = empty_like(u, need_weight ? one : none, acc);
  Tensor dbias = empty_like(u, need_bias ? one : none, acc);
  Tensor dweight_part = empty_like(u, need_weight ? all : none, acc);
  Tensor dbias_part = empty_like(u, need_bias ? all : none, acc);
  RowNormBackward p{dy.const_data_ptr(),
                    du_in.has_value() ? du.const_data_ptr() : nullptr,
                    u.const_data_ptr(),
                    w.data,
                    mean.const_data_ptr(),
                    rstd.const_data_ptr(),
                    need_x ? dx.mutable_data_ptr() : nullptr,
                    need_weight ? dweight_part.mutable_data_ptr() : nullptr,
                    need_bias ? dbias_part.mutable_data_ptr() : nullptr,
                    shape.rows,
                    shape.columns,
                    chunk_rows,
                    centred,
                    shape.streaming};
  const auto& table = pick_row_norm_table();
  const auto kernel = table.backward[shape.dtype];
  if (shape.columns > 0)
    parallel_for(0, chunks, grain_for(shape.row_bytes * chunk_rows),
                 [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  const auto sum = table.sum_chunks[acc == ScalarType::Double];
  const auto finish = [&](const Tensor& part, Tensor& out) {
    parallel_for(0, shape.columns, grain_for(chunks * 4), [&](int64_t begin, int64_t end) {
      sum(part.const_data_ptr(), out.mutable_data_ptr(), chunks, shape.columns, begin, end);
    });
  };
  if (need_weight) finish(dweight_part, dweight);
  if (need_bias) finish(dbias_part, dbias);
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("row_norm", TORCH_BOX(&row_norm));
  m.impl("row_norm_stats", TORCH_BOX(&row_norm_stats));
  m.impl("row_norm_backward", TORCH_BOX(&row_norm_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
