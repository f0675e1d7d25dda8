// K tensors at each of L positions and a base, checked and laid out for kernels over w - base.
// Included only under SOLERA_FRONT.
#pragma once

#include "delta_tiles.h"
#include "weight_lists.h"

namespace solera {
namespace {

struct DeltaLists : WeightLists {
  std::vector<int64_t> elements;  // [L]

  DeltaLists(const char* op, const std::vector<Tensor>& tensors, const std::vector<Tensor>& base,
             int64_t count)
      : WeightLists(op, tensors, count, positions(op, tensors, count), base) {
    same_shapes(tensors, tensors);
    same_shapes(base, tensors);
    for (int64_t l = 0; l < length; ++l) elements.push_back(tensors[l].numel());
  }

  // True where position l is computed in double.
  bool wide(int64_t l) const { return promoted(l) == kFloat64; }

 private:
  static int64_t positions(const char* op, const std::vector<Tensor>& tensors, int64_t count) {
    STD_TORCH_CHECK(count > 0 && !tensors.empty() && int64_t(tensors.size()) % count == 0, op, ": ",
                    tensors.size(), " tensors are not ", count, " models");
    return int64_t(tensors.size()) / count;
  }
};

}  // namespace
}  // namespace solera
