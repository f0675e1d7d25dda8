// Elements of any dtype as accumulators, a tile at a time: what the kernels over weight lists
// share.
#pragma once

#include "../simd.h"

namespace solera {

// Where the elements of one tensor lie, and their Dtype code.
struct WeightStream {
  const void* data;
  int dtype;  // a Dtype code
};
struct WeightOutput {
  void* data;
  int dtype;
};

namespace SOLERA_ISA {
namespace {

template <class A>
using V = typename Vec<A>::type;
template <class A>
constexpr int kWide = Vec<A>::lanes;

SOLERA_INLINE double as_scalar(const double* p) { return *p; }
SOLERA_INLINE float as_scalar(const float* p) { return *p; }
template <class H>
SOLERA_INLINE float as_scalar(const H* p) {
  return widen_one(*p);
}
SOLERA_INLINE void set_scalar(double* p, double v) { *p = v; }
SOLERA_INLINE void set_scalar(float* p, double v) { *p = float(v); }
template <class H>
SOLERA_INLINE void set_scalar(H* p, double v) {
  *p = narrow_one(float(v), H{});
}

// A vector of accumulators from storage of another dtype; the double/narrow mixture is the slow
// one.
template <class A, class T>
SOLERA_INLINE V<A> get_as(const T* p, int n) {
  if constexpr (sizeof(typename Acc<T>::type) == sizeof(A)) {
    return n == kWide<A> ? load(p) : load_n(p, n);
  } else {
    V<A> out{};
    for (int i = 0; i < n; ++i) out[i] = A(as_scalar(p + i));
    return out;
  }
}
template <class A, class T>
SOLERA_INLINE void put_as(T* p, V<A> v, int n, bool streaming) {
  if constexpr (sizeof(typename Acc<T>::type) == sizeof(A)) {
    if (n != kWide<A>)
      store_n(p, v, n);
    else if (streaming)
      stream(p, v);
    else
      store(p, v);
  } else {
    for (int i = 0; i < n; ++i) set_scalar(p + i, double(v[i]));
  }
}
template <int kStep, class F>
SOLERA_INLINE void tile_strips(int64_t n, const F& body) {
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) body(j, kStep);
  if (j < n) body(j, int(n - j));
}

template <class T>
struct Storage {
  typedef T type;
};
// Calls body with the storage type a code stands for.
template <class F>
SOLERA_INLINE void with_type(int dtype, const F& body) {
  switch (dtype) {
    case kFloat32:
      return body(Storage<float>{});
    case kFloat64:
      return body(Storage<double>{});
    case kBFloat16:
      return body(Storage<bf16>{});
    default:
      return body(Storage<f16>{});
  }
}

// n elements as accumulators: where they lie if they are stored so, else converted into `tile`.
template <class A>
const A* as_accumulators(const void* data, int dtype, int64_t offset, int n, A* tile) {
  if (data == nullptr) return nullptr;
  if (dtype == (sizeof(A) == 8 ? kFloat64 : kFloat32)) return (const A*)data + offset;
  with_type(dtype, [&](auto storage) {
    const auto* p = (const typename decltype(storage)::type*)data + offset;
    tile_strips<kWide<A>>(
        n, [&](int64_t j, int m) { put_as<A>(tile + j, get_as<A>(p + j, m), m, false); });
  });
  return tile;
}

// out[j] = value(j) for a tile, in the output's dtype.
template <class A, class F>
SOLERA_INLINE void store_tile(const WeightOutput& out, int64_t offset, int n, bool streaming,
                              const F& value) {
  with_type(out.dtype, [&](auto storage) {
    auto* p = (typename decltype(storage)::type*)out.data + offset;
    const bool past = streaming && can_stream(p);
    tile_strips<kWide<A>>(n, [&](int64_t j, int m) { put_as<A>(p + j, value(j, m), m, past); });
  });
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
