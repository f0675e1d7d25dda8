// Lists of logit tensors as the kernels of logit_mixture and distillation take them. Included only
// under SOLERA_FRONT.
#pragma once

#include "../parallel.h"
#include "mixture_rows.h"

namespace solera {
namespace {

constexpr int64_t kMixtureStreamBytes = int64_t(16)
                                        << 20;  // outputs from here on leave no trace in the caches

// t (N, C) itself if its rows lie in order, else a copy.
inline Tensor with_unit_rows(const Tensor& t) {
  return t.size(1) <= 1 || t.strides()[1] == 1 ? t : torch::stable::contiguous(t);
}

// K tensors (N, C) of one dtype.
struct MixtureList {
  std::vector<Tensor> kept;
  std::vector<const void*> data;
  std::vector<int64_t> stride;
  int64_t rows, width, count;

  explicit MixtureList(const std::vector<Tensor>& given) {
    STD_TORCH_CHECK(!given.empty(), "solera: expected at least one model's logits");
    const Tensor& first = given[0];
    STD_TORCH_CHECK(first.dim() == 2, "solera: logits must be (N, C)");
    rows = first.size(0);
    width = first.size(1);
    count = int64_t(given.size());
    STD_TORCH_CHECK(width > 0, "solera: expected at least one class");
    for (const Tensor& t : given) {
      STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == width &&
                          t.scalar_type() == first.scalar_type(),
                      "solera: logits must be of one shape (N, C) and one dtype");
      kept.push_back(with_unit_rows(t));
      data.push_back(kept.back().const_data_ptr());
      stride.push_back(kept.back().strides()[0]);
    }
  }
  MixtureMembers members() const { return {data.data(), stride.data(), count}; }
  const Tensor& first() const { return kept[0]; }
  int64_t row_bytes() const { return width * kept[0].element_size(); }
};

inline Tensor mixture_checked(const Tensor& t, ScalarType dtype,
                              std::initializer_list<int64_t> sizes, const char* name) {
  bool fits = t.scalar_type() == dtype && t.dim() == int64_t(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) fits = fits && t.size(d++) == size;
  STD_TORCH_CHECK(fits, "solera: ", name, " does not fit the logits");
  return dense(t);
}

inline Tensor mixture_empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                            std::optional<ScalarType> dtype = std::nullopt) {
  return empty_like(like, Sizes(sizes.begin(), sizes.size()), dtype);
}

// Memory for a thread's own rows, in the accumulator's type.
inline std::unique_ptr<double[]> mixture_scratch(int64_t values, ScalarType acc) {
  return std::unique_ptr<double[]>(
      new double[size_t(acc == ScalarType::Double ? values : values / 2 + 1)]);
}

}  // namespace
}  // namespace solera
