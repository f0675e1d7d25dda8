// The random words of masks, as python/solera/weights/_random.py defines them.
#pragma once

#include "../philox.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

constexpr int64_t kMaskChunk = 512;  // elements that share 128 Philox blocks

// Words of the elements chunk * 512 + slot * 128 + lane + i, i the vector's lane, for the four
// slots: word[slot]. lane is a multiple of kLanes<float> below 128.
SOLERA_INLINE PhiloxWords mask_words(int64_t chunk, int lane, uint32_t tensor, uint32_t stream,
                                     const PhiloxKeys& keys) {
  const uint64_t block = uint64_t(chunk) * 128 + uint64_t(lane);  // 128 divides 2^32: no carry
  return philox(lane_numbers() + uint32_t(block), uint32_t(block >> 32), tensor, stream, keys);
}

// All words of a chunk in the order of its elements.
SOLERA_INLINE void mask_chunk(int64_t chunk, uint32_t tensor, uint32_t stream, uint64_t seed,
                              uint32_t* words) {
  const PhiloxKeys keys(seed);
  for (int lane = 0; lane < 128; lane += kLanes<float>) {
    const PhiloxWords w = mask_words(chunk, lane, tensor, stream, keys);
    for (int slot = 0; slot < 4; ++slot)
      __builtin_memcpy(words + slot * 128 + lane, &w.word[slot], sizeof(vu));
  }
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
