// e^u and log, accurate to a last place or two: what softmax and its gradients are made of.
#pragma once
#include "exponential.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

// e^u for u <= 80: u = n ln 2 + t with ln 2 in two parts, so that the error does
// not grow with |u|, then Cephes' polynomial. Exactly 1 at 0 and 0 below the smallest normal
// number; NaN stays NaN. Gradients are differences of such values: fast_exp2's 7.5e-8 would show in
// them.
SOLERA_INLINE vf natural_exp(vf u) {
#if defined(__AVX512F__)
  // What is too small, -inf with it, is masked away at the end: no clamp, no assist for subnormals.
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)u, (__m512)splat(-87.3f), _CMP_NLT_UQ);
  const vf x = u;
  const vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
#else
  // What is too small is replaced at the end, -inf with it.
  const vf x = u;
  const vf n = rounded(x * 1.44269504f + splat(12582912.0f)) - 12582912.0f;
#endif
  const vf t = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * t + 1.3981999507e-3f;
  p = p * t + 8.3334519073e-3f;
  p = p * t + 4.1665795894e-2f;
  p = p * t + 1.6666665459e-1f;
  p = p * t + 5.0000001201e-1f;
  p = p * (t * t) + t + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  // Unsigned: where u is too small the sum wraps, and is replaced below.
  const vf y = bits_as<vf>(bits_as<vu>(p) + (vu(__builtin_convertvector(n, vi)) << 23));
#if defined(__x86_64__)
  return u < -87.3f ? splat(0.0f) : y;  // a NaN's n becomes 0x80000000: y is p, that NaN
#else
  const vf low = u < -87.3f ? splat(0.0f) : y;
  return u == u ? low : u;
#endif
#endif
}
SOLERA_INLINE vd natural_exp(vd u) { return u < -708.3 ? splat(0.0) : expv(u); }

// log of a positive normal number.
SOLERA_INLINE vf natural_log(vf x) { return fast_log2(x) * 0.69314718055994531f; }
SOLERA_INLINE vd natural_log(vd x) { return fast_log2(x) * 0.69314718055994531; }

SOLERA_INLINE float natural_exp_one(float u) { return __builtin_expf(u); }
SOLERA_INLINE double natural_exp_one(double u) { return __builtin_exp(u); }
SOLERA_INLINE float natural_log_one(float u) { return __builtin_logf(u); }
SOLERA_INLINE double natural_log_one(double u) { return __builtin_log(u); }
SOLERA_INLINE float lowest_of(float) { return -__FLT_MAX__; }
SOLERA_INLINE double lowest_of(double) { return -__DBL_MAX__; }
SOLERA_INLINE float smallest_normal(float) { return __FLT_MIN__; }
SOLERA_INLINE double smallest_normal(double) { return __DBL_MIN__; }

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
