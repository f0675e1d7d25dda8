// What the torch-facing half of a kernel file needs: threads, dtypes, tensors, the choice of
// instruction set. Included only at a file's foot, under SOLERA_FRONT.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "simd.h"

namespace solera {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// ---- instruction set ----

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2 };

// The widest set this processor has, or SOLERA_ISA=generic|avx2|avx512 from the environment if
// narrower.
inline Isa isa() {
  static const Isa chosen = [] {
    Isa best = Isa::generic;
#if defined(SOLERA_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      best = Isa::avx2;
#endif
#if defined(SOLERA_AVX512)
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      best = Isa::avx512;
#endif
    if (const char* asked = std::getenv("SOLERA_ISA")) {
      Isa cap = std::strcmp(asked, "generic") == 0 ? Isa::generic
                : std::strcmp(asked, "avx2") == 0  ? Isa::avx2
                                                   : Isa::avx512;
      if (static_cast<int>(cap) < static_cast<int>(best)) best = cap;
    }
    return best;
  }();
  return chosen;
}

// Declares `table` in every instruction set's namespace and defines `pick_<table>()`. Goes directly
// into namespace solera (inside an unnamed one it would declare another table).
#if defined(SOLERA_X86) && !defined(SOLERA_AVX512)
#define SOLERA_PICK(Type, table)                                                      \
  namespace avx2 {                                                                    \
  extern const Type table;                                                            \
  }                                                                                   \
  inline const Type& pick_##table() {                                                 \
    static const Type& chosen = isa() == Isa::generic ? generic::table : avx2::table; \
    return chosen;                                                                    \
  }
#elif defined(SOLERA_X86)
#define SOLERA_PICK(Type, table)                                       \
  namespace avx2 {                                                     \
  extern const Type table;                                             \
  }                                                                    \
  namespace avx512 {                                                   \
  extern const Type table;                                             \
  }                                                                    \
  inline const Type& pick_##table() {                                  \
    static const Type& chosen = isa() == Isa::avx512 ? avx512::table   \
                                : isa() == Isa::avx2 ? avx2::table     \
                                                     : generic::table; \
    return chosen;                                                     \
  }
#else
#define SOLERA_PICK(Type, table) \
  inline const Type& pick_##table() { return generic::table; }
#endif

// ---- tensors ----

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(
          false,
          "solera: expected a floating-point tensor (float32, float64, bfloat16 or float16)");
  }
}

// float32 for everything but float64: what a dtype is accumulated in, and its statistics kept in.
inline ScalarType accumulate_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// t itself if its elements lie in order without gaps, else a copy that does.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
// Asks for 2 MiB pages under a large new output. In pages of 4 KiB a fault each costs up to ten
// times what writing the page does, and most systems give larger ones only on request ("madvise").
// From 32 MiB on glibc gives an allocation a mapping of its own, so the advice ends with the
// tensor. It covers whole pages only: no more memory is used. SOLERA_HUGE_PAGES=0 asks for nothing.
constexpr size_t kOwnMapping = size_t(32) << 20;
inline void ask_for_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  static const bool off = [] {
    const char* asked = std::getenv("SOLERA_HUGE_PAGES");
    return asked != nullptr && std::strcmp(asked, "0") == 0;
  }();
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = (uintptr_t(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (uintptr_t(data) + bytes) / kPage * kPage;
  // Advice that the system does not take is no error.
  if (!off && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// A new contiguous CPU tensor: torch's allocator without the dispatcher, a quarter of new_empty's
// price. SOLERA_POISON=1 fills it with NaN, so that an element nobody writes shows (the test suite
// sets it).
inline Tensor empty_like(const Tensor& t, Sizes sizes,
                         std::optional<ScalarType> dtype = std::nullopt) {
  static const bool poison = std::getenv("SOLERA_POISON") != nullptr;
  constexpr size_t kMaxDims = 64;  // torch's own limit
  STD_TORCH_CHECK(sizes.size() <= kMaxDims, "solera: too many dimensions");
  int64_t strides[kMaxDims], step = 1, numel = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
    numel *= sizes[i];
  }
  int32_t code;
  if (dtype.has_value())
    code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  else
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(),
                                                         strides, code,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
  if (size_t(numel) >= kOwnMapping / sizeof(double)) {
    const size_t bytes = size_t(numel) * out.element_size();
    if (bytes >= kOwnMapping) ask_for_huge_pages(out.mutable_data_ptr(), bytes);
  }
  if (poison && numel > 0)
    std::memset(out.mutable_data_ptr(), 0xff, size_t(numel) * out.element_size());
  return out;
}
inline std::vector<int64_t> sizes_of(const Tensor& t) {
  auto s = t.sizes();
  return std::vector<int64_t>(s.begin(), s.end());
}
inline const void* data_or_null(const OptTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

using torch::stable::parallel_for;

// Items per task so that one task touches about 32 KiB: below that, waking a thread costs more.
inline int64_t grain_for(int64_t bytes_per_item) {
  return bytes_per_item <= 0 ? 1 : (32768 + bytes_per_item - 1) / bytes_per_item;
}

}  // namespace solera
