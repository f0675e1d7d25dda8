// arctan and tanh on vectors, accurate to a few last places, with Cephes' approximations; double
// goes lane by lane.
#pragma once
#include "../natural.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

// |x| above tan(3 pi/8) is turned into pi/2 - atan(1/|x|), above tan(pi/8) into pi/4 +
// atan((|x|-1)/(|x|+1)).
SOLERA_INLINE vf arctan(vf x) {
  const vf size = x < 0 ? -x : x;
  const vf far = size > 2.414213562373095f ? splat(1.0f) : vf{};
  const vf near = size > 0.4142135623730950f ? splat(1.0f) : vf{};
  const vf t = far > 0 ? -1.0f / size : (near > 0 ? (size - 1.0f) / (size + 1.0f) : size);
  const vf base = far > 0 ? splat(1.5707963267948966f) : near * 0.7853981633974483f;
  const vf z = t * t;
  vf p = splat(8.05374449538e-2f);
  p = p * z - 1.38776856032e-1f;
  p = p * z + 1.99777106478e-1f;
  p = p * z - 3.33329491539e-1f;
  const vf y = base + (p * z * t + t);
  return x < 0 ? -y : y;
}
SOLERA_INLINE vd arctan(vd x) {
  for (int i = 0; i < Vec<double>::lanes; ++i) x[i] = __builtin_atan(x[i]);
  return x;
}

// An odd polynomial below 0.625, then 1 - 2 / (e^2|x| + 1).
SOLERA_INLINE vf hyperbolic_tangent(vf x) {
  const vf size = x < 0 ? -x : x;
  const vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vf small = p * z * x + x;
  const vf e = natural_exp(-2.0f * size);
  const vf large = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? small : (x < 0 ? -large : large);
}
SOLERA_INLINE vd hyperbolic_tangent(vd x) {
  for (int i = 0; i < Vec<double>::lanes; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
