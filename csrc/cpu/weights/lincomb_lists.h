// The arguments of the lincomb and row_lincomb ops, checked and laid out for their kernels.
// Included only under SOLERA_FRONT.
#pragma once

#include "lincomb_kernels.h"
#include "weight_lists.h"

namespace solera {
namespace {

// Coefficients (K,) for all, or (K, columns): a column for each tensor, or for each row of each.
struct LincombLists : WeightLists {
  std::vector<float> coefficients;  // [K], or [columns][K]
  std::vector<double> coefficients_double;
  bool shared;

  LincombLists(const char* op, const std::vector<Tensor>& tensors, const Tensor& c,
               const std::vector<Tensor>& base, int64_t length, int64_t columns)
      : WeightLists(op, tensors, c.size(0), length, base), shared(c.dim() == 1) {
    STD_TORCH_CHECK(shared || c.size(1) == columns, op, ": expected ", columns,
                    " columns of coefficients, got ", c.size(1));
    read_coefficients(c, shared ? 1 : columns);
  }

  LincombItem item(int64_t l, int64_t column) const {
    const int64_t at = shared ? 0 : column * models;
    return {&streams[l * models], &coefficients[at], &coefficients_double[at], base(l),
            int(models)};
  }

 private:
  void read_coefficients(const Tensor& given, int64_t columns) {
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
