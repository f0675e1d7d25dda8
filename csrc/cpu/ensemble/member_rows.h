// Rows of member logits as the kernels take them (python/solera/ensemble/_logits.py has the same on
// its floor).
#pragma once

#include "logit_rows.h"

namespace solera {

// Row n of member k begins n * stride[k] elements after at[k].
struct MemberRows {
  const void* const* at;
  const int64_t* stride;
  int64_t members, width;
};

namespace SOLERA_ISA {
namespace {

template <class T>
SOLERA_INLINE const T* member_row(const MemberRows& rows, int64_t n, int64_t k) {
  return (const T*)rows.at[k] + n * rows.stride[k];
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {
namespace {

// The op's list of logits, one (N, K, C) or K times (N, C), as MemberRows: a tensor whose last
// stride is not 1 is copied.
class MemberTensors {
 public:
  int64_t rows, members, width;
  bool list;  // K times (N, C)

  explicit MemberTensors(const std::vector<Tensor>& logits) {
    STD_TORCH_CHECK(!logits.empty(), "solera: expected member logits, got none");
    list = logits[0].dim() != 3;
    STD_TORCH_CHECK(list || logits.size() == 1,
                    "solera: member logits are one (N, K, C) or K times (N, C)");
    const Tensor& x = logits[0];
    STD_TORCH_CHECK(x.dim() == (list ? 2 : 3),
                    "solera: member logits are one (N, K, C) or K times (N, C)");
    rows = x.size(0);
    members = list ? int64_t(logits.size()) : x.size(1);
    width = x.size(list ? 1 : 2);
    kept_.reserve(logits.size());
    for (const Tensor& t : logits) {
      STD_TORCH_CHECK(t.dim() == x.dim() && t.size(0) == rows && t.size(x.dim() - 1) == width &&
                          t.scalar_type() == x.scalar_type(),
                      "solera: member logits must share their shape and dtype");
      kept_.push_back(t.stride(t.dim() - 1) == 1 || width <= 1 ? t : torch::stable::contiguous(t));
    }
    at_.resize(size_t(members));
    stride_.resize(size_t(members));
    for (int64_t k = 0; k < members; ++k) {
      const Tensor& t = kept_[list ? size_t(k) : 0];
      const char* base = static_cast<const char*>(t.const_data_ptr());
      at_[size_t(k)] = list ? base : base + k * t.stride(1) * t.element_size();
      stride_[size_t(k)] = t.stride(0);
    }
  }
  const Tensor& first() const { return kept_[0]; }
  MemberRows view() const { return {at_.data(), stride_.data(), members, width}; }
  int64_t bytes() const { return rows * members * width * first().element_size(); }

  // A new tensor of the logits' size: (N, K, C), or (K, N, C) to a list.
  Tensor like() const {
    const int64_t sizes[] = {list ? members : rows, list ? rows : members, width};
    return empty_like(first(), Sizes(sizes, 3));
  }
  // Elements from one row and from one member of such a tensor to the next.
  int64_t row_step() const { return list ? width : members * width; }
  int64_t member_step() const { return list ? rows * width : width; }

 private:
  std::vector<Tensor> kept_;
  std::vector<const void*> at_;
  std::vector<int64_t> stride_;
};

}  // namespace
}  // namespace solera
#endif  // SOLERA_FRONT
