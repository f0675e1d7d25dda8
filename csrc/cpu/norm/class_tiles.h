// The same passes with their products on AMX's tiles, a block of classes in cache at a time.
#pragma once

#include "bf16_tiles.h"
#include "class_passes.h"

#if SOLERA_TILES
namespace solera {
namespace SOLERA_ISA {
namespace {

SOLERA_INLINE int64_t tiles_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// by_class: right tiles of x^T, summed over the width; by_row: of x, summed over the rows.
void pack_x(const void* x, int64_t rows, int64_t lanes, int64_t width, void* by_class,
            void* by_row) {
  const bf16* from = (const bf16*)x;
  const int64_t depth = tiles_of(width, kTileDepth);
  bf16* to = (bf16*)by_class;
  for (int64_t b = 0; b < lanes; b += kTileRows)
    for (int64_t k = 0; k < depth; ++k, to += kTile) {
      left_tile(to, from + b * width + k * kTileDepth, width, rows - b, width - k * kTileDepth);
      turn_tile(to);
    }
  if (!by_row) return;
  to = (bf16*)by_row;
  for (int64_t d = 0; d < 2 * depth; ++d)
    for (int64_t b = 0; b < lanes; b += kTileDepth, to += kTile)
      right_tile(to, from + b * width + d * kTileRows, width, rows - b, width - d * kTileRows);
}

void statistics_on_tiles(const ClassHead& p, const void* by_class, int64_t group, float* statistics,
                         int16_t* cosines) {
  const Tiles tiles;
  const int64_t depth = tiles_of(p.width, kTileDepth);
  bf16* left = new bf16[size_t(kClassBlock / kTileRows * depth * kTile)];
  float* products = new float[size_t(kClassBlock * p.lanes)];
  const int64_t last =
      (group + 1) * kClassGroup < p.classes ? (group + 1) * kClassGroup : p.classes;
  clear(statistics, p.lanes);
  for (int64_t first = group * kClassGroup; first < last; first += kClassBlock) {
    const int64_t n = last - first < kClassBlock ? last - first : kClassBlock;
    const bf16* w = (const bf16*)p.weight + first * p.width;
    const int64_t panels = tiles_of(n, kTileRows);
    for (int64_t m = 0; m < panels; ++m)
      for (int64_t k = 0; k < depth; ++k)
        left_tile(left + (m * depth + k) * kTile, w + m * kTileRows * p.width + k * kTileDepth,
                  p.width, n - m * kTileRows, p.width - k * kTileDepth);
    tile_product(left, depth * kTile, panels, (const bf16*)by_class, depth * kTile,
                 p.lanes / kTileRows, depth, products, p.lanes, false);
    gather(p, products, first, n, statistics, cosines ? cosines + first * p.lanes : nullptr);
  }
  delete[] products;
  delete[] left;
}

// Classes [begin, end) of a round that starts at `first`: their gradient as right tiles into
// `pairs`, the weight as left tiles of its transpose into `turned`, both for the
// product over the round's classes (`depth` tiles of them), and the finished gradient of the
// weight.
void block_on_tiles(const ClassHead& p, const int16_t* cosines, const void* by_row, int64_t first,
                    int64_t begin, int64_t end, int64_t depth, void* dweight, void* turned,
                    void* pairs) {
  const Tiles tiles;
  const int64_t panels = tiles_of(end - begin, kTileRows), rows = p.lanes / kTileDepth;
  const int64_t wide = 2 * tiles_of(p.width, kTileDepth);
  bf16* left = new bf16[size_t(kClassBlock / kTileRows * rows * kTile)];
  float* e = dweight ? new float[size_t(kClassBlock * wide * kTileRows)] : nullptr;
  const bf16* w = (const bf16*)p.weight;
  for (int64_t c = begin; c < end; c += kTileDepth) {
    const int64_t at = (c - first) / kTileDepth;
    for (int64_t j = 0; j < p.lanes; j += kTileDepth) {
      const RowLanes row0(p, j), row1(p, j + L);
      bf16* right = (bf16*)pairs + (j / kTileRows * depth + at) * kTile;
      for (int64_t i = 0; i < kTileDepth; i += 2) {
        vh h[2][2] = {};
        for (int64_t s = 0; s < 2; ++s) {
          const int64_t k = c + i + s;
          if (k < end) {
            const int16_t* from = cosines + k * p.lanes + j;
            __builtin_prefetch(from + kTileDepth * p.lanes, 0, 2);  // a line in each of 32 rows
            h[s][0] = narrow(row0(p, from, k), bf16{});
            h[s][1] = narrow(row1(p, from + L, k), bf16{});
          }
          const int64_t line = c - begin + i + s;
          memcpy((void*)(left + (line / kTileRows * rows + j / kTileDepth) * kTile +
                         line % kTileRows * kTileDepth),
                 h[s], sizeof h[s]);
        }
        for (int64_t t = 0; t < 2; ++t) {
          const vu pair = extend(h[0][t]) | extend(h[1][t]) << 16;
          memcpy((void*)(right + t * depth * kTile + i / 2 * kTileDepth), &pair, sizeof pair);
        }
      }
    }
    for (int64_t d = 0; turned && d < wide; ++d) {
      bf16* to = (bf16*)turned + (d * depth + at) * kTile;
      right_tile(to, w + c * p.width + d * kTileRows, p.width, end - c, p.width - d * kTileRows);
      turn_tile(to);
    }
  }
  if (dweight) {
    tile_product(left, rows * kTile, panels, (const bf16*)by_row, rows * kTile, wide, rows, e,
                 wide * kTileRows, false);
    project<bf16>(e, wide * kTileRows, w + begin * p.width, p.class_inverse + begin, end - begin,
                  p.width, (bf16*)dweight + begin * p.width);
  }
  delete[] e;
  delete[] left;
}

// Rows [begin, end) tiles of the transposed gradient of x, (width, lanes), take in one round.
void rows_on_tiles(const void* turned, const void* pairs, int64_t lanes, int64_t depth,
                   int64_t begin, int64_t end, float* dx) {
  constexpr int64_t kStep = 16;  // so that two panels of the right side stay in L1
  const Tiles tiles;
  for (int64_t k = 0; k < depth; k += kStep)
    tile_product((const bf16*)turned + (begin * depth + k) * kTile, depth * kTile, end - begin,
                 (const bf16*)pairs + k * kTile, depth * kTile, lanes / kTileRows,
                 depth - k < kStep ? depth - k : kStep, dx + begin * kTileRows * lanes, lanes,
                 true);
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
#endif  // SOLERA_TILES
