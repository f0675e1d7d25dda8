// The three dots of two rows, and a linear combination of them; see
// python/solera/norm/row_dots.py. Reads two rows once; the combination writes one.
#include "../strips.h"

namespace solera {

struct RowDots {
  const void *x, *y;
  const int64_t* index;  // null: row n beside row n
  void *xx, *xy, *yy;
  int64_t columns, others;  // others: rows of y
};
struct RowCombine {
  const void *x, *y;
  const int64_t* index;
  const void *a, *b;
  void* out;  // may be x itself
  int64_t columns, others;
};

struct RowDotsTable {
  // By the dtypes of x and y; null where their accumulators differ.
  void (*dots[4][4])(const RowDots&, int64_t begin, int64_t end);
  void (*combine[4][4])(const RowCombine&, int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

// The three dots in one reading of both rows; two accumulators each hide the latency of the add.
template <class T, class U>
SOLERA_INLINE void three_dots(int64_t D, const T* x, const U* y, A<T>& xx, A<T>& xy, A<T>& yy) {
  constexpr int L = kLanes<T>;
  AccVec<T> a[2]{}, b[2]{}, c[2]{};
  const auto add = [&](int64_t j, int n, int k) {
    const AccVec<T> v = get(x + j, n), w = get(y + j, n);
    a[k] += v * v;
    b[k] += v * w;
    c[k] += w * w;
  };
  int64_t j = 0;
  for (; j + 2 * L <= D; j += 2 * L) {
    add(j, L, 0);
    add(j + L, L, 1);
  }
  if (j + L <= D) {
    add(j, L, 0);
    j += L;
  }
  if (j < D) add(j, int(D - j), 1);
  xx = lane_sum(a[0] + a[1]);
  xy = lane_sum(b[0] + b[1]);
  yy = lane_sum(c[0] + c[1]);
}

template <class T, class U>
void dots(const RowDots& p, int64_t begin, int64_t end) {
  const int64_t D = p.columns;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)p.x + row * D;
    const int64_t other = p.index ? p.index[row] : row;
    const bool beside = other >= 0 && other < p.others;
    A<T> xx, xy = 0, yy = 0;
    if (beside && (p.index || p.x != p.y)) {
      three_dots(D, x, (const U*)p.y + other * D, xx, xy, yy);
    } else {
      xx = row_sum<T>(D, [&](int64_t j, int n) {
        const AccVec<T> v = get(x + j, n);
        return v * v;
      });
      if (beside) xy = yy = xx;  // each row beside itself
      if (other >= p.others) xy = yy = A<T>(__builtin_nan(""));
    }
    ((A<T>*)p.xx)[row] = xx;
    ((A<T>*)p.xy)[row] = xy;
    ((A<T>*)p.yy)[row] = yy;
  }
}

template <class T, class U>
void combine(const RowCombine& p, int64_t begin, int64_t end) {
  const int64_t D = p.columns;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)p.x + row * D;
    T* out = (T*)p.out + row * D;
    const int64_t other = p.index ? p.index[row] : row;
    const A<T> a = ((const A<T>*)p.a)[row];
    const A<T> b = other >= p.others ? A<T>(__builtin_nan("")) : ((const A<T>*)p.b)[row];
    if (other < 0 || other >= p.others) {
      const A<T> more = other < 0 ? A<T>(0) : b;
      strips<kLanes<T>>(D, [&](int64_t j, int n) { put(out + j, a * get(x + j, n) + more, n); });
    } else {
      const U* y = (const U*)p.y + other * D;
      strips<kLanes<T>>(
          D, [&](int64_t j, int n) { put(out + j, a * get(x + j, n) + b * get(y + j, n), n); });
    }
  }
}

}  // namespace

extern const RowDotsTable row_dots_table;
const RowDotsTable row_dots_table = {
    {{dots<float, float>, nullptr, dots<float, bf16>, dots<float, f16>},
     {nullptr, dots<double, double>, nullptr, nullptr},
     {dots<bf16, float>, nullptr, dots<bf16, bf16>, dots<bf16, f16>},
     {dots<f16, float>, nullptr, dots<f16, bf16>, dots<f16, f16>}},
    {{combine<float, float>, nullptr, combine<float, bf16>, combine<float, f16>},
     {nullptr, combine<double, double>, nullptr, nullptr},
     {combine<bf16, float>, nullptr, combine<bf16, bf16>, combine<bf16, f16>},
     {combine<f16, float>, nullptr, combine<f16, bf16>, combine<f16, f16>}},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {

SOLERA_PICK(RowDotsTable, row_dots_table)

namespace {

struct RowPairs {
  Tensor x, y;
  OptTensor index;
  ScalarType acc;
  int64_t rows, columns;
  RowPairs(const Tensor& x_in, const Tensor& y_in, const OptTensor& index_in)
      : x(dense(x_in)), y(dense(y_in)), acc(accumulate_type(x_in)) {
    STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1),
                    "solera: expected rows of one width");
    STD_TORCH_CHECK(accumulate_type(y) == acc, "solera: float64 does not mix with other dtypes");
    rows = x.size(0);
    columns = x.size(1);
    if (index_in.has_value()) {
      STD_TORCH_CHECK(index_in->dim() == 1 && index_in->size(0) == rows &&
                          index_in->scalar_type() == ScalarType::Long,
                      "solera: index must be (N,) int64");
      index = dense(*index_in);
    } else {
      STD_TORCH_CHECK(y.size(0) == rows, "solera: x and y must have as many rows");
    }
  }
  const int64_t* others() const { return static_cast<const int64_t*>(data_or_null(index)); }
  int64_t grain() const { return grain_for(columns * (x.element_size() + y.element_size())); }
};

std::tuple<Tensor, Tensor, Tensor> row_dots(const Tensor& x, const Tensor& y, OptTensor index) {
  const RowPairs in(x, y, index);
  const int64_t sizes[] = {in.rows};
  const Sizes one(sizes, 1);
  Tensor xx = empty_like(in.x, one, in.acc), xy = empty_like(in.x, one, in.acc);
  Tensor yy = empty_like(in.x, one, in.acc);
  const RowDots p{in.x.const_data_ptr(), in.y.const_data_ptr(), in.others(), xx.mutable_data_ptr(),
                  xy.mutable_data_ptr(), yy.mutable_data_ptr(), in.columns,  in.y.size(0)};
  const auto kernel = pick_row_dots_table().dots[dtype_of(in.x)][dtype_of(in.y)];
  parallel_for(0, in.rows, in.grain(), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {xx, xy, yy};
}

void run_combine(const RowPairs& in, const Tensor& a_in, const Tensor& b_in, void* out) {
  const Tensor a = dense(a_in), b = dense(b_in);
  for (const Tensor* t : {&a, &b})
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == in.rows && t->scalar_type() == in.acc,
                    "solera: expected one coefficient a row, in the accumulator's dtype");
  const RowCombine p{in.x.const_data_ptr(),
                     in.y.const_data_ptr(),
                     in.others(),
                     a.const_data_ptr(),
                     b.const_data_ptr(),
                     out,
                     in.columns,
                     in.y.size(0)};
  const auto kernel = pick_row_dots_table().combine[dtype_of(in.x)][dtype_of(in.y)];
  parallel_for(0, in.rows, in.grain(), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

Tensor row_combine(const Tensor& x, const Tensor& y, OptTensor index, const Tensor& a,
                   const Tensor& b) {
  const RowPairs in(x, y, index);
  Tensor out = empty_like(in.x, in.x.sizes());
  run_combine(in, a, b, out.mutable_data_ptr());
  return out;
}

void row_combine_(const Tensor& x, const Tensor& y, OptTensor index, const Tensor& a,
                  const Tensor& b) {
  const RowPairs in(x, y, index);
  run_combine(in, a, b, in.x.mutable_data_ptr());
  if (!x.is_contiguous()) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(x.get(), in.x.get(), 0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("row_dots", TORCH_BOX(&row_dots));
  m.impl("row_combine", TORCH_BOX(&row_combine));
  m.impl("row_combine_", TORCH_BOX(&row_combine_));
}

}  // namespace solera
#endif  // SOLERA_FRONT
