// Lists of tensors as the gradient kernels take them: memory in order, pieces of even size for the
// threads. Included only under SOLERA_FRONT.
#pragma once

#include "../parallel.h"

namespace solera {
namespace {

// True if the dimensions from `first` on fill a stretch of memory without gaps, in any order.
inline bool packed(const Tensor& t, int64_t first) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1, left = 0;
  for (size_t i = size_t(first); i < sizes.size(); ++i) left += sizes[i] > 1;
  for (; left > 0; --left) {
    bool found = false;
    for (size_t i = size_t(first); i < sizes.size() && !found; ++i)
      if (sizes[i] > 1 && strides[i] == expected) expected *= sizes[i], found = true;
    if (!found) return false;
  }
  return true;
}

// A tensor's memory, or a contiguous copy's, which goes back into the tensor afterwards.
struct GradMemory {
  void* data = nullptr;
  int dtype = 0;
  std::optional<Tensor> copy;

  GradMemory(const Tensor& t, bool usable, bool written) : dtype(dtype_of(t)) {
    if (usable) {
      data = written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
    } else {
      copy = torch::stable::contiguous(t);
      data = copy->mutable_data_ptr();
    }
  }
  void put_back(const Tensor& t) const {
    if (copy.has_value()) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(t.get(), copy->get(), 0));
  }
};

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  bool same = x.size() == y.size();
  for (size_t i = 0; same && i < x.size(); ++i) same = x[i] == y[i];
  return same;
}

// Rows of each tensor in pieces of about 16384 elements: where they begin does not depend on the
// thread count or on the other tensors.
struct GradPiece {
  size_t item;
  int64_t begin, end;  // rows
};
class GradPieces {
 public:
  void add(size_t item, int64_t rows, int64_t columns) {
    const int64_t step = columns >= 16384 ? 1 : 16384 / (columns > 0 ? columns : 1);
    for (int64_t at = 0; at < rows && columns > 0; at += step)
      pieces_.push_back({item, at, at + step < rows ? at + step : rows});
    elements_ += rows * columns;
  }
  const std::vector<GradPiece>& all() const { return pieces_; }

  // body(piece, its index); bytes is what an element costs.
  template <class F>
  void parallel(int64_t bytes, const F& body) const {
    if (pieces_.empty()) return;
    const int64_t mean = elements_ * bytes / int64_t(pieces_.size());
    parallel_for(0, int64_t(pieces_.size()), 1 + 65536 / (mean + 1),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) body(pieces_[size_t(i)], size_t(i));
                 });
  }

 private:
  std::vector<GradPiece> pieces_;
  int64_t elements_ = 0;
};

// The numbers of a small float32 or float64 tensor.
inline std::vector<double> grad_numbers(const Tensor& given, int64_t count) {
  STD_TORCH_CHECK(given.numel() == count, "solera: expected ", count, " numbers, got ",
                  given.numel());
  const Tensor t = dense(given);
  const int dtype = dtype_of(t);
  STD_TORCH_CHECK(dtype == kFloat32 || dtype == kFloat64, "solera: expected float32 or float64");
  std::vector<double> out(static_cast<size_t>(count));
  const void* data = t.const_data_ptr();
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = dtype == kFloat64 ? static_cast<const double*>(data)[i]
                               : double(static_cast<const float*>(data)[i]);
  return out;
}

inline bool any_double(const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors)
    if (dtype_of(t) == kFloat64) return true;
  return false;
}

// An (L,) result, float32 or float64, of these numbers.
inline Tensor grad_result(const std::vector<double>& values, const Tensor& like, bool wide) {
  const int64_t size[] = {int64_t(values.size())};
  Tensor out = empty_like(like, Sizes(size, 1), wide ? ScalarType::Double : ScalarType::Float);
  void* data = out.mutable_data_ptr();
  for (size_t i = 0; i < values.size(); ++i) {
    if (wide)
      static_cast<double*>(data)[i] = values[i];
    else
      static_cast<float*>(data)[i] = float(values[i]);
  }
  return out;
}

}  // namespace
}  // namespace solera
