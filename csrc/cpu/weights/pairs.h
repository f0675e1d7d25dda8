// Neighbouring elements of two vectors taken apart into first and second of each pair, and joined
// again.
#pragma once

#include "../simd.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

#define SOLERA_PAIRS(V, even_lanes, odd_lanes, low_lanes, high_lanes)                       \
  SOLERA_INLINE V evens(V a, V b) { return __builtin_shufflevector(a, b, even_lanes); }     \
  SOLERA_INLINE V odds(V a, V b) { return __builtin_shufflevector(a, b, odd_lanes); }       \
  SOLERA_INLINE V joined_low(V a, V b) { return __builtin_shufflevector(a, b, low_lanes); } \
  SOLERA_INLINE V joined_high(V a, V b) { return __builtin_shufflevector(a, b, high_lanes); }
#define SOLERA_LANES(...) __VA_ARGS__
#define SOLERA_PAIRS_2(V) \
  SOLERA_PAIRS(V, SOLERA_LANES(0, 2), SOLERA_LANES(1, 3), SOLERA_LANES(0, 2), SOLERA_LANES(1, 3))
#define SOLERA_PAIRS_4(V)                                                                       \
  SOLERA_PAIRS(V, SOLERA_LANES(0, 2, 4, 6), SOLERA_LANES(1, 3, 5, 7), SOLERA_LANES(0, 4, 1, 5), \
               SOLERA_LANES(2, 6, 3, 7))
#define SOLERA_PAIRS_8(V)                                                                       \
  SOLERA_PAIRS(V, SOLERA_LANES(0, 2, 4, 6, 8, 10, 12, 14),                                      \
               SOLERA_LANES(1, 3, 5, 7, 9, 11, 13, 15), SOLERA_LANES(0, 8, 1, 9, 2, 10, 3, 11), \
               SOLERA_LANES(4, 12, 5, 13, 6, 14, 7, 15))
#if SOLERA_VECTOR_BYTES == 64
SOLERA_PAIRS(vf, SOLERA_LANES(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
             SOLERA_LANES(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31),
             SOLERA_LANES(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
             SOLERA_LANES(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31))
SOLERA_PAIRS_8(vd)
#elif SOLERA_VECTOR_BYTES == 32
SOLERA_PAIRS_8(vf)
SOLERA_PAIRS_4(vd)
#else
SOLERA_PAIRS_4(vf)
SOLERA_PAIRS_2(vd)
#endif
#undef SOLERA_PAIRS
#undef SOLERA_PAIRS_2
#undef SOLERA_PAIRS_4
#undef SOLERA_PAIRS_8
#undef SOLERA_LANES

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
