// Activations and their derivatives on vectors, by the codes of python/solera/_activation.py.
#pragma once

#include "simd.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

enum : int { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3, kSigmoid = 4 };

// The normal distribution function and exp(-z^2/2). Near zero an odd polynomial in z, further out
// exp(-z^2/2) t P(t) with t = 1 / (1 + 0.35 |z|), fitted for this file: 1e-7 of the largest value.
SOLERA_INLINE void normal_cdf(vf z, vf& cdf, vf& bell) {
  vf a = z < 0 ? -z : z, u = z * z;
  bell = expv(u * -0.5f);
  vf p = splat(4.1155571186326275e-07f);
  p = p * u - 8.718302019400613e-06f;
  p = p * u + 0.00011435638491697361f;
  p = p * u - 0.0011864884846784344f;
  p = p * u + 0.009973241304377791f;
  p = p * u - 0.0664903350265112f;
  p = p * u + 0.39894227933791165f;
  vf t = 1.0f / (1.0f + 0.35f * a);
  vf q = splat(0.041896703389993725f);
  q = q * t - 0.10687591203031702f;
  q = q * t + 0.04146666303732552f;
  q = q * t + 0.031926204777293056f;
  q = q * t + 0.08998357404533877f;
  q = q * t + 0.1224055256404623f;
  q = q * t + 0.13963308544249262f;
  q = q * t + 0.13962978183403957f;
  vf tail = t * q * bell;
  cdf = a < 1.5f ? 0.5f + z * p : (z > 0 ? 1.0f - tail : tail);
  cdf = z == z ? cdf : z;
}
SOLERA_INLINE void normal_cdf(vd z, vd& cdf, vd& bell) {
  for (int i = 0; i < Vec<double>::lanes; ++i) {
    cdf[i] = 0.5 * __builtin_erfc(z[i] * -0.70710678118654752440);
    bell[i] = __builtin_exp(-0.5 * z[i] * z[i]);
  }
}

template <class V>
SOLERA_INLINE V activate(V z, int activation) {
  if (activation == kRelu) return z <= 0 ? V{} : z;
  if (activation == kSilu) return z / (1 + expv(-z));
  if (activation == kSigmoid) return 1 / (1 + expv(-z));
  if (activation == kGelu) {
    V cdf, bell;
    normal_cdf(z, cdf, bell);
    return z * cdf;
  }
  return z;
}
// dy * act'(v); for relu v may be the activation's input or its output. Not for kNone.
template <class V>
SOLERA_INLINE V slope(V dy, V v, int activation) {
  if (activation == kRelu) return v <= 0 ? V{} : dy;
  if (activation == kSilu) {
    V sigmoid = 1 / (1 + expv(-v));
    return dy * sigmoid * (1 + v * (1 - sigmoid));
  }
  if (activation == kSigmoid) {
    V sigmoid = 1 / (1 + expv(-v));
    return dy * sigmoid * (1 - sigmoid);
  }
  V cdf, bell;
  normal_cdf(v, cdf, bell);
  const auto scale = decltype(v[0] + v[0])(0.39894228040143267794);
  return dy * (cdf + v * bell * scale);
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
