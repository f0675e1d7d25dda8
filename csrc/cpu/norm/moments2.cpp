// Means and second moments of segments of rows, chosen dot products, masked pooling.
//
//   mean_c = mean of x_n over the segment      squares_c = sum (x_n - mean_c)^2
//   scatter_c = sum (x_n - mean_c)(x_n - mean_c)^T     about a given mean
//   dots_bk = <x_b,i , x_b,j>                  pool_b = sum over layers and kept tokens / their
//   number
//
// Bytes: moments read x twice (a segment's column strip, the second time from cache while it fits);
// scatter reads x once, centring it into a tile in L2, and does D (D + 192) N operations, half of
// the full product's; dots read two rows a pair; pool reads the kept tokens once.
//
// Tasks and tiles do not depend on the thread count, and every sum has one order.
#include "../strips.h"

namespace solera {

struct SegmentRows {
  const void* x;
  const int64_t* order;  // may be null: rows as they lie
  int64_t columns;
};
struct PairRow {  // one row's gradient: sum over its entries of grad[entry] * x[other]
  const void *x, *grad;
  const int64_t *entry, *other;
  int64_t count, columns;
  void* out;
};
struct PoolItem {
  const void* h;
  const uint8_t* mask;
  void *sum, *out;  // sum: columns of A
  int64_t layers, layer_step, tokens, columns;
};

struct Moments2Table {
  void (*moments[4])(const SegmentRows&, int64_t first, int64_t last, int64_t begin, int64_t end,
                     void* mean, void* squares);
  void (*centre[4])(const SegmentRows&, int64_t first, int64_t count, const void* mean, void* tile);
  double (*dot[4])(const void* a, const void* b, int64_t n);
  void (*pair_row[4])(const PairRow&);
  void (*pool[4])(const PoolItem&);
};

namespace SOLERA_ISA {
namespace {

template <class T>
SOLERA_INLINE const T* row_at(const SegmentRows& p, int64_t n) {
  return (const T*)p.x + (p.order ? p.order[n] : n) * p.columns;
}

// Sum over rows [first, last) of term(row) in three levels of 32, so that rounding does not grow
// with their number.
template <class V, class F>
SOLERA_INLINE V row_total(int64_t first, int64_t last, const F& term) {
  V whole{};
  for (int64_t a = first; a < last; a += 1024) {
    V middle{};
    const int64_t stop = a + 1024 < last ? a + 1024 : last;
    for (int64_t b = a; b < stop; b += 32) {
      V sum{};
      const int64_t end = b + 32 < stop ? b + 32 : stop;
      for (int64_t n = b; n < end; ++n) sum += term(n);
      middle += sum;
    }
    whole += middle;
  }
  return whole;
}

// Columns [begin, end) of one segment.
template <class T>
void moments(const SegmentRows& p, int64_t first, int64_t last, int64_t begin, int64_t end,
             void* mean, void* squares) {
  typedef AccVec<T> V;
  const A<T> inverse = last > first ? A<T>(1) / A<T>(last - first) : A<T>(0);
  strips<kLanes<T>>(end - begin, [&](int64_t i, int c) {
    const int64_t j = begin + i;
    const V m =
        inverse * row_total<V>(first, last, [&](int64_t n) { return get(row_at<T>(p, n) + j, c); });
    const V s = row_total<V>(first, last, [&](int64_t n) {
      const V d = get(row_at<T>(p, n) + j, c) - m;
      return d * d;
    });
    put((A<T>*)mean + j, m, c);
    put((A<T>*)squares + j, s, c);
  });
}

template <class T>
void centre(const SegmentRows& p, int64_t first, int64_t count, const void* mean, void* tile) {
  const A<T>* m = (const A<T>*)mean;
  for (int64_t n = 0; n < count; ++n) {
    const T* row = row_at<T>(p, first + n);
    A<T>* out = (A<T>*)tile + n * p.columns;
    strips<kLanes<T>>(p.columns,
                      [&](int64_t j, int c) { put(out + j, get(row + j, c) - get(m + j, c), c); });
  }
}

template <class T>
double dot(const void* a, const void* b, int64_t n) {
  return row_sum<T>(
      n, [&](int64_t j, int c) { return get((const T*)a + j, c) * get((const T*)b + j, c); });
}

template <class T>
void pair_row(const PairRow& p) {
  const A<T>* grad = (const A<T>*)p.grad;
  strips<kLanes<T>>(p.columns, [&](int64_t j, int c) {
    AccVec<T> sum{};
    for (int64_t e = 0; e < p.count; ++e)
      sum += grad[p.entry[e]] * get((const T*)p.x + p.other[e] * p.columns + j, c);
    put((T*)p.out + j, sum, c);
  });
}

// Adds up to four rows to the running sum, so that it is touched once for four.
template <class T>
SOLERA_INLINE void add_rows(const T* const* rows, int count, A<T>* sum, int64_t columns) {
  strips<kLanes<T>>(columns, [&](int64_t j, int c) {
    AccVec<T> s = get(rows[0] + j, c);
    for (int r = 1; r < count; ++r) s += get(rows[r] + j, c);
    put(sum + j, get(sum + j, c) + s, c);
  });
}
template <class T>
void pool(const PoolItem& p) {
  A<T>* sum = (A<T>*)p.sum;
  memset((void*)sum, 0, size_t(p.columns) * sizeof(A<T>));
  const T* rows[4];
  int waiting = 0;
  int64_t kept = 0;
  for (int64_t s = 0; s < p.layers; ++s)
    for (int64_t t = 0; t < p.tokens; ++t) {
      if (!p.mask[t]) continue;
      ++kept;
      rows[waiting++] = (const T*)p.h + s * p.layer_step + t * p.columns;
      if (waiting == 4) add_rows<T>(rows, 4, sum, p.columns), waiting = 0;
    }
  if (waiting) add_rows<T>(rows, waiting, sum, p.columns);
  const A<T> count = A<T>(kept ? kept : 1);
  strips<kLanes<T>>(p.columns,
                    [&](int64_t j, int c) { put((T*)p.out + j, get(sum + j, c) / count, c); });
}

}  // namespace

extern const Moments2Table moments2_table;
const Moments2Table moments2_table = {
    {moments<float>, moments<double>, moments<bf16>, moments<f16>},
    {centre<float>, centre<double>, centre<bf16>, centre<f16>},
    {dot<float>, dot<double>, dot<bf16>, dot<f16>},
    {pair_row<float>, pair_row<double>, pair_row<bf16>, pair_row<f16>},
    {pool<float>, pool<double>, pool<bf16>, pool<f16>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <algorithm>

#include "../tile_product.h"

namespace solera {

SOLERA_PICK(Moments2Table, moments2_table)

namespace {

using tile_product::at;
using tile_product::ceil_div;
using tile_product::widened;

constexpr int64_t kStrip = 64;  // columns of one task of the moments
constexpr int64_t kScatterRows = 512, kScatterColumns = 192, kScatterGroup = 8;
constexpr int64_t kByClass =
    8;  // from so many segments on a task is a segment, else a tile of D x D

// The rows of x by segment, checked: no row outside x is ever read.
struct Segments {
  Tensor x, order, offsets;
  const int64_t* edge;
  int64_t classes, columns;
  SegmentRows rows;
  Segments(const Tensor& x_in, const OptTensor& order_in, const Tensor& offsets_in)
      : x(dense(x_in)), offsets(dense(offsets_in)) {
    STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.numel() > 0,
                    "solera: offsets must be int64 and not empty");
    edge = static_cast<const int64_t*>(offsets.const_data_ptr());
    classes = offsets.numel() - 1;
    columns = x.size(1);
    rows = {x.const_data_ptr(), nullptr, columns};
    int64_t most = x.size(0);
    if (order_in.has_value()) {
      order = dense(*order_in);
      STD_TORCH_CHECK(order.scalar_type() == ScalarType::Long, "solera: order must be int64");
      rows.order = static_cast<const int64_t*>(order.const_data_ptr());
      most = order.numel();
      for (int64_t n = 0; n < most; ++n)
        STD_TORCH_CHECK(rows.order[n] >= 0 && rows.order[n] < x.size(0),
                        "solera: order out of range");
    }
    STD_TORCH_CHECK(edge[0] >= 0 && edge[classes] <= most, "solera: offsets out of range");
    for (int64_t c = 0; c < classes; ++c)
      STD_TORCH_CHECK(edge[c] <= edge[c + 1], "solera: offsets must not fall");
  }
};

std::tuple<Tensor, Tensor> segment_moments(const Tensor& x_in, OptTensor order,
                                           const Tensor& offsets) {
  const Segments s(x_in, order, offsets);
  const ScalarType real = accumulate_type(s.x);
  Tensor mean = empty_like(s.x, {s.classes, s.columns}, real);
  Tensor squares = empty_like(s.x, {s.classes, s.columns}, real);
  const int64_t strips = ceil_div(s.columns, kStrip);
  const auto kernel = pick_moments2_table().moments[dtype_of(s.x)];
  const int64_t bytes = s.x.numel() * s.x.element_size();
  const int64_t tasks = s.classes * strips;
  parallel_for(0, tasks, grain_for(tasks ? bytes / tasks : 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t c = t / strips, first = t % strips * kStrip;
      kernel(s.rows, s.edge[c], s.edge[c + 1], first, std::min(first + kStrip, s.columns),
             at(mean, c * s.columns), at(squares, c * s.columns));
    }
  });
  return {mean, squares};
}

// The tiles on and above the diagonal of D x D.
struct Corners {
  std::vector<std::pair<int64_t, int64_t>> tiles;
  explicit Corners(int64_t columns) {
    for (int64_t i = 0; i < columns; i += kScatterColumns)
      for (int64_t j = i; j < columns; j += kScatterColumns) tiles.emplace_back(i, j);
  }
};

// out += part, blocks of rows x columns of matrices `step` wide.
void add_block(void* out, const void* part, int64_t rows, int64_t columns, int64_t step,
               ScalarType type) {
  const auto add = [&](auto* to, const auto* from) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) to[i * step + j] += from[i * step + j];
  };
  if (type == ScalarType::Double)
    add(static_cast<double*>(out), static_cast<const double*>(part));
  else
    add(static_cast<float*>(out), static_cast<const float*>(part));
}

Tensor segment_scatter(const Tensor& x_in, OptTensor order, const Tensor& offsets,
                       const Tensor& mean_in) {
  const Segments s(x_in, order, offsets);
  const ScalarType real = accumulate_type(s.x);
  const Tensor mean = widened(mean_in, real);
  STD_TORCH_CHECK(mean.numel() == s.classes * s.columns, "solera: mean must be (classes, columns)");
  const int64_t D = s.columns;
  Tensor out = empty_like(s.x, {s.classes, D, D}, real);
  torch::stable::fill_(out, 0.0);
  const Corners corners(D);
  const auto centre = pick_moments2_table().centre[dtype_of(s.x)];
  const auto block = [&](void* tile, int64_t rows, int64_t first) -> tile_product::Matrix {
    const int64_t size = out.element_size();
    return {static_cast<char*>(tile) + first * size, rows, std::min(kScatterColumns, D - first), D,
            1};
  };
  // Tile after tile goes into `part`, which every kScatterGroup tiles goes into out: one long chain
  // of additions would round more than the product itself.
  const auto multiply = [&](void* tile, int64_t rows, int64_t c, Tensor& part, size_t n, bool opens,
                            bool closes) {
    const auto [i, j] = corners.tiles[n];
    const auto right = block(tile, rows, j);
    void* sum = at(part, i * D + j);
    tile_product::multiply(sum, D, block(tile, rows, i).transposed(), right, real, !opens);
    if (closes)
      add_block(at(out, (c * D + i) * D + j), sum, std::min(kScatterColumns, D - i), right.columns,
                D, real);
  };
  const int64_t pairs = int64_t(corners.tiles.size());
  const auto walk = [&](int64_t c, void* tile, Tensor& part, bool inside) {
    const int64_t first = s.edge[c], last = s.edge[c + 1];
    for (int64_t n = first; n < last; n += kScatterRows) {
      const int64_t rows = std::min(kScatterRows, last - n);
      const int64_t place = (n - first) / kScatterRows % kScatterGroup;
      const bool closes = place == kScatterGroup - 1 || n + rows == last;
      const auto fill = [&](int64_t begin, int64_t end) {
        centre(s.rows, n + begin, end - begin, at(mean, c * D),
               static_cast<char*>(tile) + begin * D * out.element_size());
      };
      const auto products = [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p)
          multiply(tile, rows, c, part, size_t(p), place == 0, closes);
      };
      if (inside) {
        fill(0, rows);
        products(0, pairs);
      } else {
        parallel_for(0, rows, grain_for(D * out.element_size()), fill);
        parallel_for(0, pairs, 1, products);
      }
    }
  };
  const auto scratch = [&](int64_t rows) { return empty_like(out, {rows * D}); };
  if (s.classes >= kByClass) {
    parallel_for(0, s.classes, 1, [&](int64_t begin, int64_t end) {
      Tensor tile = scratch(kScatterRows), part = scratch(D);
      for (int64_t c = begin; c < end; ++c) walk(c, tile.mutable_data_ptr(), part, true);
    });
  } else {
    Tensor tile = scratch(kScatterRows), part = scratch(D);
    for (int64_t c = 0; c < s.classes; ++c) walk(c, tile.mutable_data_ptr(), part, false);
  }
  // Inside the tiles on the diagonal too: a library's product of a matrix with its own transpose
  // need not be symmetric to the last bit.
  const auto mirror = [&](auto zero) {
    using T = decltype(zero);
    T* data = static_cast<T*>(out.mutable_data_ptr());
    parallel_for(0, s.classes * D, grain_for(D * 8), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* matrix = data + r / D * D * D;
        const int64_t i = r % D;
        for (int64_t j = 0; j < i; ++j) matrix[i * D + j] = matrix[j * D + i];
      }
    });
  };
  if (real == ScalarType::Double)
    mirror(double(0));
  else
    mirror(float(0));
  return out;
}

Tensor pairs_of(const Tensor& pairs_in, int64_t channels) {
  const Tensor pairs = dense(pairs_in);
  STD_TORCH_CHECK(pairs.scalar_type() == ScalarType::Long && pairs.dim() == 2 && pairs.size(1) == 2,
                  "solera: pairs must be int64 of shape (K, 2)");
  const int64_t* p = static_cast<const int64_t*>(pairs.const_data_ptr());
  for (int64_t n = 0; n < pairs.numel(); ++n)
    STD_TORCH_CHECK(p[n] >= 0 && p[n] < channels, "solera: pairs out of range");
  return pairs;
}

Tensor pair_dots(const Tensor& x_in, const Tensor& pairs_in) {
  const Tensor x = dense(x_in), pairs = pairs_of(pairs_in, x.size(1));
  const int64_t channels = x.size(1), length = x.size(2), count = pairs.size(0);
  const int64_t* p = static_cast<const int64_t*>(pairs.const_data_ptr());
  const ScalarType real = accumulate_type(x);
  Tensor out = empty_like(x, {x.size(0), count}, real);
  const auto kernel = pick_moments2_table().dot[dtype_of(x)];
  parallel_for(0, x.size(0) * count, grain_for(2 * length * x.element_size()),
               [&](int64_t begin, int64_t end) {
                 for (int64_t n = begin; n < end; ++n) {
                   const int64_t base = n / count * channels, *pair = p + n % count * 2;
                   const double value = kernel(at(x, (base + pair[0]) * length),
                                               at(x, (base + pair[1]) * length), length);
                   if (real == ScalarType::Double)
                     static_cast<double*>(out.mutable_data_ptr())[n] = value;
                   else
                     static_cast<float*>(out.mutable_data_ptr())[n] = float(value);
                 }
               });
  return out;
}

Tensor pair_dots_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& pairs_in) {
  const Tensor x = dense(x_in), pairs = pairs_of(pairs_in, x.size(1));
  const Tensor grad = widened(grad_in, accumulate_type(x));
  const int64_t channels = x.size(1), length = x.size(2), count = pairs.size(0);
  const int64_t* p = static_cast<const int64_t*>(pairs.const_data_ptr());
  // By channel, the pairs it is in (in their order, a pair with itself twice) and its partner
  // there.
  std::vector<int64_t> start(size_t(channels + 1), 0), entry(size_t(2 * count)), other(entry);
  for (int64_t n = 0; n < 2 * count; ++n) ++start[p[n] + 1];
  for (int64_t c = 0; c < channels; ++c) start[c + 1] += start[c];
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t n = 0; n < 2 * count; ++n) {
    const int64_t to = next[p[n]]++;
    entry[to] = n / 2;
    other[to] = p[n ^ 1];
  }
  Tensor out = empty_like(x, x.sizes());
  const auto kernel = pick_moments2_table().pair_row[dtype_of(x)];
  parallel_for(
      0, x.size(0) * channels, grain_for(2 * length * x.element_size()),
      [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          const int64_t b = n / channels, c = n % channels;
          kernel({at(x, b * channels * length), at(grad, b * count), entry.data() + start[c],
                  other.data() + start[c], start[c + 1] - start[c], length, at(out, n * length)});
        }
      });
  return out;
}

Tensor pool_layers(const Tensor& h_in, const Tensor& mask_in) {
  const Tensor h = dense(h_in), mask = dense(mask_in);
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "solera: mask must be bool");
  const int64_t layers = h.size(0), batch = h.size(1), tokens = h.size(2), columns = h.size(3);
  Tensor out = empty_like(h, {batch, columns});
  const auto kernel = pick_moments2_table().pool[dtype_of(h)];
  parallel_for(
      0, batch, grain_for(layers * tokens * columns * h.element_size()),
      [&](int64_t begin, int64_t end) {
        Tensor sum = empty_like(h, {columns}, accumulate_type(h));
        for (int64_t b = begin; b < end; ++b)
          kernel({at(h, b * tokens * columns), static_cast<const uint8_t*>(at(mask, b * tokens)),
                  sum.mutable_data_ptr(), at(out, b * columns), layers, batch * tokens * columns,
                  tokens, columns});
      });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("segment_moments", TORCH_BOX(&segment_moments));
  m.impl("segment_scatter", TORCH_BOX(&segment_scatter));
  m.impl("pair_dots", TORCH_BOX(&pair_dots));
  m.impl("pair_dots_backward", TORCH_BOX(&pair_dots_backward));
  m.impl("pool_layers", TORCH_BOX(&pool_layers));
}

}  // namespace solera
#endif  // SOLERA_FRONT
