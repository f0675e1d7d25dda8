// Choices of lanes for a vote: which are kept, which agree.
#pragma once
#include "../simd.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

// Masks: a bit a lane where the processor has registers for that, else all bits of a lane set or
// none.
#if defined(__AVX512F__)
template <class A>
struct MaskOf;
template <>
struct MaskOf<float> {
  typedef __mmask16 type;
};
template <>
struct MaskOf<double> {
  typedef __mmask8 type;
};
template <class A>
using M = typename MaskOf<A>::type;
SOLERA_INLINE __mmask16 below(vf a, vf b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
}
SOLERA_INLINE __mmask8 below(vd a, vd b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LT_OQ);
}
SOLERA_INLINE __mmask16 up_to(vf a, vf b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
}
SOLERA_INLINE __mmask8 up_to(vd a, vd b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LE_OQ);
}
SOLERA_INLINE vf where(__mmask16 mask, vf a, vf b) {
  return (vf)_mm512_mask_blend_ps(mask, (__m512)b, (__m512)a);
}
SOLERA_INLINE vd where(__mmask8 mask, vd a, vd b) {
  return (vd)_mm512_mask_blend_pd(mask, (__m512d)b, (__m512d)a);
}
SOLERA_INLINE vf where(__mmask16 mask, vf v) { return (vf)_mm512_maskz_mov_ps(mask, (__m512)v); }
SOLERA_INLINE vd where(__mmask8 mask, vd v) { return (vd)_mm512_maskz_mov_pd(mask, (__m512d)v); }
SOLERA_INLINE void add_where(__mmask16 mask, vf& sum, vf v) {
  sum = (vf)_mm512_mask_add_ps((__m512)sum, mask, (__m512)sum, (__m512)v);
}
SOLERA_INLINE void add_where(__mmask8 mask, vd& sum, vd v) {
  sum = (vd)_mm512_mask_add_pd((__m512d)sum, mask, (__m512d)sum, (__m512d)v);
}
#else
template <class A>
using M = KeyVec<A>;
template <class W>
SOLERA_INLINE auto below(W a, W b) {
  return a < b;
}
template <class W>
SOLERA_INLINE auto up_to(W a, W b) {
  return a <= b;
}
template <class N, class W>
SOLERA_INLINE W where(N mask, W a, W b) {
  return mask ? a : b;
}
template <class N, class W>
SOLERA_INLINE W where(N mask, W v) {
  return bits_as<W>(bits_as<N>(v) & mask);
}
template <class N, class W>
SOLERA_INLINE void add_where(N mask, W& sum, W v) {
  sum += where(mask, v);  // zero in the other lanes, and a sum is never -0
}
#endif

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
