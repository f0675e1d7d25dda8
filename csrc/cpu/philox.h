// Philox4x32-10 (Salmon et al., 2011), a vector of blocks at a time: the random bits of every mask
// and of stochastic rounding, the same on every instruction set.
#pragma once

#include "simd.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

// The low and high halves of a 32 x 32 bit product.
struct WordProduct {
  vu low, high;
};
SOLERA_INLINE WordProduct word_product(vu a, uint32_t m) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a, y = _mm512_set1_epi32(int(m));
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  return {(vu)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)),
          (vu)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)};
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, y = _mm256_set1_epi32(int(m));
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  return {(vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa),
          (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa)};
#else
  WordProduct out;
  for (int i = 0; i < kLanes<float>; ++i) {
    const uint64_t product = uint64_t(a[i]) * m;
    out.low[i] = uint32_t(product);
    out.high[i] = uint32_t(product >> 32);
  }
  return out;
#endif
}

// A block, four words, of each counter; a counter's first word is a lane of `first`, the others are
// common to the vector.
struct PhiloxWords {
  vu word[4];
};
SOLERA_INLINE PhiloxWords philox(vu first, uint32_t second, uint32_t third, uint32_t fourth,
                                 uint64_t key) {
  vu c0 = first, c1 = vu{} + second, c2 = vu{} + third, c3 = vu{} + fourth;
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const WordProduct a = word_product(c0, 0xD2511F53u), b = word_product(c2, 0xCD9E8D57u);
    c0 = b.high ^ c1 ^ k0;
    c1 = b.low;
    c2 = a.high ^ c3 ^ k1;
    c3 = a.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}
// 0, 1, 2, ...: what tells a vector's counters apart.
SOLERA_INLINE vu lane_numbers() {
  vu lane;
  for (int i = 0; i < kLanes<float>; ++i) lane[i] = uint32_t(i);
  return lane;
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
