// Oblivious trees: leaves, sums of the leaves' rows, and the adjoint of that sum.
//
//   leaf_k(x) = sum_d 2^d [x[f_kd] > v_kd]   S_b = sum_k V[k, leaf_bk]
//   dV[k, l] = sum of dS_b over the rows of leaf l, in the order of the batch
//
// Leaves: a vector holds one feature of as many rows as it has lanes, so a question is one compare;
// B F elements are read, 4 B K bytes written, B K D compares. Sums: B K A additions each way, the
// rows of V gathered (or scattered to) in cache, a block of trees at a time on the way back.
#include "../simd.h"
#include "../strips.h"
#include "lanes.h"

namespace solera {

struct ForestShape {
  int64_t rows, trees, depth, features, leaves, outputs;
};
struct ForestTable {
  // Rows [begin, end); `turned` holds features x lanes values.
  void (*ask)(const void* x, const int64_t* f, const void* v, int32_t* index, void* turned,
              const ForestShape&, int64_t begin, int64_t end);
  void (*sum)(const int32_t* index, const void* leaves, void* out, const ForestShape&,
              int64_t begin, int64_t end);
  // Trees [begin, end); out is in the accumulator's type.
  void (*scatter)(const int32_t* index, const void* dy, void* out, const ForestShape&,
                  int64_t begin, int64_t end);
};
struct ForestTables {
  ForestTable of[4];
};

namespace SOLERA_ISA {
namespace {

template <class T>
struct Forest {
  typedef A<T> Real;
  typedef AccVec<T> V;
  static constexpr int L = kLanes<T>;

  static void ask(const void* x, const int64_t* f, const void* v, int32_t* index, void* turned,
                  const ForestShape& n, int64_t begin, int64_t end) {
    Real* t = (Real*)turned;
    for (int64_t first = begin; first < end; first += L) {
      const int64_t count = end - first < L ? end - first : L;
      for (int64_t j = 0; j < L; ++j) {
        const T* row = (const T*)x + (first + (j < count ? j : 0)) * n.features;
        strips<L>(n.features, [&](int64_t i, int c) {
          const V values = get(row + i, c);
          for (int q = 0; q < c; ++q) t[(i + q) * L + j] = values[q];
        });
      }
      for (int64_t k = 0; k < n.trees; ++k) {
        decltype(V{} > V{}) leaf{};
        for (int64_t d = 0; d < n.depth; ++d) {
          const int64_t feature = f[k * n.depth + d];
          if (feature < 0 || feature >= n.features) continue;
          const Real threshold = ((const Real*)v)[k * n.depth + d];
          leaf -= (load(t + feature * L) > threshold) << d;
        }
        for (int64_t j = 0; j < count; ++j) index[(first + j) * n.trees + k] = int32_t(leaf[j]);
      }
    }
  }

  // One strip of columns of all the rows' sums, in a register a row.
  static void sum(const int32_t* index, const void* leaves, void* out, const ForestShape& n,
                  int64_t begin, int64_t end) {
    const int64_t O = n.outputs, step = n.leaves * O;
    for (int64_t b = begin; b < end; ++b) {
      const int32_t* at = index + b * n.trees;
      strips<L>(O, [&](int64_t o, int c) {
        const T* from = (const T*)leaves + o;
        V total{};
        for (int64_t first = 0; first < n.trees; first += 32) {  // one long chain would round more
          const int64_t last = first + 32 < n.trees ? first + 32 : n.trees;
          V part{};
          for (int64_t k = first; k < last; ++k, from += step)
            if (at[k] >= 0 && at[k] < n.leaves) part += lanes_of(from + at[k] * O, c);
          total += part;
        }
        set_lanes((T*)out + b * O + o, total, c);
      });
    }
  }

  static void scatter(const int32_t* index, const void* dy, void* out, const ForestShape& n,
                      int64_t begin, int64_t end) {
    const int64_t O = n.outputs, step = n.leaves * O;
    if (step > 0) memset((Real*)out + begin * step, 0, size_t((end - begin) * step) * sizeof(Real));
    for (int64_t b = 0; b < n.rows; ++b) {
      const int32_t* at = index + b * n.trees;
      strips<L>(O, [&](int64_t o, int c) {
        const V g = lanes_of((const T*)dy + b * O + o, c);
        for (int64_t k = begin; k < end; ++k) {
          if (at[k] < 0 || at[k] >= n.leaves) continue;
          Real* to = (Real*)out + k * step + at[k] * O + o;
          set_lanes(to, lanes_of(to, c) + g, c);
        }
      });
    }
  }
  static constexpr ForestTable table() { return {ask, sum, scatter}; }
};

}  // namespace

extern const ForestTables forest_tables;
const ForestTables forest_tables = {{
    Forest<float>::table(),
    Forest<double>::table(),
    Forest<bf16>::table(),
    Forest<f16>::table(),
}};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {

SOLERA_PICK(ForestTables, forest_tables)

namespace {

constexpr int64_t kForestTrees =
    16;  // a scatter's block: the trees whose numbers fill a cache line
constexpr int64_t kForestLanes = 16;  // at least the lanes of any vector

Tensor forest_leaves(const Tensor& x_in, const Tensor& features_in, const Tensor& thresholds_in) {
  const Tensor x = dense(x_in), features = dense(features_in);
  const Tensor thresholds = dense(torch::stable::to(thresholds_in, accumulate_type(x)));
  const ForestShape n{x.size(0), features.size(0), features.size(1), x.size(1), 0, 0};
  Tensor index = empty_like(x, {n.rows, n.trees}, ScalarType::Int);
  const auto ask = pick_forest_tables().of[dtype_of(x)].ask;
  const int64_t blocks = (n.rows + kForestLanes - 1) / kForestLanes;
  const int64_t work = kForestLanes * (n.features + n.trees * n.depth / 4 + n.trees) * 4;
  parallel_for(0, blocks, grain_for(work), [&](int64_t begin, int64_t end) {
    Tensor turned = empty_like(x, {(n.features + 1) * kForestLanes}, ScalarType::Double);
    const int64_t stop = end * kForestLanes < n.rows ? end * kForestLanes : n.rows;
    ask(x.const_data_ptr(), static_cast<const int64_t*>(features.const_data_ptr()),
        thresholds.const_data_ptr(), static_cast<int32_t*>(index.mutable_data_ptr()),
        turned.mutable_data_ptr(), n, begin * kForestLanes, stop);
  });
  return index;
}

Tensor leaf_sum(const Tensor& index_in, const Tensor& leaves_in) {
  const Tensor index = dense(index_in), leaves = dense(leaves_in);
  const ForestShape n{index.size(0), leaves.size(0), 0, 0, leaves.size(1), leaves.size(2)};
  Tensor out = empty_like(leaves, {n.rows, n.outputs});
  const auto sum = pick_forest_tables().of[dtype_of(leaves)].sum;
  parallel_for(0, n.rows, grain_for(n.trees * (n.outputs + 4) * 4),
               [&](int64_t begin, int64_t end) {
                 sum(static_cast<const int32_t*>(index.const_data_ptr()), leaves.const_data_ptr(),
                     out.mutable_data_ptr(), n, begin, end);
               });
  return out;
}

Tensor leaf_scatter(const Tensor& index_in, const Tensor& dy_in, int64_t count) {
  const Tensor index = dense(index_in), dy = dense(dy_in);
  const ForestShape n{index.size(0), index.size(1), 0, 0, count, dy.size(1)};
  Tensor out = empty_like(dy, {n.trees, count, n.outputs}, accumulate_type(dy));
  const auto scatter = pick_forest_tables().of[dtype_of(dy)].scatter;
  const int64_t blocks = (n.trees + kForestTrees - 1) / kForestTrees;
  parallel_for(0, blocks, grain_for(kForestTrees * n.rows * (n.outputs + 1) * 4),
               [&](int64_t begin, int64_t end) {
                 for (int64_t block = begin; block < end; ++block) {
                   const int64_t stop = (block + 1) * kForestTrees;
                   scatter(static_cast<const int32_t*>(index.const_data_ptr()), dy.const_data_ptr(),
                           out.mutable_data_ptr(), n, block * kForestTrees,
                           stop < n.trees ? stop : n.trees);
                 }
               });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("forest_leaves", TORCH_BOX(&forest_leaves));
  m.impl("leaf_sum", TORCH_BOX(&leaf_sum));
  m.impl("leaf_scatter", TORCH_BOX(&leaf_scatter));
}

}  // namespace solera
#endif  // SOLERA_FRONT
