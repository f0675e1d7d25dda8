// The normalised softmax of a half-precision weight, classes in blocks; formulas and the reference
// are in python/solera/norm/class_softmax.py.
//
// Both passes read the weight once. The first makes 2 B d C operations and writes 2 B C bytes: the
// cosines, as int16. The second reads those, makes 4 B d C operations and writes the weight's
// gradient, rounded once: no float32 array of the weight's size exists.
//
// Blocks are class by class, rows of x beside each other (lanes): the running maximum and sums of a
// row are lanes of a vector, and nothing is reduced across lanes. Rows are padded to a multiple of
// 32 with zeros.
//
// Products run on AMX's tiles where the processor has them, a block in cache at a time; elsewhere
// the block is widened and torch multiplies in float32.
#include "class_tiles.h"

namespace solera {

struct ClassTable {
  void (*widen)(const void* from, float* to, int64_t n);
  // products (n, lanes) of classes from `first` on, into statistics (3, lanes) and, if given,
  // cosines (n, lanes)
  void (*gather)(const ClassHead&, const float* products, int64_t first, int64_t n,
                 float* statistics, int16_t* cosines);
  void (*gradient)(const ClassHead&, const int16_t* cosines, int64_t first, int64_t n, float* out);
  // rows e of a gradient without its part along v, whose inverse length is given
  void (*project)(const float* e, int64_t step, const void* v, const float* inverse, int64_t n,
                  int64_t width, void* out);
};
// The same in terms of tiles, for bfloat16; null where the instruction set has none.
struct ClassTiles {
  void (*pack_x)(const void* x, int64_t rows, int64_t lanes, int64_t width, void* by_class,
                 void* by_row);
  void (*statistics)(const ClassHead&, const void* by_class, int64_t group, float* statistics,
                     int16_t* cosines);
  void (*block)(const ClassHead&, const int16_t* cosines, const void* by_row, int64_t first,
                int64_t begin, int64_t end, int64_t depth, void* dweight, void* turned,
                void* pairs);
  void (*rows)(const void* turned, const void* pairs, int64_t lanes, int64_t depth, int64_t begin,
               int64_t end, float* dx);
};
struct ClassTables {
  ClassTable bf16_, f16_;
  ClassTiles tiles;
  void (*clear)(float* statistics, int64_t lanes);
  void (*merge)(const float* statistics, int64_t groups, int64_t lanes, float* others, float* mean);
};

namespace SOLERA_ISA {
namespace {

#if SOLERA_TILES
constexpr ClassTiles kTiles = {pack_x, statistics_on_tiles, block_on_tiles, rows_on_tiles};
#else
constexpr ClassTiles kTiles = {};
#endif

template <class T>
constexpr ClassTable kClassTable = {widen_block<T>, gather, gradient, project<T>};

}  // namespace

extern const ClassTables class_tables;
const ClassTables class_tables = {kClassTable<bf16>, kClassTable<f16>, kTiles, clear, merge};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../tile_product.h"

namespace solera {

SOLERA_PICK(ClassTables, class_tables)

namespace {

using tile_product::Matrix;

constexpr int64_t kLanesMultiple = 32;
constexpr int64_t kRoundElements = int64_t(1) << 19;  // of each of a round's float32 buffers

struct ClassArguments {
  Tensor x, weight, class_inverse;
  std::vector<float> row_inverse, scale, others, share, label;
  std::vector<int32_t> target;
  int64_t rows, lanes, width, classes;
  const ClassTable* table;
  const ClassTiles* tiles;
  ClassHead head{};

  ClassArguments(const Tensor& x_in, const Tensor& weight_in, const Tensor& target_in,
                 const Tensor& scale_in, const Tensor& row_inverse_in,
                 const Tensor& class_inverse_in)
      : x(dense(x_in)), weight(dense(weight_in)), class_inverse(dense(class_inverse_in)) {
    const auto type = weight.scalar_type();
    STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) &&
                        x.scalar_type() == type &&
                        (type == ScalarType::BFloat16 || type == ScalarType::Half),
                    "solera: x (B, d) and weight (C, d) must be of one half-precision dtype");
    rows = x.size(0), width = x.size(1), classes = weight.size(0);
    lanes = tile_product::ceil_div(rows, kLanesMultiple) * kLanesMultiple;
    STD_TORCH_CHECK(classes < INT32_MAX, "solera: too many classes");
    STD_TORCH_CHECK(class_inverse.dim() == 1 && class_inverse.size(0) == classes &&
                        class_inverse.scalar_type() == ScalarType::Float,
                    "solera: expected a float32 inverse length for each class");
    STD_TORCH_CHECK(target_in.dim() == 1 && target_in.size(0) == rows &&
                        target_in.scalar_type() == ScalarType::Long,
                    "solera: target must be (B,) int64");
    const Tensor labels = dense(target_in);
    const int64_t* y = static_cast<const int64_t*>(labels.const_data_ptr());
    target.assign(size_t(lanes), -1);
    for (int64_t i = 0; i < rows; ++i)
      target[size_t(i)] = y[i] >= 0 && y[i] < classes ? int32_t(y[i]) : -1;
    scale = padded(scale_in);
    row_inverse = padded(row_inverse_in);
    const auto& tables = pick_class_tables();
    table = type == ScalarType::Half ? &tables.f16_ : &tables.bf16_;
    const bool on_tiles = type == ScalarType::BFloat16 && tables.tiles.pack_x && amx_granted();
    tiles = on_tiles ? &tables.tiles : nullptr;
    head = {weight.const_data_ptr(),
            row_inverse.data(),
            scale.data(),
            static_cast<const float*>(class_inverse.const_data_ptr()),
            target.data(),
            nullptr,
            nullptr,
            nullptr,
            lanes,
            width,
            classes};
  }
  std::vector<float> padded(const Tensor& t) const {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == rows && t.scalar_type() == ScalarType::Float,
                    "solera: expected one float32 value a row");
    const Tensor from = dense(t);
    std::vector<float> to(size_t(lanes), 0.0f);
    if (rows > 0) std::memcpy(to.data(), from.const_data_ptr(), size_t(rows) * sizeof(float));
    return to;
  }
  const char* weight_at(int64_t k) const {
    return static_cast<const char*>(weight.const_data_ptr()) + k * width * 2;
  }
  // Classes of a round: a multiple of a group.
  int64_t round() const {
    const int64_t most = kRoundElements / std::max<int64_t>(1, std::max(lanes, width));
    return std::max<int64_t>(1, most / kClassGroup) * kClassGroup;
  }
  // x in float32, its padding zero.
  std::vector<float> wide_x() const {
    std::vector<float> to(size_t(lanes * width), 0.0f);
    table->widen(x.const_data_ptr(), to.data(), rows * width);
    return to;
  }
  void widen_weight(int64_t first, int64_t n, float* to) const {
    parallel_for(0, n, grain_for(width * 4), [&](int64_t begin, int64_t end) {
      table->widen(weight_at(first + begin), to + begin * width, (end - begin) * width);
    });
  }
};

std::unique_ptr<float[]> floats(int64_t n) {
  return std::unique_ptr<float[]>(new float[size_t(n)]);
}
std::unique_ptr<uint16_t[]> halves(int64_t n) {
  return std::unique_ptr<uint16_t[]>(new uint16_t[size_t(n)]);
}

std::tuple<Tensor, Tensor, Tensor> class_statistics(const Tensor& x, const Tensor& weight,
                                                    const Tensor& target, const Tensor& scale,
                                                    const Tensor& row_inverse,
                                                    const Tensor& class_inverse, bool keep) {
  const ClassArguments in(x, weight, target, scale, row_inverse, class_inverse);
  const int64_t groups = tile_product::ceil_div(in.classes, kClassGroup), lanes = in.lanes;
  const int64_t kept[] = {keep ? in.classes : 0, lanes}, one[] = {in.rows};
  Tensor cosines = empty_like(in.x, Sizes(kept, 2), ScalarType::Short);
  int16_t* to = keep ? static_cast<int16_t*>(cosines.mutable_data_ptr()) : nullptr;
  const auto partial = floats(groups * 3 * lanes);
  if (in.tiles) {
    const int64_t wide = tile_product::ceil_div(in.width, 32) * 32;
    const auto by_class = halves(lanes * wide);
    in.tiles->pack_x(in.x.const_data_ptr(), in.rows, lanes, in.width, by_class.get(), nullptr);
    parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g)
        in.tiles->statistics(in.head, by_class.get(), g, partial.get() + g * 3 * lanes, to);
    });
  } else {
    const int64_t round = std::min(in.round(), groups * kClassGroup);
    const std::vector<float> wide = in.wide_x();
    const auto block = floats(round * in.width), products = floats(round * lanes);
    for (int64_t first = 0; first < in.classes; first += round) {
      const int64_t n = std::min(round, in.classes - first);
      in.widen_weight(first, n, block.get());
      tile_product::multiply(products.get(), lanes, Matrix{block.get(), n, in.width, in.width, 1},
                             Matrix{wide.data(), in.width, lanes, 1, in.width}, ScalarType::Float,
                             false);
      const int64_t here = tile_product::ceil_div(n, kClassGroup);
      parallel_for(0, here, 1, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) {
          const int64_t at = g * kClassGroup, c = first + at;
          float* statistics = partial.get() + c / kClassGroup * 3 * lanes;
          pick_class_tables().clear(statistics, lanes);
          in.table->gather(in.head, products.get() + at * lanes, c, std::min(kClassGroup, n - at),
                           statistics, to ? to + c * lanes : nullptr);
        }
      });
    }
  }
  std::vector<float> others(static_cast<size_t>(lanes)), means(static_cast<size_t>(lanes));
  pick_class_tables().merge(partial.get(), groups, lanes, others.data(), means.data());
  Tensor a = empty_like(in.x, Sizes(one, 1), ScalarType::Float);
  Tensor b = empty_like(in.x, Sizes(one, 1), ScalarType::Float);
  const Tensor labels = dense(target);
  const int64_t* y = static_cast<const int64_t*>(labels.const_data_ptr());
  for (int64_t i = 0; i < in.rows; ++i) {
    static_cast<float*>(a.mutable_data_ptr())[i] = y[i] < 0 ? 0.0f : others[size_t(i)];
    static_cast<float*>(b.mutable_data_ptr())[i] = y[i] < 0 ? 1.0f : means[size_t(i)];
  }
  return {a, b, cosines};
}

std::tuple<Tensor, Tensor> class_gradient(const Tensor& x, const Tensor& weight,
                                          const Tensor& target, const Tensor& cosines_in,
                                          const Tensor& scale, const Tensor& row_inverse,
                                          const Tensor& class_inverse, const Tensor& others,
                                          const Tensor& share, const Tensor& label, bool need_x,
                                          bool need_weight) {
  ClassArguments in(x, weight, target, scale, row_inverse, class_inverse);
  in.others = in.padded(others), in.share = in.padded(share), in.label = in.padded(label);
  in.head.others = in.others.data(), in.head.share = in.share.data();
  in.head.label = in.label.data();
  const int64_t lanes = in.lanes, width = in.width;
  const Tensor cosines = dense(cosines_in);
  STD_TORCH_CHECK(cosines.dim() == 2 && cosines.size(0) == in.classes && cosines.size(1) == lanes &&
                      cosines.scalar_type() == ScalarType::Short,
                  "solera: cosines must be int16, a row for each class");
  const int16_t* kept = static_cast<const int16_t*>(cosines.const_data_ptr());
  const int64_t shape_x[] = {in.rows, width}, shape_w[] = {in.classes, width}, none[] = {0};
  Tensor dx = empty_like(in.x, need_x ? Sizes(shape_x, 2) : Sizes(none, 1));
  Tensor dweight = empty_like(in.weight, need_weight ? Sizes(shape_w, 2) : Sizes(none, 1));
  char* to = need_weight ? static_cast<char*>(dweight.mutable_data_ptr()) : nullptr;
  const int64_t round = std::min(in.round(), tile_product::ceil_div(in.classes, 32) * 32);
  const int64_t wide = tile_product::ceil_div(width, 32) * 32;
  std::unique_ptr<float[]> sum;
  if (need_x) {
    const int64_t size = (in.tiles ? wide : width) * lanes;
    sum = floats(size);
    std::memset(sum.get(), 0, size_t(size) * sizeof(float));
  }
  if (in.tiles) {
    const auto by_class = halves(lanes * wide), by_row = halves(lanes * wide);
    in.tiles->pack_x(in.x.const_data_ptr(), in.rows, lanes, width, by_class.get(), by_row.get());
    const auto turned = halves(need_x ? round * wide : 0), pairs = halves(round * lanes);
    for (int64_t first = 0; first < in.classes; first += round) {
      const int64_t n = std::min(round, in.classes - first);
      const int64_t depth = tile_product::ceil_div(n, 32);
      parallel_for(0, tile_product::ceil_div(n, kClassBlock), 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
          in.tiles->block(in.head, kept, by_row.get(), first, first + b * kClassBlock,
                          first + std::min(n, (b + 1) * kClassBlock), depth, to,
                          need_x ? turned.get() : nullptr, pairs.get());
      });
      if (!need_x) continue;
      parallel_for(0, wide / 32, 1, [&](int64_t begin, int64_t end) {
        in.tiles->rows(turned.get(), pairs.get(), lanes, depth, 2 * begin, 2 * end, sum.get());
      });
    }
    if (need_x) {
      const auto turned_sum = std::move(sum);
      sum = floats(lanes * width);
      parallel_for(0, in.rows, grain_for(width * 8), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
          for (int64_t d = 0; d < width; ++d) sum[b * width + d] = turned_sum[d * lanes + b];
      });
    }
  } else {
    const std::vector<float> wide_x = in.wide_x();
    const auto block = floats(need_x ? round * width : 0), g = floats(round * lanes);
    const auto e = floats(need_weight ? round * width : 0);
    for (int64_t first = 0; first < in.classes; first += round) {
      const int64_t n = std::min(round, in.classes - first);
      parallel_for(0, n, grain_for(lanes * 4), [&](int64_t begin, int64_t end) {
        in.table->gradient(in.head, kept + (first + begin) * lanes, first + begin, end - begin,
                           g.get() + begin * lanes);
      });
      if (need_x) {
        in.widen_weight(first, n, block.get());
        tile_product::multiply(sum.get(), width, Matrix{g.get(), lanes, n, 1, lanes},
                               Matrix{block.get(), n, width, width, 1}, ScalarType::Float, true);
      }
      if (!need_weight) continue;
      tile_product::multiply(e.get(), width, Matrix{g.get(), n, lanes, lanes, 1},
                             Matrix{wide_x.data(), lanes, width, width, 1}, ScalarType::Float,
                             false);
      parallel_for(0, n, grain_for(width * 8), [&](int64_t begin, int64_t end) {
        in.table->project(e.get() + begin * width, width, in.weight_at(first + begin),
                          in.head.class_inverse + first + begin, end - begin, width,
                          to + (first + begin) * width * 2);
      });
    }
  }
  if (need_x)
    in.table->project(sum.get(), width, in.x.const_data_ptr(), in.head.row_inverse, in.rows, width,
                      dx.mutable_data_ptr());
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("class_statistics", TORCH_BOX(&class_statistics));
  m.impl("class_gradient", TORCH_BOX(&class_gradient));
}

}  // namespace solera
#endif  // SOLERA_FRONT
