// y = x W^T + b where W is a frozen weight with the entries `index` replaced by `value`, and
// gradients to x and to those entries alone.
//
// The dense W is made a tile at a time (a copy of the frozen one, the entries of the tile put in)
// on its way into the product. dvalue_i = <dy[:, r_i], x[:, c_i]> is taken at the entries only, of
// the transposed operands, in blocks of rows whose part of x fits the cache beside a core: 2 B
// operations an entry instead of a product of the weight's size and its dense result.
#include "reparam.h"

namespace solera {

struct SparseDeltaTable {
  // Elements [begin, end) of the weight, in the accumulator's type, with the sorted entries put in.
  typedef void (*Fill)(const void* weight, const int64_t* index, int64_t entries, const void* value,
                       int64_t begin, int64_t end, void* tile);
  Fill fill[4];
  // For float and double: out[i] (+)= sum over rows [first, last) of dy[r_i, .] x[c_i, .].
  void (*dots[2])(const void* dy, const void* x, int64_t rows, int64_t first, int64_t last,
                  const int64_t* index, int64_t columns, int64_t begin, int64_t end, void* out);
};

namespace SOLERA_ISA {
namespace {

template <class T>
void sparse_fill(const void* weight_in, const int64_t* index, int64_t entries, const void* value_in,
                 int64_t begin, int64_t end, void* tile_in) {
  typedef typename Acc<T>::type S;
  const T* weight = (const T*)weight_in + begin;
  S* tile = (S*)tile_in;
  strips<kLanes<T>>(end - begin, [&](int64_t j, int m) { put(tile + j, get(weight + j, m), m); });
  int64_t low = 0, high = entries;  // the first entry at or past `begin`
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (index[middle] < begin)
      low = middle + 1;
    else
      high = middle;
  }
  const S* value = (const S*)value_in;
  for (; low < entries && index[low] < end; ++low) tile[index[low] - begin] = value[low];
}

template <class S>
void sparse_dots(const void* dy_in, const void* x_in, int64_t rows, int64_t first, int64_t last,
                 const int64_t* index, int64_t columns, int64_t begin, int64_t end, void* out_in) {
  S* out = (S*)out_in;
  int64_t row = 0, start = 0, stop = 0;  // the entries of `row` lie in [start, stop)
  for (int64_t i = begin; i < end; ++i) {
    const int64_t e = index[i];
    if (e >= stop || e < start) {
      row = e / columns;
      start = row * columns;
      stop = start + columns;
    }
    const S* dy = (const S*)dy_in + row * rows + first;
    const S* x = (const S*)x_in + (e - start) * rows + first;
    const S sum =
        row_sum<S>(last - first, [&](int64_t j, int m) { return get(dy + j, m) * get(x + j, m); });
    out[i] = first == 0 ? sum : out[i] + sum;
  }
}

}  // namespace

extern const SparseDeltaTable sparse_delta_table;
const SparseDeltaTable sparse_delta_table = {
    {sparse_fill<float>, sparse_fill<double>, sparse_fill<bf16>, sparse_fill<f16>},
    {sparse_dots<float>, sparse_dots<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "reparam_front.h"
#include "tile_linear.h"

namespace solera {

SOLERA_PICK(SparseDeltaTable, sparse_delta_table)

namespace {

constexpr int64_t kSparseEntries = 65536;  // a task of dots

struct SparseWeight {
  Tensor weight, index, value;
  const TileLinear linear;
  int64_t columns, size;
  SparseDeltaTable::Fill fill;

  SparseWeight(const Tensor& x, const Tensor& weight_in, const Tensor& index_in,
               const Tensor& value_in)
      : weight(dense(weight_in)),
        index(dense(index_in)),
        value(tile_product::widened(value_in, accumulate_type(weight_in))),
        linear(x, weight_in, 1),
        columns(weight_in.sizes()[1]),
        size(linear.type() == ScalarType::Double ? 8 : 4),
        fill(pick_sparse_delta_table().fill[dtype_of(weight_in)]) {
    STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.numel() == value.numel(),
                    "sparse_delta_linear: index holds one int64 number for each value");
  }

  void operator()(const WeightTile& t, void* tile) const {
    const auto piece = [&](int64_t begin, int64_t end, int64_t at) {
      fill(weight.const_data_ptr(), static_cast<const int64_t*>(index.const_data_ptr()),
           index.numel(), value.const_data_ptr(), begin, end, static_cast<char*>(tile) + at * size);
    };
    if (t.columns == columns) return piece(t.row * columns, (t.row + t.rows) * columns, 0);
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t first = (t.row + r) * columns + t.column;
      piece(first, first + t.columns, r * t.columns);
    }
  }
};

Tensor sparse_delta_linear(const Tensor& x, const Tensor& weight, const Tensor& index,
                           const Tensor& value, const OptTensor& bias) {
  const SparseWeight w(x, weight, index, value);
  return w.linear.forward(x, bias, w);
}

// The dots in the dtype of value.
Tensor entry_dots(const SparseWeight& w, const Tensor& dy, const Tensor& x, const Tensor& value) {
  const int64_t entries = w.index.numel();
  Tensor out = empty_like(dy, std::vector<int64_t>{entries}, w.linear.type());
  const auto turned = [&](const Tensor& t, int64_t width) {
    return torch::stable::contiguous(torch::stable::transpose(w.linear.padded(t, width), 0, 1));
  };
  const Tensor dy_t = turned(dy, w.weight.sizes()[0]), x_t = turned(x, w.columns);
  const int64_t rows = dy_t.sizes()[1];
  // A block of x within 1 MiB.
  const int64_t block = std::clamp<int64_t>(
      (1 << 20) / (w.size * std::max<int64_t>(w.columns, 1)) / 16 * 16, 64, 4096);
  const auto run = pick_sparse_delta_table().dots[w.linear.type() == ScalarType::Double];
  void* data = out.mutable_data_ptr();
  if (rows == 0 && entries > 0) std::memset(data, 0, size_t(entries * w.size));
  parallel_for(0, tile_product::ceil_div(entries, kSparseEntries), 1, [&](int64_t a, int64_t b) {
    for (int64_t task = a; task < b; ++task)
      for (int64_t first = 0; first < rows; first += block)
        run(dy_t.const_data_ptr(), x_t.const_data_ptr(), rows, first, std::min(rows, first + block),
            static_cast<const int64_t*>(w.index.const_data_ptr()), w.columns, task * kSparseEntries,
            std::min(entries, (task + 1) * kSparseEntries), data);
  });
  return value.scalar_type() == w.linear.type() ? out : torch::stable::to(out, value.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> sparse_delta_linear_backward(const Tensor& dy, const Tensor& x,
                                                                const Tensor& weight,
                                                                const Tensor& index,
                                                                const Tensor& value, bool need_x,
                                                                bool need_value, bool need_bias) {
  const SparseWeight w(x, weight, index, value);
  Tensor dx = gradient_like(x, false);
  if (need_x)
    dx = w.linear.backward(dy, x, true, false,
                           [&](const WeightTile& t, void* tile, const void*) { w(t, tile); });
  Tensor dvalue = need_value ? entry_dots(w, dy, x, value) : gradient_like(value, false);
  return {dx, dvalue, w.linear.column_sums(dy, need_bias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("sparse_delta_linear", TORCH_BOX(&sparse_delta_linear));
  m.impl("sparse_delta_linear_backward", TORCH_BOX(&sparse_delta_linear_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
