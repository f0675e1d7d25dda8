// The arguments of the lincomb ops, checked and laid out for its kernels. Included once, by
// lincomb.cpp, below its structs.
#pragma once

#include "../parallel.h"

namespace solera {
namespace {

// The arguments as the kernels want them: pointers, codes and coefficients of each of L items.
// Wrong shapes are caught here, once for every caller.
struct LincombLists {
  int64_t models = 0, length = 0;
  std::vector<Tensor> owners;                 // contiguous copies of what was strided
  std::vector<LincombStream> streams, bases;  // [L][K] and [L] or none
  std::vector<float> coefficients;            // [K], or [L][K]
  std::vector<double> coefficients_double;
  bool shared = true;

  LincombLists(const std::vector<Tensor>& tensors, const Tensor& c, const std::vector<Tensor>& base,
               const std::vector<Tensor>& like)
      : models(c.size(0)), length(int64_t(like.size())), shared(c.dim() == 1) {
    STD_TORCH_CHECK(int64_t(tensors.size()) == models * length, "lincomb: expected ",
                    models * length, " tensors, got ", tensors.size());
    STD_TORCH_CHECK(shared || c.size(1) == length, "lincomb: expected ", length,
                    " columns of coefficients, got ", c.size(1));
    STD_TORCH_CHECK(base.empty() || int64_t(base.size()) == length, "lincomb: expected ", length,
                    " base tensors, got ", base.size());
    streams.resize(size_t(models * length));
    for (int64_t k = 0; k < models; ++k)
      for (int64_t l = 0; l < length; ++l)
        streams[l * models + k] = stream_of(tensors[k * length + l]);
    bases.reserve(base.size());
    for (const Tensor& t : base) bases.push_back(stream_of(t));
    read_coefficients(c);
  }

  // Called where the tensors are read (stand-ins for their dtypes have no shape).
  static void same_shapes(const std::vector<Tensor>& tensors, const std::vector<Tensor>& like) {
    const size_t length = like.size();
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto a = tensors[i].sizes(), b = like[i % length].sizes();
      bool same = a.size() == b.size();
      for (size_t j = 0; same && j < a.size(); ++j) same = a[j] == b[j];
      STD_TORCH_CHECK(same, "lincomb: tensor ", i, " differs in shape from the first model's");
    }
  }

  LincombItem item(int64_t l) const {
    const int64_t at = shared ? 0 : l * models;
    return {&streams[l * models], &coefficients[at], &coefficients_double[at],
            bases.empty() ? LincombStream{nullptr, 0} : bases[l], int(models)};
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

 private:
  LincombStream stream_of(const Tensor& t) {
    const int dtype = dtype_of(t);
    if (t.is_contiguous()) return {t.const_data_ptr(), dtype};
    owners.push_back(torch::stable::contiguous(t));
    return {owners.back().const_data_ptr(), dtype};
  }
  void read_coefficients(const Tensor& given) {
    const Tensor c = dense(given);
    const int dtype = dtype_of(c);
    const void* data = c.const_data_ptr();
    const auto read = [&](int64_t i) -> double {
      switch (dtype) {
        case kFloat32:
          return static_cast<const float*>(data)[i];
        case kFloat64:
          return static_cast<const double*>(data)[i];
        case kBFloat16:
          return generic::widen_one(static_cast<const bf16*>(data)[i]);
        default:
          return generic::widen_one(static_cast<const f16*>(data)[i]);
      }
    };
    const int64_t columns = shared ? 1 : length;
    coefficients.resize(size_t(models * columns));
    coefficients_double.resize(coefficients.size());
    for (int64_t k = 0; k < models; ++k)
      for (int64_t l = 0; l < columns; ++l) {
        const double value = read(k * columns + l);
        coefficients_double[l * models + k] = value;
        coefficients[l * models + k] = float(value);
      }
  }
};

}  // namespace
}  // namespace solera
