// Philox4x32-10 (Salmon et al., 2011), a vector of blocks at a time: the random bits of every mask
// and of stochastic rounding, the same on every instruction set.
#pragma once

#include "simd.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

// A block, four words, of each counter; a counter's first word is a lane of `first`, the others are
// common to the vector.
struct PhiloxWords {
  vu word[4];
};
// The two keys of each round: of many blocks with one key made once.
struct PhiloxKeys {
  uint32_t k[10][2];
  SOLERA_INLINE explicit PhiloxKeys(uint64_t key) {
    for (int round = 0; round < 10; ++round) {
      k[round][0] = uint32_t(key) + uint32_t(round) * 0x9E3779B9u;
      k[round][1] = uint32_t(key >> 32) + uint32_t(round) * 0xBB67AE85u;
    }
    __asm__("" : "+m"(k));
  }
};
#if defined(__AVX512F__) || defined(__AVX2__)
// Even and odd lanes go through the rounds apart, each in the low half of a lane of 64 bits: a
// product is one instruction, its high half one shift, and its low half is there. What the high
// halves of the counters hold is never read.
#if defined(__AVX512F__)
typedef __m512i WordPairs;
SOLERA_INLINE WordPairs pair_product(WordPairs a, WordPairs b) { return _mm512_mul_epu32(a, b); }
SOLERA_INLINE WordPairs upper_words(WordPairs a) { return _mm512_srli_epi64(a, 32); }
SOLERA_INLINE WordPairs every_word(uint32_t a) { return _mm512_set1_epi32(int(a)); }
SOLERA_INLINE vu interleaved(WordPairs even, WordPairs odd) {
  return (vu)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}
#else
typedef __m256i WordPairs;
SOLERA_INLINE WordPairs pair_product(WordPairs a, WordPairs b) { return _mm256_mul_epu32(a, b); }
SOLERA_INLINE WordPairs upper_words(WordPairs a) { return _mm256_srli_epi64(a, 32); }
SOLERA_INLINE WordPairs every_word(uint32_t a) { return _mm256_set1_epi32(int(a)); }
SOLERA_INLINE vu interleaved(WordPairs even, WordPairs odd) {
  return (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
#endif
struct PhiloxHalf {
  WordPairs c0, c1, c2, c3;
  SOLERA_INLINE void round(WordPairs k0, WordPairs k1) {
    const WordPairs a = pair_product(c0, every_word(0xD2511F53u)),
                    b = pair_product(c2, every_word(0xCD9E8D57u));
    c0 = upper_words(b) ^ c1 ^ k0;
    c1 = b;
    c2 = upper_words(a) ^ c3 ^ k1;
    c3 = a;
  }
};
SOLERA_INLINE PhiloxWords philox(vu first, uint32_t second, uint32_t third, uint32_t fourth,
                                 const PhiloxKeys& keys) {
  const WordPairs c1 = every_word(second), c2 = every_word(third), c3 = every_word(fourth);
  PhiloxHalf even{(WordPairs)first, c1, c2, c3}, odd{upper_words((WordPairs)first), c1, c2, c3};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const WordPairs x = every_word(keys.k[round][0]), y = every_word(keys.k[round][1]);
    even.round(x, y);
    odd.round(x, y);
  }
  return {{interleaved(even.c0, odd.c0), interleaved(even.c1, odd.c1), interleaved(even.c2, odd.c2),
           interleaved(even.c3, odd.c3)}};
}
#else
// The low and high halves of a 32 x 32 bit product.
struct WordProduct {
  vu low, high;
};
SOLERA_INLINE WordProduct word_product(vu a, uint32_t m) {
  WordProduct out;
  for (int i = 0; i < kLanes<float>; ++i) {
    const uint64_t product = uint64_t(a[i]) * m;
    out.low[i] = uint32_t(product);
    out.high[i] = uint32_t(product >> 32);
  }
  return out;
}
SOLERA_INLINE PhiloxWords philox(vu first, uint32_t second, uint32_t third, uint32_t fourth,
                                 const PhiloxKeys& keys) {
  vu c0 = first, c1 = vu{} + second, c2 = vu{} + third, c3 = vu{} + fourth;
  for (int round = 0; round < 10; ++round) {
    const WordProduct a = word_product(c0, 0xD2511F53u), b = word_product(c2, 0xCD9E8D57u);
    c0 = b.high ^ c1 ^ keys.k[round][0];
    c1 = b.low;
    c2 = a.high ^ c3 ^ keys.k[round][1];
    c3 = a.low;
  }
  return {{c0, c1, c2, c3}};
}
#endif
SOLERA_INLINE PhiloxWords philox(vu first, uint32_t second, uint32_t third, uint32_t fourth,
                                 uint64_t key) {
  return philox(first, second, third, fourth, PhiloxKeys(key));
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
