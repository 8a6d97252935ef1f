// SPDX-License-Identifier: Apache-2.0
// What the heads of several rooms write more than once.
#pragma once

#include "core/dual.hpp"
#include "core/macros.hpp"
#include "core/vmath.hpp"

namespace hotloop {

// Cross-entropy of sigma(x) against the label q: q softplus(-x) + (1 - q) softplus(x), with one exponential.
template <class T, class R = Real<T>>
HOTLOOP_INLINE T logistic(const T& x, R q) {
  const T line = select(value_of(x) > R(0), x * (R(1) - q), x * (-q));
  const T magnitude = select(value_of(x) > R(0), x, -x);
  return line + vsoftplus(-magnitude);
}
template <class T>
HOTLOOP_INLINE T square(const T& x) {
  return x * x;
}
// A token count as a divisor: an answer without tokens counts as one of length 1. NaN stays NaN.
template <class R>
HOTLOOP_INLINE R count(R length) {
  return length < R(1) ? R(1) : length;
}

}  // namespace hotloop
