// y = x W~^T + b with W~ made of W and a second tensor on its way into the product (the kinds of
// reparam.h), and its gradients. Nothing of the weight's size is kept or written but the gradients
// that are asked for: W~ exists a tile at a time.
//
// Traffic, in weights: forward reads W and U (2), backward reads them again for dx and writes dW
// (3; dU one more); the loops of a composition move 15. Floor: that traffic and three products.
#include "reparam.h"

#ifdef SOLERA_FRONT
#include "reparam_front.h"
#include "tile_linear.h"

namespace solera {

namespace {

// The item of a call: kind 0 and 1 are mixout of elements and columns (number is p), 2 the mask.
struct LinearItem {
  MixoutMask mask;
  Tensor weight;
  OptTensor other;
  ReparamItem item;

  LinearItem(const Tensor& weight_in, const OptTensor& other_in, const OptTensor& seed,
             int64_t kind, double number, int64_t key)
      : mask(seed.has_value() ? MixoutMask(weight_in, *seed, number, key, kind == kMixoutColumn)
                              : MixoutMask()),
        weight(dense(weight_in)),
        other(dense_or_none(other_in)),
        item(kind == kMaskedWeight ? threshold_item(number) : mask.item) {
    STD_TORCH_CHECK(kind == kMaskedWeight ? other_in.has_value() : seed.has_value(),
                    "reparam_linear: a mask needs a score, mixout a seed");
    same_shape("reparam_linear: other", other_in, weight_in);
    item.weight = weight.const_data_ptr();
    item.other = data_or_null(other);
  }

  // Elements of a tile: one range if it is whole rows, else one a row.
  template <class F>
  void ranges(const WeightTile& t, const F& body) const {
    const int64_t in = weight.sizes()[1];
    if (t.columns == in) return body(t.row * in, (t.row + t.rows) * in, 0);
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t first = (t.row + r) * in + t.column;
      body(first, first + t.columns, r * t.columns);
    }
  }
};

Tensor reparam_linear(const Tensor& x, const Tensor& weight, const OptTensor& other,
                      const OptTensor& bias, const OptTensor& seed, int64_t kind, double number,
                      int64_t key) {
  const LinearItem call(weight, other, seed, kind, number, key);
  const TileLinear linear(x, weight, kMaskChunkElements);
  const auto run = pick_reparam_table().tile[dtype_of(weight)];
  const int64_t size = linear.type() == ScalarType::Double ? 8 : 4;
  return linear.forward(x, bias, [&](const WeightTile& t, void* tile) {
    call.ranges(t, [&](int64_t begin, int64_t end, int64_t at) {
      run(call.item, begin, end, static_cast<char*>(tile) + at * size, nullptr);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> reparam_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const OptTensor& other,
    const OptTensor& seed, int64_t kind, double number, int64_t key, bool need_x, bool need_weight,
    bool need_other, bool need_bias) {
  LinearItem call(weight, other, seed, kind, number, key);
  const TileLinear linear(x, weight, kMaskChunkElements);
  Tensor dweight = gradient_like(weight, need_weight), dother = gradient_like(weight, need_other);
  call.item.dweight = need_weight ? dweight.mutable_data_ptr() : nullptr;
  call.item.dother = need_other ? dother.mutable_data_ptr() : nullptr;
  call.item.streaming = (need_weight || need_other) &&
                        weight.numel() * int64_t(weight.element_size()) >= int64_t(16) << 20;
  const auto run = pick_reparam_table().tile[dtype_of(weight)];
  const int64_t size = linear.type() == ScalarType::Double ? 8 : 4;
  Tensor dx = linear.backward(dy, x, need_x, need_weight || need_other,
                              [&](const WeightTile& t, void* tile, const void* grad) {
                                call.ranges(t, [&](int64_t begin, int64_t end, int64_t at) {
                                  run(call.item, begin, end,
                                      tile ? static_cast<char*>(tile) + at * size : nullptr,
                                      grad ? static_cast<const char*>(grad) + at * size : nullptr);
                                });
                              });
  return {dx, dweight, dother, linear.column_sums(dy, need_bias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("reparam_linear", TORCH_BOX(&reparam_linear));
  m.impl("reparam_linear_backward", TORCH_BOX(&reparam_linear_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
