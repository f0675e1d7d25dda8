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

// 1 / (1 + exp(-z)) without a division: the reciprocal's estimate and one Newton step, 1e-7 of the
// value. The exponential is capped where its reciprocal is still a normal number, and past that the
// result is 0.
SOLERA_INLINE vf sigmoid(vf z) {
#if defined(__AVX512F__)
  const vf t = z * -1.44269504088896341f;
  const vf e = 1.0f + fast_exp2(at_most(125.0f, t));
  const vf r = (vf)_mm512_rcp14_ps((__m512)e);
  return t > 125.0f ? vf{} : r + r * (1.0f - e * r);
#else
  return 1 / (1 + fast_exp2(z * -1.44269504088896341f));
#endif
}
SOLERA_INLINE vd sigmoid(vd z) { return 1 / (1 + expv(-z)); }
template <class V>
SOLERA_INLINE V act(V z, int activation) {
  if (activation == kSilu) return z * sigmoid(z);
  if (activation == kSigmoid) return sigmoid(z);
  return activate(z, activation);
}
template <class V>
SOLERA_INLINE V act_slope(V dy, V z, int activation) {
  if (activation == kSilu) {
    const V s = sigmoid(z);
    return dy * (s + z * (s - s * s));
  }
  if (activation == kSigmoid) {
    const V s = sigmoid(z);
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
  for (; j + 4 * L <= n; j += 4 * L)
    for (int v = 0; v < 4; ++v) s[v] += take(x + j + v * L, L);
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
