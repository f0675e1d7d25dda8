// Vectors, dtypes and reductions shared by the CPU kernels.
//
// A kernel file is compiled once per instruction set (setup.py passes SOLERA_ISA = generic, avx2 or
// avx512 with the matching flags) and once more for nothing: the generic object also carries the
// registration at the file's foot. Everything here lives in `namespace solera::SOLERA_ISA`, so that
// no inline function compiled for a wide machine can be picked by the linker for a narrow one; for
// the same reason this header includes no C++ library header with inline code of its own.
//
// Vectors are compiler vector extensions (GCC and clang, any architecture): arithmetic, comparison
// and `mask ? a : b` are spelled with the usual operators.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef SOLERA_ISA
#define SOLERA_ISA generic
#endif

#if defined(__AVX512F__)
#define SOLERA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SOLERA_VECTOR_BYTES 32
#else
#define SOLERA_VECTOR_BYTES 16
#endif

#define SOLERA_INLINE inline __attribute__((always_inline))

namespace solera {

// Storage types. Arithmetic never happens in them.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Values of a dtype travel between the torch-facing code and the kernels as this code.
enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

namespace SOLERA_ISA {

typedef float vf __attribute__((vector_size(SOLERA_VECTOR_BYTES)));
typedef double vd __attribute__((vector_size(SOLERA_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(SOLERA_VECTOR_BYTES)));
typedef int64_t vl __attribute__((vector_size(SOLERA_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(SOLERA_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(SOLERA_VECTOR_BYTES / 2)));

// Acc<T>: the type a dtype is computed in. Vec<A>: its vector and its lane count.
template <class T>
struct Acc {
  typedef float type;
};
template <>
struct Acc<double> {
  typedef double type;
};
template <class A>
struct Vec;
template <>
struct Vec<float> {
  typedef vf type;
  static constexpr int lanes = SOLERA_VECTOR_BYTES / 4;
};
template <>
struct Vec<double> {
  typedef vd type;
  static constexpr int lanes = SOLERA_VECTOR_BYTES / 8;
};
template <class T>
using AccVec = typename Vec<typename Acc<T>::type>::type;
template <class T>
constexpr int kLanes = Vec<typename Acc<T>::type>::lanes;

SOLERA_INLINE vf splat(float x) { return x - vf{}; }
SOLERA_INLINE vd splat(double x) { return x - vd{}; }

template <class To, class From>
SOLERA_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To out;
  memcpy(&out, &x, sizeof(To));
  return out;
}

// ---- half-precision conversion: round to nearest even, NaN stays NaN ----

// GCC 12 converts vectors of 16-bit lanes half by half, hence the intrinsics.
SOLERA_INLINE vu extend(vh h) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, vu);
#endif
}
// The low halves of lanes that are all below 2^16.
SOLERA_INLINE vh truncate(vu u) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)u);
#elif defined(__AVX2__)
  return (vh)_mm256_castsi256_si128(
      _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)u, (__m256i)u), 0x08));
#else
  return __builtin_convertvector(u, vh);
#endif
}

SOLERA_INLINE vf widen(vh h, bf16) { return bits_as<vf>(extend(h) << 16); }
SOLERA_INLINE vh narrow(vf x, bf16) {
  vu u = bits_as<vu>(x);
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu quiet = (u >> 16) | 0x40;
  return truncate(x == x ? rounded : quiet);
}

SOLERA_INLINE float widen_one(bf16 h) { return bits_as<float>(uint32_t(h.bits) << 16); }
SOLERA_INLINE bf16 narrow_one(float x, bf16) {
  uint32_t u = bits_as<uint32_t>(x);
  if (x != x) return bf16{uint16_t((u >> 16) | 0x40)};
  return bf16{uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

SOLERA_INLINE float widen_one(f16 h) {
  // Exponent and mantissa moved into place, then scaled by 2^112: exact, subnormals included.
  uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = uint32_t(h.bits & 0x7fff) << 13;
  if ((h.bits & 0x7c00) == 0x7c00) return bits_as<float>(sign | rest | 0x7f800000);
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(rest) * 0x1p112f));
}
SOLERA_INLINE f16 narrow_one(float x, f16) {
  uint32_t u = bits_as<uint32_t>(x), sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return f16{uint16_t(sign | 0x7e00)};
  if (u >= 0x477ff000) return f16{uint16_t(sign | 0x7c00)};
  if (u < 0x38800000)  // subnormal: adding 0.5 lets the float unit round to a multiple of 2^-24
    return f16{uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(u) + 0.5f) - 0x3f000000))};
  return f16{uint16_t(sign | ((u + 0xfff + ((u >> 13) & 1) - 0x38000000) >> 13))};
}

#if defined(__AVX512F__)
SOLERA_INLINE vf widen(vh h, f16) { return (vf)_mm512_cvtph_ps((__m256i)h); }
SOLERA_INLINE vh narrow(vf x, f16) { return (vh)_mm512_cvtps_ph((__m512)x, 0); }
#elif defined(__AVX2__) && defined(__F16C__)
SOLERA_INLINE vf widen(vh h, f16) { return (vf)_mm256_cvtph_ps((__m128i)h); }
SOLERA_INLINE vh narrow(vf x, f16) { return (vh)_mm256_cvtps_ph((__m256)x, 0); }
#else
SOLERA_INLINE vf widen(vh h, f16) {
  vf out;
  for (int i = 0; i < kLanes<float>; ++i) out[i] = widen_one(f16{h[i]});
  return out;
}
SOLERA_INLINE vh narrow(vf x, f16) {
  vh out;
  for (int i = 0; i < kLanes<float>; ++i) out[i] = narrow_one(x[i], f16{}).bits;
  return out;
}
#endif

// ---- loads and stores: any alignment; the *_n forms touch exactly n lanes, the rest read as 0
// ----

SOLERA_INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
SOLERA_INLINE vd load(const double* p) {
  vd v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class H>
SOLERA_INLINE vf load(const H* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return widen(h, H{});
}
SOLERA_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
SOLERA_INLINE void store(double* p, vd v) { memcpy(p, &v, sizeof v); }
template <class H>
SOLERA_INLINE void store(H* p, vf v) {
  vh h = narrow(v, H{});
  memcpy(p, &h, sizeof h);
}

template <class T>
SOLERA_INLINE AccVec<T> load_n(const T* p, int n) {
  T buffer[kLanes<T>];
  memset((void*)buffer, 0, sizeof buffer);
  memcpy((void*)buffer, p, size_t(n) * sizeof(T));
  return load(buffer);
}
template <class T>
SOLERA_INLINE void store_n(T* p, AccVec<T> v, int n) {
  T buffer[kLanes<T>];
  store(buffer, v);
  memcpy((void*)p, buffer, size_t(n) * sizeof(T));
}

// Streaming store: past the caches, for outputs larger than them. p must be aligned to the stored
// width; finish a region with stream_fence() before other threads read it.
#if defined(__AVX512F__)
SOLERA_INLINE void stream(float* p, vf v) { _mm512_stream_ps(p, (__m512)v); }
SOLERA_INLINE void stream(double* p, vd v) { _mm512_stream_pd(p, (__m512d)v); }
template <class H>
SOLERA_INLINE void stream(H* p, vf v) {
  _mm256_stream_si256((__m256i*)p, (__m256i)narrow(v, H{}));
}
SOLERA_INLINE void stream_fence() { _mm_sfence(); }
#elif defined(__AVX2__)
SOLERA_INLINE void stream(float* p, vf v) { _mm256_stream_ps(p, (__m256)v); }
SOLERA_INLINE void stream(double* p, vd v) { _mm256_stream_pd(p, (__m256d)v); }
template <class H>
SOLERA_INLINE void stream(H* p, vf v) {
  _mm_stream_si128((__m128i*)p, (__m128i)narrow(v, H{}));
}
SOLERA_INLINE void stream_fence() { _mm_sfence(); }
#else
template <class T>
SOLERA_INLINE void stream(T* p, AccVec<T> v) {
  store(p, v);
}
SOLERA_INLINE void stream_fence() {}
#endif

template <class T>
SOLERA_INLINE bool can_stream(const T* p) {
  return uintptr_t(p) % (kLanes<T> * sizeof(T)) == 0;
}

// ---- horizontal reductions, always in the same order ----

template <class V>
SOLERA_INLINE auto lane_sum(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  decltype(v[0] + v[0]) lane[n];
  memcpy(lane, &v, sizeof v);
  for (int step = n / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  return lane[0];
}
#if defined(__AVX512F__)
// The same additions in the same order, without leaving the registers. (_mm512_reduce_add_* and the
// casts to halves do as much, but warn of their own uninitialised operands in GCC 12.)
SOLERA_INLINE double lane_sum(vd v) {
  const __m256d low = _mm512_maskz_extractf64x4_pd(0xff, (__m512d)v, 0);
  const __m256d h = _mm256_add_pd(low, _mm512_maskz_extractf64x4_pd(0xff, (__m512d)v, 1));
  const __m128d q = _mm_add_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
  return _mm_cvtsd_f64(_mm_add_sd(q, _mm_unpackhi_pd(q, q)));
}
SOLERA_INLINE float lane_sum(vf v) {
  const __m512d wide = _mm512_castps_pd((__m512)v);
  const __m256 low = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xff, wide, 0));
  const __m256 high = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xff, wide, 1));
  const __m256 h = _mm256_add_ps(low, high);
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 e = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(e, _mm_shuffle_ps(e, e, 1)));
}
#elif defined(__AVX2__)
SOLERA_INLINE double lane_sum(vd v) {
  const __m128d low = _mm256_castpd256_pd128((__m256d)v);
  const __m128d q = _mm_add_pd(low, _mm256_extractf128_pd((__m256d)v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(q, _mm_unpackhi_pd(q, q)));
}
SOLERA_INLINE float lane_sum(vf v) {
  const __m128 low = _mm256_castps256_ps128((__m256)v);
  const __m128 q = _mm_add_ps(low, _mm256_extractf128_ps((__m256)v, 1));
  const __m128 e = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(e, _mm_shuffle_ps(e, e, 1)));
}
#endif
template <class V>
SOLERA_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
SOLERA_INLINE auto lane_max(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  auto out = v[0];
  for (int i = 1; i < n; ++i) out = v[i] > out ? v[i] : out;
  return out;
}

// The product or sum as rounded on its own, not contracted into a fused multiply-add with what
// follows: where the same value is subtracted from itself elsewhere, both must have been rounded
// alike. (An empty asm statement; __builtin_assoc_barrier does the same but takes vectors apart
// lane by lane in GCC 12.)
template <class V>
SOLERA_INLINE V rounded(V v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

// Calls f(Flag<true>{}) or f(Flag<false>{}): a loop's branch on something fixed, taken outside the
// loop.
template <bool B>
struct Flag {
  static constexpr bool value = B;
};
template <class F>
SOLERA_INLINE void with_flag(bool b, const F& f) {
  if (b)
    f(Flag<true>{});
  else
    f(Flag<false>{});
}

SOLERA_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
SOLERA_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// 2^x by range reduction to [-1/2, 1/2] and a degree-6 minimax polynomial: about 1 ulp.
// Inputs below -126 give 0 (subnormals are flushed), above 128 give inf; NaN stays NaN.
SOLERA_INLINE vf exp2v(vf x) {
  vf clamped = x > 128.0f ? splat(128.0f) : x;
  clamped = clamped < -127.0f ? splat(-127.0f) : clamped;
#if defined(__AVX512F__)
  vf whole = (vf)_mm512_roundscale_ps((__m512)clamped, 0);
#elif defined(__AVX2__)
  vf whole = (vf)_mm256_round_ps((__m256)clamped, 0 | _MM_FROUND_NO_EXC);
#else
  vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf whole = (clamped + magic) - magic;
#endif
  vf t = clamped - whole;
  vf p = splat(1.535336188319500e-4f);
  p = p * t + 1.339887440266574e-3f;
  p = p * t + 9.618437357674640e-3f;
  p = p * t + 5.550332471162809e-2f;
  p = p * t + 2.402264791363012e-1f;
  p = p * t + 6.931472028550421e-1f;
  p = p * t + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps(
      (__m512)p, (__m512)(x < -126.0f ? splat(-300.0f) : (x > 128.0f ? splat(300.0f) : whole)));
#else
  vf half = bits_as<vf>((__builtin_convertvector(whole * 0.5f, vi) + 127) << 23);
  vf rest = bits_as<vf>(
      (__builtin_convertvector(whole, vi) - __builtin_convertvector(whole * 0.5f, vi) + 127) << 23);
  vf result = p * half * rest;
  return x < -126.0f ? splat(0.0f) : (x > 128.0f ? splat(__builtin_inff()) : result);
#endif
}
SOLERA_INLINE vf expv(vf x) { return exp2v(x * 1.44269504088896341f); }
SOLERA_INLINE vd exp2v(vd x) {
  for (int i = 0; i < Vec<double>::lanes; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}
SOLERA_INLINE vd expv(vd x) {
  for (int i = 0; i < Vec<double>::lanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace SOLERA_ISA
}  // namespace solera
