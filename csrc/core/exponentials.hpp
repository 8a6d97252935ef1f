// SPDX-License-Identifier: Apache-2.0
// Two published ways to compute an exponential from few operations, for study and for CPUs without a
// vector exponential. Source: Real et al., AutoNumerics-Zero (arXiv:2312.08472); the structure of the
// programs is theirs, the constants are our own minimax fits.
#pragma once

#include "core/macros.hpp"

namespace hotloop {

// 2^x, 0 <= x <= 1, in ten operations (two divisions): relative error at most 4.4e-15 in float64.
// x = 0 gives u = inf and v = 1, so 2^0 = 1 exactly; c4 makes 2^1 = 2 but for rounding.
HOTLOOP_INLINE double exp2_evolved(double x) {
  constexpr double c1 = 15141.940208248823743, c2 = -250.55219029830789444, c3 = 5783.5264389283472228;
  constexpr double c4 = 501.10438060468454358, c5 = -1.0;
  const double u = x + c3 / x;
  const double v = c4 / (c1 / u + c2 + u) - c5;
  const double v2 = v * v;
  const double v4 = v2 * v2;
  return v4 * v4;
}

// 2^x, 0 <= x <= 1, in three operations: relative error at most 8.68e-4.
HOTLOOP_INLINE double exp2_evolved_coarse(double x) {
  return -8.22246999185925 / (x - 3.40708323788852) - 1.41421303055488;
}

// 2^x, 0 <= x <= 1, minimax polynomials: relative error at most 7.5e-8 (degree 5) and 1.9e-9 (degree 6)
// before rounding.
template <class R>
HOTLOOP_INLINE R exp2_minimax5(R x) {
  R p = R(0.00187757670001998899);
  p = p * x + R(0.00898934002358190677);
  p = p * x + R(0.0558263181162334998);
  p = p * x + R(0.240153617021126324);
  p = p * x + R(0.693153073202626053);
  return p * x + R(0.999999925063587772);
}
template <class R>
HOTLOOP_INLINE R exp2_minimax6(R x) {
  R p = R(0.000217022556805203094);
  p = p * x + R(0.00124396877471487475);
  p = p * x + R(0.00967884100704367232);
  p = p * x + R(0.05548334197771016);
  p = p * x + R(0.240229836275894224);
  p = p * x + R(0.693146983840438679);
  return p * x + R(1.00000000185579773);
}

}  // namespace hotloop
