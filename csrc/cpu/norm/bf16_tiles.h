// Products of bfloat16 with sums in float32 on AMX's tiles, which torch does not offer on a CPU:
// its own round every result to bfloat16.
//
// A tile is 1 KiB: 16 rows of 32 numbers on the left of a product, 16 pairs of rows of 16 columns
// (the two numbers of a pair side by side) on its right. Operands are packed tile after tile along
// the sum, so that a panel is read in order.
#pragma once

#include "../strips.h"

#if defined(__AVX512F__) && defined(__linux__) && defined(__x86_64__)
#define SOLERA_TILES 1
#else
#define SOLERA_TILES 0
#endif

namespace solera {
namespace SOLERA_ISA {
namespace {

constexpr int64_t kTile = 512;      // bfloat16 numbers of one
constexpr int64_t kTileRows = 16;   // and columns of a result
constexpr int64_t kTileDepth = 32;  // numbers of the sum

#if SOLERA_TILES

// rows x columns of `from`, what is past `rows` and `columns` zero, as a left tile.
SOLERA_INLINE void left_tile(bf16* to, const bf16* from, int64_t step, int64_t rows,
                             int64_t columns) {
  for (int64_t i = 0; i < kTileRows; ++i) {
    const __mmask32 some = i >= rows       ? 0
                           : columns >= 32 ? 0xffffffffu
                           : columns <= 0  ? 0
                                           : (1u << columns) - 1;
    _mm512_storeu_si512(to + i * kTileDepth, _mm512_maskz_loadu_epi16(some, from + i * step));
  }
}

// 32 rows x 16 columns of `from` as a right tile: rows 2 j and 2 j + 1 side by side.
SOLERA_INLINE void right_tile(bf16* to, const bf16* from, int64_t step, int64_t rows,
                              int64_t columns) {
  const __mmask16 some = columns >= 16 ? 0xffff : columns <= 0 ? 0 : (1u << columns) - 1;
  for (int64_t j = 0; j < 16; ++j) {
    const __m256i a = _mm256_maskz_loadu_epi16(2 * j < rows ? some : 0, from + 2 * j * step);
    const __m256i b =
        _mm256_maskz_loadu_epi16(2 * j + 1 < rows ? some : 0, from + (2 * j + 1) * step);
    const __m512i pair =
        _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
    _mm512_storeu_si512(to + j * kTileDepth, pair);
  }
}

// Pairs as units: a left tile becomes the right tile of its transpose and back.
SOLERA_INLINE void transpose_pairs(bf16* tile) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(tile + i * kTileDepth);
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
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    _mm512_storeu_si512(tile + i * kTileDepth, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(tile + (i + 4) * kTileDepth, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(tile + (i + 8) * kTileDepth, _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_storeu_si512(tile + (i + 12) * kTileDepth, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}

// All tiles 16 rows of 64 bytes. What was configured before is put back at the end, for whoever
// (oneDNN) believes its own configuration still to be there.
class TileUse {
 public:
  __attribute__((target("amx-tile"))) TileUse() {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;
      config[48 + t] = 16;
    }
    _tile_storeconfig(before_);
    // GCC's intrinsics name the first eight bytes only as what they read.
    __asm__ volatile("" : : "r"(config) : "memory");
    _tile_loadconfig(config);
  }
  __attribute__((target("amx-tile"))) ~TileUse() {
    __asm__ volatile("" : : "r"(before_) : "memory");
    if (before_[0])
      _tile_loadconfig(before_);
    else
      _tile_release();
  }
  TileUse(const TileUse&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// c (M x 16 rows, 32 columns) = or += a b over `depth` tiles of the sum.
template <int M>
__attribute__((target("amx-tile,amx-bf16"))) inline void tile_block(const bf16* a, int64_t a_panel,
                                                                    const bf16* b, int64_t b_panel,
                                                                    int64_t depth, float* c,
                                                                    int64_t step, bool add) {
  const int64_t bytes = step * 4;
  float* low = c + kTileRows * step;
  __asm__ volatile("" : : : "memory");  // GCC's intrinsics do not say what memory they read
  if (add) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + kTileRows, bytes);
    if (M > 1) _tile_loadd(2, low, bytes);
    if (M > 1) _tile_loadd(3, low + kTileRows, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (M > 1) _tile_zero(2);
    if (M > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; ++k) {
    _tile_loadd(4, a + k * kTile, 64);
    _tile_loadd(6, b + k * kTile, 64);
    _tile_loadd(7, b + b_panel + k * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (M > 1) _tile_loadd(5, a + a_panel + k * kTile, 64);
    if (M > 1) _tile_dpbf16ps(2, 5, 6);
    if (M > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kTileRows, bytes);
  if (M > 1) _tile_stored(2, low, bytes);
  if (M > 1) _tile_stored(3, low + kTileRows, bytes);
  __asm__ volatile("" : : : "memory");
}

// c = or += a b of `rows` x `columns` tiles, columns even; panels lie `*_panel` numbers apart.
inline void tile_product(const bf16* a, int64_t a_panel, int64_t rows, const bf16* b,
                         int64_t b_panel, int64_t columns, int64_t depth, float* c, int64_t step,
                         bool add) {
  for (int64_t n = 0; n < columns; n += 2) {
    for (int64_t m = 0; m < rows; m += 2) {
      const bf16 *l = a + m * a_panel, *r = b + n * b_panel;
      float* out = c + m * kTileRows * step + n * kTileRows;
      const auto block = m + 1 < rows ? tile_block<2> : tile_block<1>;
      block(l, a_panel, r, b_panel, depth, out, step, add);
    }
  }
}
#endif  // SOLERA_TILES

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
