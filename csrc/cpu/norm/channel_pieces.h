// What the passes of channel_norm.cpp are made of: whole and partial vectors, activations, the
// piece of the work at hand, sums over a row.
#pragma once

#include "channel_norm.h"

#include "../activation.h"
#include "../exponential.h"
#include "../strips.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

// Loads and stores of the first n lanes; n is constant and a whole vector but at a row's end.
template <class T>
SOLERA_INLINE AccVec<T> take(const T* p, int n) {
  if (n == kLanes<T>) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    const __mmask16 mask = __mmask16((1u << n) - 1);
    return widen((vh)_mm256_maskz_loadu_epi16(mask, p), T{});
  } else if constexpr (sizeof(T) == 4) {
    return (vf)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  } else {
    return (vd)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
  }
#else
  return load_n(p, n);
#endif
}
template <class T>
SOLERA_INLINE void give(T* p, AccVec<T> v, int n, bool streaming) {
  if (n == kLanes<T>) {
    if (streaming)
      stream(p, v);
    else
      store(p, v);
    return;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)narrow(v, T{}));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
  }
#else
  store_n(p, v, n);
#endif
}
// Lanes from n on set to zero.
template <class T>
SOLERA_INLINE AccVec<T> only(AccVec<T> v, int n) {
  if (n == kLanes<T>) return v;
#if defined(__AVX512F__)
  if constexpr (sizeof(A<T>) == 4)
    return (AccVec<T>)_mm512_maskz_mov_ps(__mmask16((1u << n) - 1), (__m512)v);
  else
    return (AccVec<T>)_mm512_maskz_mov_pd(__mmask8((1u << n) - 1), (__m512d)v);
#else
  return keep<T>(v, n);
#endif
}

// Two vectors at once. Of bfloat16 that is the even and the odd elements of 2 L, which a shift and
// a mask take apart and put together: a third of the instructions of widening and narrowing in
// order. Where element and lane must correspond (coefficients by column), take and give.
template <class T>
struct Two {
  AccVec<T> one, other;
};
template <class T>
SOLERA_INLINE Two<T> take_two(const T* p) {
  return {load(p), load(p + kLanes<T>)};
}
SOLERA_INLINE Two<bf16> take_two(const bf16* p) {
  vu u;
  memcpy(&u, p, sizeof u);
  return {bits_as<vf>(u << 16), bits_as<vf>(u & 0xffff0000u)};
}
template <class T>
SOLERA_INLINE void give_two(T* p, const Two<T>& v, bool streaming) {
  give(p, v.one, kLanes<T>, streaming);
  give(p + kLanes<T>, v.other, kLanes<T>, streaming);
}
// Rounded to nearest even in the upper half. NaN stays as it is: an operation made it, or it came
// from a bfloat16, so its upper half alone is NaN.
SOLERA_INLINE vu upper(vf x) {
  const vu u = bits_as<vu>(x);
  return x == x ? u + (((u >> 16) & 1) + 0x7fff) : u;
}
SOLERA_INLINE void give_two(bf16* p, const Two<bf16>& v, bool streaming) {
  const vu u = (upper(v.one) >> 16) | (upper(v.other) & 0xffff0000u);
  if (streaming)
    stream((float*)p, bits_as<vf>(u));
  else
    memcpy(p, &u, sizeof u);
}
template <class T>
SOLERA_INLINE bool can_stream_two(const T* p) {
  return uintptr_t(p) % SOLERA_VECTOR_BYTES == 0;
}
// Asks for the line at p, to be used from L2.
SOLERA_INLINE void ask(const void* p) { __builtin_prefetch(p, 0, 2); }
// For the 2 L elements at p.
template <class T>
SOLERA_INLINE void ask_two(const T* p) {
  ask(p);
  if (sizeof(T) > 2) ask(p + kLanes<T>);
}

// 1 / (1 + exp(-z)) without a division: the reciprocal's estimate and one Newton step, 1e-7 of the
// value. Where the exponential is infinite the estimate is 0 and the step, capped, leaves it so.
SOLERA_INLINE vf sigmoid(vf z) {
#if defined(__AVX512F__)
  const vf t = z * -1.44269504088896341f;
  const vf part = (vf)_mm512_reduce_ps((__m512)t, 1);
  const vf e = 1.0f + (vf)_mm512_scalef_ps((__m512)power(part), (__m512)t);
  const vf r = (vf)_mm512_rcp14_ps((__m512)e);
  return r + r * (1.0f - at_most(3.4e38f, e) * r);
#else
  return 1 / (1 + fast_exp2(z * -1.44269504088896341f));
#endif
}
SOLERA_INLINE vd sigmoid(vd z) { return 1 / (1 + expv(-z)); }
// The same for what is rounded to bfloat16 afterwards, 7e-5 of the value; not for what is summed.
SOLERA_INLINE vf rough_sigmoid(vf z) {
#if defined(__AVX512F__)
  const vf t = z * -1.44269504088896341f;
  const vf r = (vf)_mm512_reduce_ps((__m512)t, 1);
  vf p = splat(0.01353416808f);
  p = p * r + 0.05201146143f;
  p = p * r + 0.2414427555f;
  p = p * r + 0.6930038351f;
  p = p * r + 1.000002593f;
  // 2^t of a large t is infinite, and the reciprocal of that 0.
  return (vf)_mm512_rcp14_ps((__m512)(1.0f + (vf)_mm512_scalef_ps((__m512)p, (__m512)t)));
#else
  return sigmoid(z);
#endif
}
template <class T>
SOLERA_INLINE AccVec<T> sigmoid_of(AccVec<T> z) {
  return sigmoid(z);
}
template <>
SOLERA_INLINE vf sigmoid_of<bf16>(vf z) {
  return rough_sigmoid(z);
}
template <class T>
SOLERA_INLINE AccVec<T> act(AccVec<T> z, int activation) {
  if (activation == kSilu) return z * sigmoid_of<T>(z);
  if (activation == kSigmoid) return sigmoid_of<T>(z);
  return activate(z, activation);
}
template <class T>
SOLERA_INLINE AccVec<T> act_slope(AccVec<T> dy, AccVec<T> z, int activation) {
  if (activation == kSilu) {
    const AccVec<T> s = sigmoid_of<T>(z);
    return dy * (s + z * (s - s * s));
  }
  if (activation == kSigmoid) {
    const AccVec<T> s = sigmoid_of<T>(z);
    return dy * (s - s * s);
  }
  return slope(dy, z, activation);
}

struct Piece {
  int64_t a, slab;
  int64_t row, rows, valid;   // first of M, how many, and how many of them are inside the length
  int64_t column, columns;    // of K
  int64_t data, stats, part;  // offsets of its first element in (A, M, K), (A, K), (A, slabs, K)
  SOLERA_INLINE Piece(const ChannelWork& w, int64_t i) {
    int64_t chunk = 0;
    a = i;
    slab = 0;
    if (w.chunks > 1) {  // divisions cost as much as a short row
      chunk = a % w.chunks;
      a /= w.chunks;
    }
    if (w.slabs > 1) {
      slab = a % w.slabs;
      a /= w.slabs;
    }
    row = slab * w.slab;
    rows = w.middle - row < w.slab ? w.middle - row : w.slab;
    valid = rows;
    if (w.lengths) {
      const int64_t left = w.lengths[a] - row;
      valid = left < 0 ? 0 : left < rows ? left : rows;
    }
    column = chunk * w.chunk;
    columns = w.inner - column < w.chunk ? w.inner - column : w.chunk;
    data = (a * w.middle + row) * w.inner + column;
    stats = a * w.inner + column;
    part = (a * w.slabs + slab) * w.inner + column;
  }
};

template <int kCode>
struct Code {
  static constexpr int value = kCode;
};
template <class F>
SOLERA_INLINE void with_activation(int activation, const F& f) {
  switch (activation) {
    case kRelu:
      return f(Code<kRelu>{});
    case kGelu:
      return f(Code<kGelu>{});
    case kSilu:
      return f(Code<kSilu>{});
    case kSigmoid:
      return f(Code<kSigmoid>{});
    default:
      return f(Code<kNone>{});
  }
}

template <class T>
SOLERA_INLINE A<T> total(int64_t n, const T* x) {
  constexpr int L = kLanes<T>;
  AccVec<T> s[4] = {};
  int64_t j = 0;
  for (; j + 4 * L <= n; j += 4 * L) {
    for (int v = 0; v < 4; v += 2) {
      const Two<T> two = take_two(x + j + v * L);
      s[v] += two.one;
      s[v + 1] += two.other;
    }
  }
  for (; j + L <= n; j += L) s[0] += take(x + j, L);
  if (j < n) s[1] += take(x + j, int(n - j));
  return lane_sum((s[0] + s[1]) + (s[2] + s[3]));
}

// What the deviations' own sum still says about the rounded mean.
template <class V, class S>
SOLERA_INLINE void correct(V& mean, V& square, V sum, S count) {
  const V shift = sum / count;
  mean += shift;
  square -= sum * shift;
  square = square < 0 ? V{} : square;
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
