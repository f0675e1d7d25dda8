// Tiles of tensors of any dtype as accumulators: what the kernels over w - base read.
#pragma once

#include "tiles.h"

namespace solera {
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

// One element at `i` as an accumulator.
template <class A>
SOLERA_INLINE A element(const WeightStream& s, int64_t i) {
  A out = 0;
  with_type(s.dtype, [&](auto storage) {
    out = A(as_scalar((const typename decltype(storage)::type*)s.data + i));
  });
  return out;
}

// n elements from `offset` as accumulators (as_accumulators); null for a stream that is not there.
template <class A>
const A* tile_of(const WeightStream& s, int64_t offset, int n, A* tile) {
  return as_accumulators<A>(s.data, s.dtype, offset, n, tile);
}

// n accumulators to a tensor of any dtype, past the caches if asked.
template <class A>
void store_tile(const A* tile, void* data, int dtype, int64_t offset, int n, bool streaming) {
  store_tile<A>(WeightOutput{data, dtype}, offset, n, streaming,
                [&](int64_t j, int m) { return get_as<A>(tile + j, m); });
}

template <class A>
SOLERA_INLINE typename Vec<A>::type get(const A* p, int count) {
  return get_as<A>(p, count);
}
template <class A>
SOLERA_INLINE typename Vec<A>::type magnitude(typename Vec<A>::type v) {
  return bits_as<typename Vec<A>::type>(bits_as<KeyVec<A>>(v) & kLargestKey<A>);
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
