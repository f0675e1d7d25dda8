// Products of bfloat16 with sums in float32 on AMX's tiles, which torch does not offer on a CPU:
// its own round every result to bfloat16.
//
// Operands are packed tile after tile along the sum, so that a panel is read in order.
#pragma once

#include "../amx.h"
#include "../strips.h"

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

// A left tile becomes the right tile of its transpose and back.
SOLERA_INLINE void turn_tile(bf16* tile) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(tile + i * kTileDepth);
  transpose_pairs(r);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * kTileDepth, r[i]);
}

// c (M x 16 rows, 32 columns) = or += a b over `depth` tiles of the sum.
template <int M>
void tile_block(const bf16* a, int64_t a_panel, const bf16* b, int64_t b_panel, int64_t depth,
                float* c, int64_t step, bool add) {
  const int64_t bytes = step * 4;
  float* low = c + kTileRows * step;
  if (add) {
    SOLERA_TILE_LOAD(0, c, bytes);
    SOLERA_TILE_LOAD(1, c + kTileRows, bytes);
    if (M > 1) SOLERA_TILE_LOAD(2, low, bytes);
    if (M > 1) SOLERA_TILE_LOAD(3, low + kTileRows, bytes);
  } else {
    SOLERA_TILE_ZERO(0);
    SOLERA_TILE_ZERO(1);
    if (M > 1) SOLERA_TILE_ZERO(2);
    if (M > 1) SOLERA_TILE_ZERO(3);
  }
  for (int64_t k = 0; k < depth; ++k) {
    SOLERA_TILE_LOAD(4, a + k * kTile, 64);
    SOLERA_TILE_LOAD(6, b + k * kTile, 64);
    SOLERA_TILE_LOAD(7, b + b_panel + k * kTile, 64);
    SOLERA_TILE_PRODUCT(0, 4, 6);
    SOLERA_TILE_PRODUCT(1, 4, 7);
    if (M > 1) SOLERA_TILE_LOAD(5, a + a_panel + k * kTile, 64);
    if (M > 1) SOLERA_TILE_PRODUCT(2, 5, 6);
    if (M > 1) SOLERA_TILE_PRODUCT(3, 5, 7);
  }
  SOLERA_TILE_STORE(0, c, bytes);
  SOLERA_TILE_STORE(1, c + kTileRows, bytes);
  if (M > 1) SOLERA_TILE_STORE(2, low, bytes);
  if (M > 1) SOLERA_TILE_STORE(3, low + kTileRows, bytes);
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
