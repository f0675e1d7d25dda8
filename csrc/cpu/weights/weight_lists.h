// K lists of L tensors (and perhaps a base), model by model, checked and laid out as the kernels
// want them. Included only under SOLERA_FRONT.
#pragma once

#include "../parallel.h"
#include "tiles.h"

namespace solera {
namespace {

struct WeightLists {
  int64_t models, length;
  std::vector<Tensor> owners;                // contiguous copies of what was strided
  std::vector<WeightStream> streams, bases;  // [L][K] and [L] or none

  WeightLists(const char* op, const std::vector<Tensor>& tensors, int64_t models, int64_t length,
              const std::vector<Tensor>& base)
      : models(models), length(length), op_(op) {
    STD_TORCH_CHECK(int64_t(tensors.size()) == models * length, op, ": expected ", models * length,
                    " tensors, got ", tensors.size());
    STD_TORCH_CHECK(base.empty() || int64_t(base.size()) == length, op, ": expected ", length,
                    " base tensors, got ", base.size());
    streams.resize(size_t(models * length));
    for (int64_t k = 0; k < models; ++k)
      for (int64_t l = 0; l < length; ++l)
        streams[l * models + k] = stream_of(tensors[k * length + l]);
    bases.reserve(base.size());
    for (const Tensor& t : base) bases.push_back(stream_of(t));
  }

  // Called where the tensors are read (stand-ins for their dtypes have no shape); like begins with
  // the L tensors whose shapes count.
  void same_shapes(const std::vector<Tensor>& tensors, const std::vector<Tensor>& like) const {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto a = tensors[i].sizes(), b = like[i % size_t(length)].sizes();
      bool same = a.size() == b.size();
      for (size_t j = 0; same && j < a.size(); ++j) same = a[j] == b[j];
      STD_TORCH_CHECK(same, op_, ": tensor ", i, " differs in shape from the first model's");
    }
  }

  // torch's promotion of what goes in: bfloat16 with float16 gives float32.
  int promoted(int64_t l) const {
    int dtype = streams[l * models].dtype;
    const auto join = [&](int other) {
      if (other == dtype) return;
      dtype = dtype == kFloat64 || other == kFloat64 ? kFloat64 : kFloat32;
    };
    for (int64_t k = 1; k < models; ++k) join(streams[l * models + k].dtype);
    if (!bases.empty()) join(bases[l].dtype);
    return dtype;
  }
  // True where item l is computed in double: a float64 among what goes in or comes out.
  bool wide(int64_t l, int other) const { return other == kFloat64 || promoted(l) == kFloat64; }

  WeightStream base(int64_t l) const { return bases.empty() ? WeightStream{nullptr, 0} : bases[l]; }

 private:
  const char* op_;

  WeightStream stream_of(const Tensor& t) {
    const int dtype = dtype_of(t);
    if (t.is_contiguous()) return {t.const_data_ptr(), dtype};
    owners.push_back(torch::stable::contiguous(t));
    return {owners.back().const_data_ptr(), dtype};
  }
};

inline ScalarType scalar_type_of(int dtype) {
  return dtype == kFloat32    ? ScalarType::Float
         : dtype == kFloat64  ? ScalarType::Double
         : dtype == kBFloat16 ? ScalarType::BFloat16
                              : ScalarType::Half;
}

// Outputs past this size do not fit the caches beside their inputs, and are stored past them.
constexpr int64_t kStreamBytes = int64_t(16) << 20;

}  // namespace
}  // namespace solera
