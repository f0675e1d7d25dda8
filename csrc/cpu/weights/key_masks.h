// Keys of magnitudes, which are integers in the order of the magnitudes, compared lane by lane.
#pragma once
#include "../simd.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

// Comparisons of keys, counts of the lanes that pass, and those lanes written to `out` in order (a
// whole vector may be written; returns how many there were).
#if defined(__AVX512F__)
SOLERA_INLINE __mmask16 beyond(vi a, vi b) {
  return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b);
}
SOLERA_INLINE __mmask8 beyond(vl a, vl b) {
  return _mm512_cmpgt_epi64_mask((__m512i)a, (__m512i)b);
}
SOLERA_INLINE __mmask16 equal(vi a, vi b) {
  return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b);
}
SOLERA_INLINE __mmask8 equal(vl a, vl b) { return _mm512_cmpeq_epi64_mask((__m512i)a, (__m512i)b); }
SOLERA_INLINE __mmask16 both(__mmask16 a, __mmask16 b) { return _kand_mask16(a, b); }
SOLERA_INLINE __mmask8 both(__mmask8 a, __mmask8 b) { return _kand_mask8(a, b); }
SOLERA_INLINE __mmask16 first_lanes(int n, __mmask16) { return __mmask16((1u << n) - 1); }
SOLERA_INLINE __mmask8 first_lanes(int n, __mmask8) { return __mmask8((1u << n) - 1); }
SOLERA_INLINE void tally(vi& counts, __mmask16 m) {
  counts = (vi)_mm512_mask_sub_epi32((__m512i)counts, m, (__m512i)counts, _mm512_set1_epi32(-1));
}
SOLERA_INLINE void tally(vl& counts, __mmask8 m) {
  counts = (vl)_mm512_mask_sub_epi64((__m512i)counts, m, (__m512i)counts, _mm512_set1_epi64(-1));
}
SOLERA_INLINE int append(int32_t* out, vi v, __mmask16 m) {
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(m, (__m512i)v));
  return __builtin_popcount(m);
}
SOLERA_INLINE int append(int64_t* out, vl v, __mmask8 m) {
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(m, (__m512i)v));
  return __builtin_popcount(m);
}
#else
template <class K>
SOLERA_INLINE K beyond(K a, K b) {
  return (K)(a > b);
}
template <class K>
SOLERA_INLINE K equal(K a, K b) {
  return (K)(a == b);
}
template <class K>
SOLERA_INLINE K both(K a, K b) {
  return a & b;
}
template <class K>
SOLERA_INLINE K first_lanes(int n, K mask) {
  for (int i = 0; i < int(sizeof(K) / sizeof(mask[0])); ++i) mask[i] = -(i < n);
  return mask;
}
template <class K>
SOLERA_INLINE void tally(K& counts, K mask) {
  counts -= mask;
}
template <class N, class K>
SOLERA_INLINE int append(N* out, K v, K mask) {
#if defined(__AVX2__)
  if (_mm256_testz_si256((__m256i)mask, (__m256i)mask)) return 0;
#endif
  int n = 0;
  for (int i = 0; i < int(sizeof(K) / sizeof(N)); ++i) {
    out[n] = v[i];
    n -= int(mask[i]);
  }
  return n;
}
#endif

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
