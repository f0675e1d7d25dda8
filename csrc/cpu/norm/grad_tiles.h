// Tensors of any dtype read and written a tile of accumulators at a time, and the lists of them:
// what the kernels over gradients share. The tile is the storage itself where that already holds
// accumulators.
#pragma once

#include "../strips.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

constexpr int kGradTile = 1024;

SOLERA_INLINE vf vector_root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
SOLERA_INLINE vd vector_root(vd x) {
#if defined(__AVX512F__)
  return (vd)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (vd)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

template <class A>
constexpr int kNativeDtype = sizeof(A) == 8 ? kFloat64 : kFloat32;

template <class Acc_, class T>
SOLERA_INLINE void widen_tile(const T* from, Acc_* to, int n) {
  if constexpr (sizeof(A<T>) == sizeof(Acc_)) {
    strips<kLanes<T>>(n, [&](int64_t j, int m) { put(to + j, get(from + j, m), m); });
  } else {
    float row[kGradTile];
    widen_tile(from, row, n);
    for (int i = 0; i < n; ++i) to[i] = Acc_(row[i]);
  }
}
template <class Acc_, class T>
SOLERA_INLINE void narrow_tile(const Acc_* from, T* to, int n) {
  if constexpr (sizeof(A<T>) == sizeof(Acc_)) {
    strips<kLanes<T>>(n, [&](int64_t j, int m) { put(to + j, get(from + j, m), m); });
  } else {
    float row[kGradTile];
    for (int i = 0; i < n; ++i) row[i] = float(from[i]);
    narrow_tile(row, to, n);
  }
}

// n <= kGradTile elements from `offset` on as accumulators: in place, or widened into `tile`.
// A float64 tensor always comes with the accumulator double.
template <class Acc_>
SOLERA_INLINE const Acc_* read_tile(const void* data, int dtype, int64_t offset, int n,
                                    Acc_* tile) {
  if (dtype == kNativeDtype<Acc_>) return (const Acc_*)data + offset;
  if (dtype == kFloat32)
    widen_tile((const float*)data + offset, tile, n);
  else if (dtype == kBFloat16)
    widen_tile((const bf16*)data + offset, tile, n);
  else
    widen_tile((const f16*)data + offset, tile, n);
  return tile;
}
// Where n accumulators for `offset` on are to be put, and what takes them there from the tile.
template <class Acc_>
SOLERA_INLINE Acc_* open_tile(void* data, int dtype, int64_t offset, Acc_* tile) {
  return dtype == kNativeDtype<Acc_> ? (Acc_*)data + offset : tile;
}
template <class Acc_>
SOLERA_INLINE void close_tile(void* data, int dtype, int64_t offset, int n, const Acc_* tile) {
  if (dtype == kNativeDtype<Acc_>) return;
  if (dtype == kFloat32)
    narrow_tile(tile, (float*)data + offset, n);
  else if (dtype == kBFloat16)
    narrow_tile(tile, (bf16*)data + offset, n);
  else
    narrow_tile(tile, (f16*)data + offset, n);
}

// Calls body(start, n) for every tile of [begin, end).
template <class F>
SOLERA_INLINE void grad_tiles(int64_t begin, int64_t end, const F& body) {
  for (int64_t at = begin; at < end; at += kGradTile)
    body(at, int(end - at < kGradTile ? end - at : kGradTile));
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
