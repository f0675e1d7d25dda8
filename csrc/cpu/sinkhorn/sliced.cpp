// Sliced Wasserstein distance: projections of both clouds on L directions, sorted, compared.
//
// A task is a tile of kTile directions of one batch item: its projections are two products of
// (kTile x d)(d x n), its sorts and comparisons stay in L1/L2. Kept for backward: the permutations,
// 4 (n + m) L bytes an item. Backward repeats the projections, puts the slopes in their unsorted
// places, D_a (L x n) and D_b (L x m), and is four more products: dx = D_a^T theta,
// dy = D_b^T theta, dtheta = D_a x + D_b y.
//
// Work, n = m: 4 n d L multiply-adds forward, 12 n d L backward; 2 L sorts of n words, some 4
// passes each. Tiles are a matter of the shape, and dx, dy are added over an item's tiles in order:
// same bits for any number of threads.
#include "sliced_sort.h"

namespace solera {

struct SlicedTable {
  void (*sort)(const void*, int64_t, int32_t*, void*, void*);
  double (*compare)(const SlicedPair&);
  void (*backward)(const SlicedPair&, double, void*, void*);
  int64_t key_bytes;
};
struct SlicedTables {
  SlicedTable float32, float64;
};

namespace SOLERA_ISA {

extern const SlicedTables sliced_tables;
const SlicedTables sliced_tables = {
    {sort_rows<float>, compare_sorted<float>, backward_pair<float>, sizeof(Key<float>)},
    {sort_rows<double>, compare_sorted<double>, backward_pair<double>, sizeof(Key<double>)},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <algorithm>

#include "../tile_product.h"
#include "../parallel.h"

namespace solera {

SOLERA_PICK(SlicedTables, sliced_tables)

namespace {

using tile_product::Matrix;
using tile_product::multiply;

constexpr int64_t kTile = 16;  // directions

// The inputs of a call and where their parts are.
struct SlicedCall {
  Tensor x, y, theta;
  ScalarType type;
  int64_t batch, n, m, d, directions, tiles, size;
  bool shared;  // one set of directions for the whole batch

  SlicedCall(const Tensor& x_in, const Tensor& y_in, const Tensor& theta_in)
      : x(dense(x_in)), y(dense(y_in)), theta(dense(theta_in)), type(x.scalar_type()) {
    batch = x.size(0);
    n = x.size(1);
    m = y.size(1);
    d = x.size(2);
    shared = theta.size(0) == 1 && batch != 1;
    directions = theta.size(1);
    tiles = (directions + kTile - 1) / kTile;
    size = x.element_size();
  }
  static const char* at(const Tensor& t, int64_t elements) {
    return static_cast<const char*>(t.const_data_ptr()) + elements * t.element_size();
  }
  static char* at(Tensor& t, int64_t elements) {
    return static_cast<char*>(t.mutable_data_ptr()) + elements * t.element_size();
  }
  Matrix points(const Tensor& t, int64_t item, int64_t count) const {
    return {at(t, item * count * d), count, d, d, 1};
  }
  Matrix direction_rows(int64_t item, int64_t first, int64_t count) const {
    return {at(theta, ((shared ? 0 : item) * directions + first) * d), count, d, d, 1};
  }
  const SlicedTable& table() const {
    return type == ScalarType::Double ? pick_sliced_tables().float64 : pick_sliced_tables().float32;
  }
  // Projections of a cloud on the tile's directions, (count, points).
  void project(char* out, const Tensor& cloud, int64_t item, int64_t points_, int64_t first,
               int64_t count) const {
    multiply(out, points_, direction_rows(item, first, count),
             points(cloud, item, points_).transposed(), type, false);
  }
};

std::tuple<Tensor, Tensor, Tensor> sliced_forward(const Tensor& x, const Tensor& y,
                                                  const Tensor& theta, double p) {
  const SlicedCall c(x, y, theta);
  const SlicedTable& table = c.table();
  Tensor value = empty_like(c.x, {c.batch, c.directions});
  Tensor order_x = empty_like(c.x, {c.batch, c.directions, c.n}, ScalarType::Int);
  Tensor order_y = empty_like(c.x, {c.batch, c.directions, c.m}, ScalarType::Int);
  const int64_t most = std::max(c.n, c.m);
  parallel_for(0, c.batch * c.tiles, 1, [&](int64_t begin, int64_t end) {
    // Projections of a tile of both clouds, one sorted row of both, keys.
    const int64_t cells = (kTile + 1) * (c.n + c.m) + 2 * most * table.key_bytes / c.size + 8;
    Tensor memory = empty_like(c.x, {cells});
    char* a = SlicedCall::at(memory, 0);
    char* b = a + kTile * c.n * c.size;
    char* sorted_a = b + kTile * c.m * c.size;
    char* sorted_b = sorted_a + c.n * c.size;
    char* keys = sorted_b + c.m * c.size;
    keys += (16 - uintptr_t(keys) % 16) % 16;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t item = task / c.tiles, first = task % c.tiles * kTile;
      const int64_t count = std::min(kTile, c.directions - first);
      c.project(a, c.x, item, c.n, first, count);
      c.project(b, c.y, item, c.m, first, count);
      for (int64_t l = 0; l < count; ++l) {
        const int64_t row = item * c.directions + first + l;
        int32_t* pa = static_cast<int32_t*>(order_x.mutable_data_ptr()) + row * c.n;
        int32_t* pb = static_cast<int32_t*>(order_y.mutable_data_ptr()) + row * c.m;
        table.sort(a + l * c.n * c.size, c.n, pa, sorted_a, keys);
        table.sort(b + l * c.m * c.size, c.m, pb, sorted_b, keys);
        const double distance = table.compare({sorted_a, sorted_b, pa, pb, c.n, c.m, p});
        if (c.type == ScalarType::Double)
          static_cast<double*>(value.mutable_data_ptr())[row] = distance;
        else
          static_cast<float*>(value.mutable_data_ptr())[row] = float(distance);
      }
    }
  });
  return {value, order_x, order_y};
}

std::tuple<Tensor, Tensor, Tensor> sliced_backward(const Tensor& grad_in, const Tensor& x,
                                                   const Tensor& y, const Tensor& theta,
                                                   const Tensor& order_x_in,
                                                   const Tensor& order_y_in, double p) {
  const SlicedCall c(x, y, theta);
  const SlicedTable& table = c.table();
  const Tensor grad = dense(grad_in), order_x = dense(order_x_in), order_y = dense(order_y_in);
  Tensor dx = empty_like(c.x, {c.batch, c.n, c.d}), dy = empty_like(c.x, {c.batch, c.m, c.d});
  Tensor dtheta = empty_like(c.x, {c.batch, c.directions, c.d});
  parallel_for(0, c.batch, 1, [&](int64_t begin, int64_t end) {
    Tensor memory = empty_like(c.x, {2 * kTile * (c.n + c.m) + 1});
    char* a = SlicedCall::at(memory, 0);
    char* b = a + kTile * c.n * c.size;
    char* da = b + kTile * c.m * c.size;
    char* db = da + kTile * c.n * c.size;
    for (int64_t item = begin; item < end; ++item) {
      for (int64_t first = 0; first < c.directions; first += kTile) {
        const int64_t count = std::min(kTile, c.directions - first);
        c.project(a, c.x, item, c.n, first, count);
        c.project(b, c.y, item, c.m, first, count);
        for (int64_t l = 0; l < count; ++l) {
          const int64_t row = item * c.directions + first + l;
          const double g = c.type == ScalarType::Double
                               ? static_cast<const double*>(grad.const_data_ptr())[row]
                               : double(static_cast<const float*>(grad.const_data_ptr())[row]);
          int32_t* pa = const_cast<int32_t*>(static_cast<const int32_t*>(order_x.const_data_ptr()) +
                                             row * c.n);
          int32_t* pb = const_cast<int32_t*>(static_cast<const int32_t*>(order_y.const_data_ptr()) +
                                             row * c.m);
          table.backward({a + l * c.n * c.size, b + l * c.m * c.size, pa, pb, c.n, c.m, p}, g,
                         da + l * c.n * c.size, db + l * c.m * c.size);
        }
        const Matrix rows = c.direction_rows(item, first, count);
        const Matrix slopes_a{da, count, c.n, c.n, 1}, slopes_b{db, count, c.m, c.m, 1};
        char* to = SlicedCall::at(dtheta, (item * c.directions + first) * c.d);
        multiply(to, c.d, slopes_a, c.points(c.x, item, c.n), c.type, false);
        multiply(to, c.d, slopes_b, c.points(c.y, item, c.m), c.type, true);
        multiply(SlicedCall::at(dx, item * c.n * c.d), c.d, slopes_a.transposed(), rows, c.type,
                 first > 0);
        multiply(SlicedCall::at(dy, item * c.m * c.d), c.d, slopes_b.transposed(), rows, c.type,
                 first > 0);
      }
    }
  });
  return {dx, dy, dtheta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("sliced_forward", TORCH_BOX(&sliced_forward));
  m.impl("sliced_backward", TORCH_BOX(&sliced_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
