// Products of float32 matrices in vector registers; what for, and the order of the sums, in
// float_product.h.
//
// A block of R rows by V vectors of columns keeps its sums in registers over all terms. A term
// costs V loads of b, R loads of a spread over a vector and R V multiply-adds, two of which start
// in a cycle, as two loads do: 6 by 4 of 32 registers, or 6 by 2 of 16, are bound by arithmetic.
#include "float_product.h"

#include "../amx.h"
#include "lanes.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

#if defined(__AVX512F__) || defined(__AVX2__)

constexpr int L = kLanes<float>, kMostVectors = L == 16 ? 4 : 2;

// A block of the result from row `row` and column `column` on; `last` lanes of its last vector.
template <int R, int V, bool kTail>
SOLERA_INLINE void block(const FloatMatrix& a, const FloatMatrix& b, const FloatResult& out,
                         FloatAhead& ahead, int64_t row, int64_t column, int last) {
  const float* left = a.data + row * a.row_step;
  const float* right = b.data + column;
  const int64_t row_step = a.row_step, term = a.column_step, next = b.row_step;
  vf sum[R][V] = {};
  if (out.bias)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const vf bias = lanes_of(out.bias + column + v * L, kTail && v == V - 1 ? last : L);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) sum[r][v] = bias;
    }
  const char* later = (const char*)ahead.begin;
  const int64_t line = ahead.begin < ahead.end ? 64 : 0;
  for (int64_t k = 0; k < a.columns; ++k, left += term, right += next, later += line) {
    __builtin_prefetch(later, 0, 2);
    vf w[V];
    for (int v = 0; v < V; ++v)
      w[v] = kTail && v == V - 1 ? lanes_of(right + v * L, last) : load(right + v * L);
    for (int r = 0; r < R; ++r) {
      const vf x = rounded(splat(left[r * row_step]));  // once, not with each multiply-add
      for (int v = 0; v < V; ++v) sum[r][v] += x * w[v];
    }
  }
  ahead.begin = later;
  float* to = out.data + row * out.stride + column;
  const auto each = [&](const auto& change) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        sum[r][v] = change(sum[r][v], r * out.stride + v * L, v, kTail && v == V - 1 ? last : L);
  };
  if (out.add) each([&](vf s, int64_t i, int, int n) { return s + lanes_of(to + i, n); });
  if (out.relu) each([&](vf s, int64_t, int, int) { return at_least(0.0f, s); });
  if (out.gate) {
    const float* gate = out.gate + row * out.stride + column;
    each([&](vf s, int64_t i, int, int n) { return lanes_of(gate + i, n) <= 0 ? vf{} : s; });
  }
  each([&](vf s, int64_t i, int, int n) {
    set_lanes(to + i, s, n);
    return s;
  });
  if (out.sums) {
    vf total[V] = {};
    each([&](vf s, int64_t, int v, int) {
      total[v] += s;
      return s;
    });
    for (int v = 0; v < V; ++v) {
      const int n = kTail && v == V - 1 ? last : L;
      float* sums = out.sums + column + v * L;
      set_lanes(sums, lanes_of(sums, n) + total[v], n);
    }
  }
}

// V vectors of columns, all rows: as many at a time as registers hold, then what is left.
template <int R, int V, bool kTail>
void panel(const FloatMatrix a, const FloatMatrix b, const FloatResult out, FloatAhead& ahead,
           int64_t column, int last) {
  int64_t row = 0;
  for (; row + R <= a.rows; row += R) block<R, V, kTail>(a, b, out, ahead, row, column, last);
  for (; row + 4 <= a.rows; row += 4) block<4, V, kTail>(a, b, out, ahead, row, column, last);
  for (; row < a.rows; ++row) block<1, V, kTail>(a, b, out, ahead, row, column, last);
}

template <int R, int V>
void panel(const FloatMatrix& a, const FloatMatrix& b, const FloatResult& out, FloatAhead& ahead,
           int64_t column) {
  const int64_t left = b.columns - column;
  if (left >= V * L)
    panel<R, V, false>(a, b, out, ahead, column, L);
  else
    panel<R, V, true>(a, b, out, ahead, column, int(left - (V - 1) * L));
}

void multiply(const FloatMatrix& a, const FloatMatrix& b, const FloatResult& out,
              const FloatAhead& wanted) {
  FloatAhead ahead = wanted;
  int64_t j = 0;
  if constexpr (kMostVectors == 4)
    for (; b.columns - j > 3 * L; j += 4 * L) panel<6, 4>(a, b, out, ahead, j);
  for (; b.columns - j > L; j += 2 * L) panel<kMostVectors == 4 ? 12 : 6, 2>(a, b, out, ahead, j);
  if (j < b.columns) panel<12, 1>(a, b, out, ahead, j);
}

void transpose(const float* from, int64_t row_step, int64_t rows, int64_t columns, float* to,
               int64_t step) {
  constexpr int64_t kBlock = 16;
  for (int64_t i = 0; i < rows; i += kBlock) {
    const int64_t m = rows - i < kBlock ? rows - i : kBlock;
    for (int64_t j = 0; j < columns; j += kBlock) {
      const int64_t n = columns - j < kBlock ? columns - j : kBlock;
      const float* source = from + i * row_step + j;
      float* target = to + j * step + i;
#if SOLERA_TILES
      const __mmask16 in = __mmask16((1u << n) - 1), across = __mmask16((1u << m) - 1);
      __m512i r[16];
      for (int64_t a = 0; a < 16; ++a)
        r[a] = a < m ? _mm512_maskz_loadu_epi32(in, source + a * row_step) : _mm512_setzero_si512();
      transpose_pairs(r);
      for (int64_t a = 0; a < n; ++a) _mm512_mask_storeu_epi32(target + a * step, across, r[a]);
#else
      for (int64_t b = 0; b < n; ++b)
        for (int64_t a = 0; a < m; ++a) target[b * step + a] = source[a * row_step + b];
#endif
    }
  }
}

constexpr FloatTable kTable = {multiply, transpose};

#else

constexpr FloatTable kTable = {nullptr, nullptr};

#endif

}  // namespace

extern const FloatTable float_table;
const FloatTable float_table = kTable;

}  // namespace SOLERA_ISA
}  // namespace solera
