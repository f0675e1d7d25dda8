// What the ops of reparam and of the linear layers over it share on torch's side. Included only
// under SOLERA_FRONT, after reparam.h.
#pragma once
#include <algorithm>

#include "../parallel.h"

namespace solera {

namespace generic {
extern const ReparamTable reparam_table;
}
SOLERA_PICK(ReparamTable, reparam_table)

namespace {

inline OptTensor dense_or_none(const OptTensor& t) {
  return t.has_value() ? OptTensor(dense(*t)) : t;
}

// A gradient to be written, or nothing of the same type.
inline Tensor gradient_like(const Tensor& t, bool needed) {
  return needed ? empty_like(t, t.sizes()) : empty_like(t, std::vector<int64_t>{0});
}

inline void same_shape(const char* name, const OptTensor& t, const Tensor& like) {
  if (!t.has_value()) return;
  const auto a = t->sizes(), b = like.sizes();
  bool same = a.size() == b.size() && dtype_of(*t) == dtype_of(like);
  for (size_t i = 0; same && i < a.size(); ++i) same = a[i] == b[i];
  STD_TORCH_CHECK(same, name, " differs from the weight in shape or dtype");
}

inline uint64_t seed_of(const Tensor& seed) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long,
                  "seed: expected one int64 number");
  return uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

inline ReparamItem threshold_item(double threshold) {
  ReparamItem item{};
  item.kind = kMaskedWeight;
  item.number = threshold;
  return item;
}

// Seed, key and probability; the words of a column mask are those of the first row's elements.
struct MixoutMask {
  ReparamItem item{};
  std::vector<uint32_t> words;  // moved, never copied: item points into it

  MixoutMask() = default;
  MixoutMask(const Tensor& weight, const Tensor& seed, double p, int64_t key, bool column) {
    item.kind = column && weight.dim() > 1 ? kMixoutColumn : kMixout;
    item.seed = seed_of(seed);
    item.key = uint32_t(key);
    item.bound = uint64_t(__builtin_nearbyint((1 - p) * 4294967296.0));
    item.number = p < 1 ? 1 / (1 - p) : 0;
    if (item.kind != kMixoutColumn) return;
    item.columns = weight.sizes()[0] > 0 ? weight.numel() / weight.sizes()[0] : 0;
    words.resize(size_t(item.columns));
    if (item.columns > 0)
      pick_reparam_table().words(item.seed, item.key, 0, item.columns, words.data());
    item.words = words.data();
  }
};

}  // namespace
}  // namespace solera
