// Tiles of tensors of any dtype as accumulators: what the kernels over w - base read.
#pragma once

#include "../simd.h"

namespace solera {

struct DeltaStream {
  const void* data;  // null where there is no base
  int dtype;         // a Dtype code
};

namespace SOLERA_ISA {
namespace {

constexpr int kDeltaTile = 512;  // elements; kMaskChunk of mask.h

// The integers that order non-negative numbers of a type as their values, NaN last: their bits.
template <class A>
struct KeyOf;
template <>
struct KeyOf<float> {
  typedef int32_t type;
  typedef vi vector;
};
template <>
struct KeyOf<double> {
  typedef int64_t type;
  typedef vl vector;
};
template <class A>
using Key = typename KeyOf<A>::type;
template <class A>
using KeyVec = typename KeyOf<A>::vector;
template <class A>
constexpr Key<A> kLargestKey = Key<A>(~(Key<A>(1) << (8 * sizeof(A) - 1)));

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

// One element at `i` as an accumulator.
template <class A>
SOLERA_INLINE A element(const DeltaStream& s, int64_t i) {
  A out = 0;
  with_type(s.dtype, [&](auto storage) {
    out = A(as_scalar((const typename decltype(storage)::type*)s.data + i));
  });
  return out;
}

// n elements from `offset` as accumulators: where they lie if they are stored so, else converted
// into `tile`. Null for a stream that is not there.
template <class A>
const A* tile_of(const DeltaStream& s, int64_t offset, int n, A* tile) {
  if (s.data == nullptr) return nullptr;
  if (s.dtype == (sizeof(A) == 8 ? kFloat64 : kFloat32)) return (const A*)s.data + offset;
  with_type(s.dtype, [&](auto storage) {
    typedef typename decltype(storage)::type T;
    const T* p = (const T*)s.data + offset;
    if constexpr (sizeof(typename Acc<T>::type) == sizeof(A)) {
      int j = 0;
      for (; j + kLanes<T> <= n; j += kLanes<T>) store(tile + j, load(p + j));
      if (j < n) store_n(tile + j, load_n(p + j, n - j), n - j);
    } else {
      for (int j = 0; j < n; ++j) tile[j] = A(as_scalar(p + j));
    }
  });
  return tile;
}

// n accumulators to a tensor of any dtype, past the caches if asked.
template <class A>
void store_tile(const A* tile, void* data, int dtype, int64_t offset, int n, bool streaming) {
  with_type(dtype, [&](auto storage) {
    typedef typename decltype(storage)::type T;
    T* p = (T*)data + offset;
    if constexpr (sizeof(typename Acc<T>::type) == sizeof(A)) {
      const bool past = streaming && can_stream(p);
      int j = 0;
      for (; j + kLanes<T> <= n; j += kLanes<T>) {
        if (past)
          stream(p + j, load(tile + j));
        else
          store(p + j, load(tile + j));
      }
      if (j < n) store_n(p + j, load_n(tile + j, n - j), n - j);
    } else {
      for (int j = 0; j < n; ++j) set_scalar(p + j, double(tile[j]));
    }
  });
}

template <class A>
SOLERA_INLINE typename Vec<A>::type get(const A* p, int count) {
  return count == Vec<A>::lanes ? load(p) : load_n(p, count);
}
template <class A>
SOLERA_INLINE typename Vec<A>::type magnitude(typename Vec<A>::type v) {
  return bits_as<typename Vec<A>::type>(bits_as<KeyVec<A>>(v) & kLargestKey<A>);
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
