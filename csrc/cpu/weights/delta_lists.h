// K tensors at each of L positions and a base, checked and laid out for kernels over w - base.
// Included only under SOLERA_FRONT.
#pragma once

#include "../parallel.h"
#include "delta_tiles.h"

namespace solera {

inline ScalarType scalar_type_of(int dtype) {
  return dtype == kFloat32    ? ScalarType::Float
         : dtype == kFloat64  ? ScalarType::Double
         : dtype == kBFloat16 ? ScalarType::BFloat16
                              : ScalarType::Half;
}

struct DeltaLists {
  int64_t models = 0, length = 0;
  bool has_base = false;
  std::vector<Tensor> owners;        // contiguous copies of what was strided
  std::vector<DeltaStream> streams;  // [L][K]
  std::vector<DeltaStream> bases;    // [L]; data is null without a base
  std::vector<int64_t> elements;     // [L]

  DeltaLists(const char* op, const std::vector<Tensor>& tensors, const std::vector<Tensor>& base,
             int64_t count)
      : models(count), has_base(!base.empty()) {
    STD_TORCH_CHECK(count > 0 && !tensors.empty() && int64_t(tensors.size()) % count == 0, op, ": ",
                    tensors.size(), " tensors are not ", count, " models");
    length = int64_t(tensors.size()) / count;
    STD_TORCH_CHECK(base.empty() || int64_t(base.size()) == length, op, ": expected ", length,
                    " base tensors, got ", base.size());
    same_shapes(op, tensors, tensors, length);
    same_shapes(op, base, tensors, length);
    streams.resize(size_t(models * length));
    for (int64_t k = 0; k < models; ++k)
      for (int64_t l = 0; l < length; ++l)
        streams[l * models + k] = stream_of(tensors[k * length + l]);
    for (int64_t l = 0; l < length; ++l) {
      bases.push_back(base.empty() ? DeltaStream{nullptr, kFloat32} : stream_of(base[l]));
      elements.push_back(tensors[l].numel());
    }
  }

  static void same_shapes(const char* op, const std::vector<Tensor>& tensors,
                          const std::vector<Tensor>& like, int64_t length) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto a = tensors[i].sizes(), b = like[i % size_t(length)].sizes();
      bool same = a.size() == b.size();
      for (size_t j = 0; same && j < a.size(); ++j) same = a[j] == b[j];
      STD_TORCH_CHECK(same, op, ": tensor ", i, " differs in shape from the first model's");
    }
  }

  // torch's promotion of what goes in at l: bfloat16 with float16 gives float32.
  int promoted(int64_t l) const {
    int dtype = streams[l * models].dtype;
    const auto join = [&](int other) {
      if (other != dtype) dtype = dtype == kFloat64 || other == kFloat64 ? kFloat64 : kFloat32;
    };
    for (int64_t k = 1; k < models; ++k) join(streams[l * models + k].dtype);
    if (has_base) join(bases[l].dtype);
    return dtype;
  }
  // True where position l is computed in double.
  bool wide(int64_t l) const { return promoted(l) == kFloat64; }

 private:
  DeltaStream stream_of(const Tensor& t) {
    const int dtype = dtype_of(t);
    if (t.is_contiguous()) return {t.const_data_ptr(), dtype};
    owners.push_back(torch::stable::contiguous(t));
    return {owners.back().const_data_ptr(), dtype};
  }
};

}  // namespace solera
