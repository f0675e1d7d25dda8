// The arguments of the gram and model_stock ops, checked and laid out for their kernels. Included
// only under SOLERA_FRONT.
#pragma once

#include "gram_kernels.h"
#include "tensor_lists.h"
#include "weight_lists.h"

namespace solera {
namespace {

// What each thread keeps for its tiles and sums.
void* gram_scratch(int64_t models) {
  constexpr int64_t kMostLanes = 16;
  thread_local std::vector<double> held;
  const size_t wanted =
      size_t((models + 1) * (kGramTile + 1) + models * (models + 1) / 2 * kMostLanes + 8);
  if (held.size() < wanted) held.resize(wanted);
  // Vectors are loaded from cache lines of their own.
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(held.data()) + 63) / 64 * 64);
}

struct GramLists : WeightLists {
  WeightRows rows;

  GramLists(const std::vector<Tensor>& tensors, int64_t models, const std::vector<Tensor>& base,
            bool by_row)
      : WeightLists("gram", tensors, models, models > 0 ? int64_t(tensors.size()) / models : 0,
                    base),
        rows(std::vector<Tensor>(tensors.begin(), tensors.begin() + length), by_row) {
    STD_TORCH_CHECK(length > 0, "gram: expected at least one model of at least one tensor");
    const std::vector<Tensor> first(tensors.begin(), tensors.begin() + length);
    same_shapes(tensors, first);
    same_shapes(base, first);
  }
  GramItem item(int64_t l) const { return {&streams[l * models], base(l), int(models)}; }
};

// The symmetric matrix (K, K) of a row from the sums of its chunks, in order.
void sum_chunks(const double* partial, int64_t begin, int64_t end, int64_t K, double* to) {
  const int64_t total = K * (K + 1) / 2;
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      double sum = 0;
      for (int64_t c = begin; c < end; ++c) sum += partial[c * total + i * (i + 1) / 2 + j];
      to[i * K + j] = to[j * K + i] = sum;
    }
}

}  // namespace
}  // namespace solera
