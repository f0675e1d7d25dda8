// AMX, the matrix registers ("tiles") of some x86 processors, as far as bfloat16 products need
// them: eight of 16 rows of 64 bytes. On the left of a product a tile is 16 rows of 32 numbers, on
// its right 16 pairs of rows of 16 columns, the two numbers of a pair side by side; sums are 16 x
// 16 numbers in float32, in which denormals are zero.
//
// The instructions are written as assembly: only an object compiled for AMX has their intrinsics,
// whose first versions do not say, besides, what memory they read.
#pragma once

#include "simd.h"

#if defined(__AVX512F__) && defined(__linux__) && defined(__x86_64__)
#define SOLERA_TILES 1

#define SOLERA_TILE_LOAD(tile, from, bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"(int64_t(bytes)) : "memory")
#define SOLERA_TILE_STORE(tile, to, bytes) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(int64_t(bytes)) : "memory")
#define SOLERA_TILE_PRODUCT(sum, left, right) \
  asm volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum::)
#define SOLERA_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile::)

namespace solera {
namespace SOLERA_ISA {
namespace {

// Configures eight full tiles for as long as it lives. What was configured before is put back at
// the end, for whoever (oneDNN) believes its own configuration still to be there.
class Tiles {
 public:
  Tiles() {
    asm volatile("sttilecfg %0" : "=m"(found_));
    Config config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = 64;
      config.rows[i] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() {
    if (found_.palette)
      asm volatile("ldtilecfg %0" ::"m"(found_));
    else
      asm volatile("tilerelease");
  }
  Tiles(const Tiles&) = delete;

 private:
  struct Config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  Config found_;
};

// Pairs of numbers as units: a left tile becomes the right tile of its transpose and back.
SOLERA_INLINE void transpose_pairs(__m512i r[16]) {
  __m512i t[16];
  // 4 x 4 units within each 128 bits, then the sixteen 128-bit blocks by quarters of the rows.
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
#else
#define SOLERA_TILES 0
#endif

#ifdef SOLERA_FRONT
#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace solera {

// Whether the processor has tiles for bfloat16 and the system, once asked, lets this process use
// them.
inline bool amx_granted() {
#if defined(__linux__) && defined(__x86_64__)
  static const bool granted = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tiles = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
    const bool rounds = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);  // AVX512-BF16
    constexpr long kAskPermission = 0x1023, kTileData = 18;
    return tiles && rounds && syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

}  // namespace solera
#endif  // SOLERA_FRONT
