// 2^x and log2 x on vectors, for kernels whose time is exponentials: float and double, no special
// cases but those a log-domain loop meets.
#pragma once

#include "simd.h"

namespace solera {
namespace SOLERA_ISA {

// The exponents of normal numbers: below `smallest` fast_exp2 stays at 2^smallest, from `largest`
// on it is infinite.
template <class T>
struct Exponents;
template <>
struct Exponents<float> {
  static constexpr float smallest = -126.0f, largest = 128.0f;
};
template <>
struct Exponents<double> {
  static constexpr double smallest = -1022.0, largest = 1024.0;
};

// While it lives, subnormal results are 0 on this thread: on x86 each costs over 100 cycles, and a
// plan with a small epsilon is full of them. Other architectures compute them at full speed.
struct FlushSubnormals {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  SOLERA_INLINE FlushSubnormals() { _mm_setcsr(before | 0x8000); }
  SOLERA_INLINE ~FlushSubnormals() { _mm_setcsr(before); }
#else
  SOLERA_INLINE FlushSubnormals() {}
  SOLERA_INLINE ~FlushSubnormals() {}
#endif
};

// max(low, x) that hands a NaN in x on.
template <class W, class S>
SOLERA_INLINE W at_least(S low, W x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return (W)_mm512_max_ps((__m512)splat(low), (__m512)x);
  else
    return (W)_mm512_max_pd((__m512d)splat(low), (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4)
    return (W)_mm256_max_ps((__m256)splat(low), (__m256)x);
  else
    return (W)_mm256_max_pd((__m256d)splat(low), (__m256d)x);
#else
  return splat(low) > x ? splat(low) : x;
#endif
}
template <class W, class S>
SOLERA_INLINE W at_most(S high, W x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return (W)_mm512_min_ps((__m512)splat(high), (__m512)x);
  else
    return (W)_mm512_min_pd((__m512d)splat(high), (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4)
    return (W)_mm256_min_ps((__m256)splat(high), (__m256)x);
  else
    return (W)_mm256_min_pd((__m256d)splat(high), (__m256d)x);
#else
  return splat(high) < x ? splat(high) : x;
#endif
}

// Minimax polynomials of 2^t on [0, 1] (AVX-512) and on [-1/2, 1/2] (elsewhere), relative error
// 7.5e-8 for float and 3e-18 for double before rounding.
SOLERA_INLINE vf power(vf t) {
#if defined(__AVX512F__)
  vf p = splat(0.001877576766f);
  p = p * t + 0.008989339877f;
  p = p * t + 0.05582631823f;
  p = p * t + 0.240153617f;
  p = p * t + 0.6931530732f;
  p = p * t + 0.9999999251f;
#else
  vf p = splat(0.001327647263f);
  p = p * t + 0.009675541343f;
  p = p * t + 0.05550713272f;
  p = p * t + 0.2402211972f;
  p = p * t + 0.6931469671f;
  p = p * t + 1.000000072f;
#endif
  return p;
}
SOLERA_INLINE vd power(vd t) {
#if defined(__AVX512F__)
  vd p = splat(6.27243695713783512e-10);
  p = p * t + 6.5544557738570504e-9;
  p = p * t + 1.02544577142324723e-7;
  p = p * t + 1.320819344985004e-6;
  p = p * t + 0.0000152531902527511925;
  p = p * t + 0.000154035114462742881;
  p = p * t + 0.00133335586615834706;
  p = p * t + 0.00961812909879244896;
  p = p * t + 0.0555041086657111632;
  p = p * t + 0.240226506959054712;
  p = p * t + 0.693147180559946235;
  p = p * t + 0.999999999999999997;
#else
  vd p = splat(4.43528270695727715e-10);
  p = p * t + 7.0741056135081428e-9;
  p = p * t + 1.01781980216719308e-7;
  p = p * t + 1.32154330896763992e-6;
  p = p * t + 0.0000152527334899885256;
  p = p * t + 0.000154035304625144321;
  p = p * t + 0.00133335581467899217;
  p = p * t + 0.00961812910758833524;
  p = p * t + 0.0555041086648199216;
  p = p * t + 0.240226506959101562;
  p = p * t + 0.69314718055994533;
  p = p * t + 0.999999999999999997;
#endif
  return p;
}

// 2^x, never below the smallest normal number; inf from `largest` on; NaN stays NaN.
SOLERA_INLINE vf fast_exp2(vf x) {
  x = at_least(Exponents<float>::smallest, x);
#if defined(__AVX512F__)
  // scalef takes the floor of its second operand itself.
  vf t = (vf)_mm512_reduce_ps((__m512)x, 1);
  return (vf)_mm512_scalef_ps((__m512)power(t), (__m512)x);
#else
  vf capped = at_most(Exponents<float>::largest, x);
  vf shifted = capped + 12582912.0f;  // 1.5 * 2^23: the integer part ends up in the low bits
  vf t = capped - (shifted - 12582912.0f);
  vf y = bits_as<vf>(bits_as<vi>(power(t)) + (bits_as<vi>(shifted) << 23));
  // At 2^128 the polynomial's last bit would make a NaN of infinity.
  return x >= Exponents<float>::largest ? splat(__builtin_inff()) : y;
#endif
}
SOLERA_INLINE vd fast_exp2(vd x) {
  x = at_least(Exponents<double>::smallest, x);
#if defined(__AVX512F__)
  vd t = (vd)_mm512_reduce_pd((__m512d)x, 1);
  return (vd)_mm512_scalef_pd((__m512d)power(t), (__m512d)x);
#else
  x = at_most(Exponents<double>::largest, x);
  vd shifted = x + 6755399441055744.0;  // 1.5 * 2^52
  vd t = x - (shifted - 6755399441055744.0);
  return bits_as<vd>(bits_as<vl>(power(t)) + (bits_as<vl>(shifted) << 52));
#endif
}

// log2 of positive normal numbers: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2
// atanh((m-1)/(m+1)). Others give some number: their bits less those of sqrt(1/2) may wrap around.
SOLERA_INLINE vf fast_log2(vf x) {
  vi bits = (vi)(bits_as<vu>(x) - 0x3f3504f3u);
  vf e = __builtin_convertvector(bits >> 23, vf);
  vf m = bits_as<vf>((bits & 0x7fffff) + 0x3f3504f3);
  vf s = (m - 1.0f) / (m + 1.0f), q = s * s;
  vf p = splat(2.0f / 9) * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  p = p * q + 2.0f;
  return e + p * s * 1.44269504088896341f;
}
typedef uint64_t vul __attribute__((vector_size(SOLERA_VECTOR_BYTES)));
SOLERA_INLINE vd fast_log2(vd x) {
  vl bits = (vl)(bits_as<vul>(x) - 0x3fe6a09e667f3bcdull);
  vd e = __builtin_convertvector(bits >> 52, vd);
  vd m = bits_as<vd>((bits & 0xfffffffffffffll) + 0x3fe6a09e667f3bcdll);
  vd s = (m - 1.0) / (m + 1.0), q = s * s, p = splat(2.0 / 23);
  for (int k = 21; k >= 1; k -= 2) p = p * q + 2.0 / k;
  return e + p * s * 1.4426950408889634074;
}
// The first n lanes of a vector, the rest 0; one masked load where there is one.
template <class T>
SOLERA_INLINE AccVec<T> load_tail(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (AccVec<T>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  else
    return (AccVec<T>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#else
  return load_n(p, n);
#endif
}

}  // namespace SOLERA_ISA
}  // namespace solera
