// bfloat16 products in AMX registers; what for, and the order of the sums, in amx_product.h.
//
// Blocks of 32 rows by 32 columns: four registers of sums, two of a and two of b, which is the most
// products a load can serve. Operations: 16 cycles a register product; a load from the first-level
// cache 8, hence the loads hide behind the products. Sums go through 4 KB that stay in cache
// (stored straight to rows a large power of two apart they take 105 cycles a register instead of
// 15).
#include "amx_product.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

#if SOLERA_TILES

// How a register holds 16 rows of a (32 terms each), and 16 columns of b (pairs of terms).
constexpr int64_t kRegister = 512, kBlock = 1024;  // elements

SOLERA_INLINE __mmask32 first(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

// Up to 32 lines of up to 32 terms, neighbours in memory, to two registers: as rows of a, or turned
// into columns of b.
SOLERA_INLINE void pack_lines(const bf16* from, int64_t step, int64_t lines, int64_t terms,
                              bool turn, bf16* to) {
  const __mmask32 mask = first(terms);
  for (int64_t half = 0; half < 32; half += 16) {
    __m512i r[16];
    for (int64_t i = 0; i < 16; ++i)
      r[i] = half + i < lines ? _mm512_maskz_loadu_epi16(mask, from + (half + i) * step)
                              : _mm512_setzero_si512();
    if (turn) transpose_pairs(r);
    for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + (half + i) * 32, r[i]);
  }
}

// The same of up to 32 terms, each a line of up to 32 neighbours: as columns of b, or turned into
// rows of a.
SOLERA_INLINE void pack_terms(const bf16* from, int64_t step, int64_t terms, int64_t lines,
                              bool turn, bf16* to) {
  const __m512i pair = _mm512_set1_epi32(0x00200000);  // of a term and the one after it
  const __m512i low = _mm512_add_epi32(
      pair,
      _mm512_mullo_epi32(_mm512_set1_epi32(0x00010001),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(0x00100010));
  const __mmask32 mask = first(lines);
  __m512i r[16], s[16];
  for (int64_t i = 0; i < 16; ++i) {
    const __m512i zero = _mm512_setzero_si512();
    const __m512i even = 2 * i < terms ? _mm512_maskz_loadu_epi16(mask, from + 2 * i * step) : zero;
    const __m512i odd =
        2 * i + 1 < terms ? _mm512_maskz_loadu_epi16(mask, from + (2 * i + 1) * step) : zero;
    r[i] = _mm512_permutex2var_epi16(even, low, odd);
    s[i] = _mm512_permutex2var_epi16(even, high, odd);
  }
  if (turn) {
    transpose_pairs(r);
    transpose_pairs(s);
  }
  for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, r[i]);
  for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + kRegister + i * 32, s[i]);
}

// Up to 32 lines (rows of a, columns of b) with all their terms. `line` and `term` are the steps.
SOLERA_INLINE void pack(const bf16* from, int64_t line, int64_t term, int64_t lines, int64_t terms,
                        bool rows, bf16* to) {
  for (int64_t k = 0; k < terms; k += kAmxBlock, to += kBlock) {
    const int64_t n = terms - k < kAmxBlock ? terms - k : kAmxBlock;
    if (term == 1)
      pack_lines(from + k, line, lines, n, !rows, to);
    else
      pack_terms(from + k * term, term, n, lines, rows, to);
  }
}

// sums (32, 32) of the packed columns and of rows: 16 of them `step` bytes apart in a register, the
// second register `second` bytes after the first, the next terms `next` bytes on. `rest`, if given,
// is more rows in the same layout, for the same columns.
SOLERA_INLINE void multiply_block(const void* rows, const void* rest, int64_t step, int64_t second,
                                  int64_t next, const bf16* columns, int64_t blocks, bool half,
                                  float* sums) {
  const int64_t dense = 64;
  SOLERA_TILE_ZERO(0);
  SOLERA_TILE_ZERO(1);
  SOLERA_TILE_ZERO(2);
  SOLERA_TILE_ZERO(3);
  for (const char* a = (const char*)rows; a; a = a == rows ? (const char*)rest : nullptr) {
    const char* b = (const char*)columns;
    for (int64_t k = 0; k < blocks; ++k, b += 2 * kBlock) {
      SOLERA_TILE_LOAD(4, a + k * next, step);
      SOLERA_TILE_LOAD(6, b, dense);
      SOLERA_TILE_PRODUCT(0, 4, 6);
      SOLERA_TILE_LOAD(7, b + 2 * kRegister, dense);
      SOLERA_TILE_PRODUCT(1, 4, 7);
      if (half) continue;
      SOLERA_TILE_LOAD(5, a + k * next + second, step);
      SOLERA_TILE_PRODUCT(2, 5, 6);
      SOLERA_TILE_PRODUCT(3, 5, 7);
    }
  }
  if (!half) {
    SOLERA_TILE_STORE(2, sums + 512, 128);
    SOLERA_TILE_STORE(3, sums + 528, 128);
  }
  SOLERA_TILE_STORE(0, sums, 128);
  SOLERA_TILE_STORE(1, sums + 16, 128);
}

// Zero for what is not above zero; NaN stays.
SOLERA_INLINE __m512 positive(__m512 v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ), v);
}

SOLERA_INLINE __m512i rounded(__m512 low, __m512 high) {
  __m512i result;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(result) : "v"(high), "v"(low));
  return result;
}
// What rounding to the 16 numbers `to` left; nothing of what is not finite, or became so.
SOLERA_INLINE __m512 rest_of(__m512 v, __m256i to) {
  const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to), 16));
  const __m512 rest = _mm512_sub_ps(v, back);
  const __m512 infinity = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000));
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(rest), infinity, _CMP_LT_OQ), rest);
}

// A block of sums to its rows. The instruction flushes denormals to zero; the products have done so
// already.
SOLERA_INLINE void leave(const float* sums, AmxResult out, int64_t row, int64_t column,
                         int64_t rows, int64_t columns) {
  const __mmask32 mask = first(columns);
  __m512 low_bias = _mm512_setzero_ps(), high_bias = low_bias;
  if (out.bias) {
    low_bias = _mm512_maskz_loadu_ps(__mmask16(mask), out.bias + column);
    high_bias = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), out.bias + column + 16);
  }
  for (int64_t i = 0; i < rows; ++i) {
    __m512 low = _mm512_load_ps(sums + i * 32), high = _mm512_load_ps(sums + i * 32 + 16);
    if (out.sums) {
      float* to = (float*)out.data + (row + i) * out.stride + column;
      const __mmask16 l = __mmask16(mask), h = __mmask16(mask >> 16);
      _mm512_mask_storeu_ps(to, l, _mm512_add_ps(_mm512_maskz_loadu_ps(l, to), low));
      if (h)
        _mm512_mask_storeu_ps(to + 16, h, _mm512_add_ps(_mm512_maskz_loadu_ps(h, to + 16), high));
    } else {
      if (out.bias) {
        low = _mm512_add_ps(low, low_bias);
        high = _mm512_add_ps(high, high_bias);
      }
      if (out.relu) {
        low = positive(low);
        high = positive(high);
      }
      const __m512i to = rounded(low, high);
      const int64_t at = (row + i) * out.stride + column;
      _mm512_mask_storeu_epi16((bf16*)out.data + at, mask, to);
      if (out.rest)
        _mm512_mask_storeu_epi16(out.rest + at, mask,
                                 rounded(rest_of(low, _mm512_castsi512_si256(to)),
                                         rest_of(high, _mm512_extracti64x4_epi64(to, 1))));
    }
  }
}

void pack_columns(const AmxMatrix& b, int64_t begin, int64_t columns, void* to) {
  const bf16* from = b.data + begin * b.column_step;
  for (int64_t j = 0; j < columns; j += kAmxBlock)
    pack(from + j * b.column_step, b.column_step, b.row_step,
         columns - j < kAmxBlock ? columns - j : kAmxBlock, b.rows, false,
         (bf16*)to + j / kAmxBlock * amx_panel(b.rows));
}

void multiply(const AmxMatrix& a, const void* packed, int64_t columns, AmxResult out,
              void* scratch) {
  const int64_t terms = a.columns, blocks = amx_blocks(terms), panel = amx_panel(terms);
  // Rows are read where they lie, unless they would share sets of the first-level cache.
  const bool direct = a.column_step == 1 && terms % kAmxBlock == 0 && a.row_step <= 512;
  alignas(64) float sums[1024];
  const Tiles tiles;
  for (int64_t i = 0; i < a.rows; i += kAmxBlock) {
    const int64_t rows = a.rows - i < kAmxBlock ? a.rows - i : kAmxBlock;
    const bf16* from = a.data + i * a.row_step;
    const bf16* rest = a.rest ? a.rest + i * a.row_step : nullptr;
    const bool here = direct && rows % 16 == 0;
    if (!here) {
      bf16* const left = (bf16*)scratch;
      pack(from, a.row_step, a.column_step, rows, terms, true, left);
      if (rest) pack(rest, a.row_step, a.column_step, rows, terms, true, left + panel);
      from = left;
      rest = rest ? left + panel : nullptr;
    }
    for (int64_t j = 0; j < columns; j += kAmxBlock) {
      const bf16* right = (const bf16*)packed + j / kAmxBlock * panel;
      if (here)
        multiply_block(from, rest, 2 * a.row_step, 32 * a.row_step, 64, right, blocks, rows <= 16,
                       sums);
      else
        multiply_block(from, rest, 64, 2 * kRegister, 2 * kBlock, right, blocks, rows <= 16, sums);
      leave(sums, out, i, j, rows, columns - j);
    }
  }
}

constexpr AmxTable kTable = {pack_columns, multiply};

#else

constexpr AmxTable kTable = {nullptr, nullptr};

#endif

}  // namespace

extern const AmxTable amx_table;
const AmxTable amx_table = kTable;

}  // namespace SOLERA_ISA
}  // namespace solera
