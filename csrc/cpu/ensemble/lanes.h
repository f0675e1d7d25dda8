// The first lanes of a row that is narrower than a vector: one masked access where there is one.
// Members often end in a few columns, and copies of a few elements would cost more than their
// arithmetic.
#pragma once

#include "../exponential.h"
#include "../strips.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)
SOLERA_INLINE __m256i first_lanes(int n) {
  static const int32_t mask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256((const __m256i*)(mask + 8 - n));
}
#endif
template <class T>
SOLERA_INLINE AccVec<T> lanes_of(const T* p, int n) {
  if (n == kLanes<T>) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(A<T>)) return load_tail(p, n);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (vf)_mm256_maskload_ps(p, first_lanes(n));
#endif
  return load_n(p, n);
}
template <class T>
SOLERA_INLINE void set_lanes(T* p, AccVec<T> v, int n) {
  if (n == kLanes<T>) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
  if constexpr (sizeof(T) == 8)
    return _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
#endif
  store_n(p, v, n);
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
