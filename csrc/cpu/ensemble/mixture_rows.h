// K models' logits as the cores logit_mixture and distillation read them.
#pragma once
#include "logit_rows.h"

namespace solera {

// K tensors (N, C), unit stride along C.
struct MixtureMembers {
  const void* const* data;
  const int64_t* stride;  // between rows, in elements
  int64_t count;
};

namespace SOLERA_ISA {
namespace {

template <class T>
SOLERA_INLINE const T* member_row(const MixtureMembers& z, int64_t m, int64_t row) {
  return (const T*)z.data[m] + row * z.stride[m];
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
