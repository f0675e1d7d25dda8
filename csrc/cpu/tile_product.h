// Products on tiles, single-threaded inside a parallel region: torch's C shims on plain pointers.
// Included only under SOLERA_FRONT.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "parallel.h"

namespace solera {
namespace tile_product {

struct Matrix {
  const void* data;
  int64_t rows, columns, row_step, column_step;
  Matrix transposed() const { return {data, columns, rows, column_step, row_step}; }
};

class Handle {
 public:
  Handle(const Matrix& m, int32_t dtype) {
    const int64_t sizes[2] = {m.rows, m.columns}, strides[2] = {m.row_step, m.column_step};
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_create_tensor_from_blob(const_cast<void*>(m.data), 2, sizes, strides, 0, dtype,
                                           aoti_torch_device_type_cpu(), 0, &handle_));
  }
  ~Handle() { aoti_torch_delete_tensor_object(handle_); }
  Handle(const Handle&) = delete;
  AtenTensorHandle get() const { return handle_; }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// out = a b, or out += a b. `type` is float32 or float64, of all three.
inline void multiply(void* out, int64_t out_step, const Matrix& a, const Matrix& b, ScalarType type,
                     bool add) {
  if (a.rows == 0 || b.columns == 0) return;
  const int64_t size = type == ScalarType::Double ? 8 : 4;
  if (a.columns == 0) {
    for (int64_t i = 0; !add && i < a.rows; ++i)
      std::memset(static_cast<char*>(out) + i * out_step * size, 0, size_t(b.columns * size));
    return;
  }
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const Handle c({out, a.rows, b.columns, out_step, 1}, code);
  // Longer sums than this MKL cuts where it likes, otherwise in a parallel region than outside one.
  const int64_t most = type == ScalarType::Double ? 256 : 512;
  for (int64_t k = 0; k < a.columns; k += most) {
    const int64_t n = std::min(most, a.columns - k);
    const auto from = [&](const Matrix& m, int64_t step) {
      return static_cast<const char*>(m.data) + k * step * size;
    };
    const Handle l({from(a, a.column_step), a.rows, n, a.row_step, a.column_step}, code),
        r({from(b, b.row_step), n, b.columns, b.row_step, b.column_step}, code);
    const auto status = add || k > 0
                            ? aoti_torch_cpu_addmm_out(c.get(), c.get(), l.get(), r.get(), 1, 1)
                            : aoti_torch_cpu_mm_out(c.get(), l.get(), r.get());
    STABLE_TORCH_ERROR_CODE_CHECK(status);
  }
}

// t, dense, in the type it is accumulated in (t itself where it is that already).
inline Tensor widened(const Tensor& t, ScalarType type) {
  return dense(t.scalar_type() == type ? t : torch::stable::to(t, type));
}
inline const void* at(const Tensor& t, int64_t n) {
  return static_cast<const char*>(t.const_data_ptr()) + n * t.element_size();
}
inline void* at(Tensor& t, int64_t n) {
  return static_cast<char*>(t.mutable_data_ptr()) + n * t.element_size();
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace tile_product
}  // namespace solera
