// SPDX-License-Identifier: Apache-2.0
// Dual numbers: a value and its derivatives with respect to N inputs. A head written over a number type
// T gives its value with T = float and its gradient with T = Dual<float, N>; there is no second formula.
#pragma once

#include "core/macros.hpp"

namespace hotloop {

template <class R, int N>
struct Dual {
  using Real = R;
  R value;
  R d[N];

  HOTLOOP_INLINE Dual() {}
  HOTLOOP_INLINE Dual(R v) : value(v) {  // a constant
    HOTLOOP_UNROLL
    for (int i = 0; i < N; ++i) d[i] = R(0);
  }
  static HOTLOOP_INLINE Dual variable(R v, int index) {
    Dual x(v);
    HOTLOOP_UNROLL
    for (int i = 0; i < N; ++i) x.d[i] = i == index ? R(1) : R(0);
    return x;
  }
};

// f(x) given f's value and derivative at x.value.
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> chain(const Dual<R, N>& x, R value, R slope) {
  Dual<R, N> y;
  y.value = value;
  HOTLOOP_UNROLL
  for (int i = 0; i < N; ++i) y.d[i] = slope * x.d[i];
  return y;
}

template <class R, int N>
HOTLOOP_INLINE Dual<R, N> operator-(const Dual<R, N>& x) {
  return chain(x, -x.value, R(-1));
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> operator+(const Dual<R, N>& x, const Dual<R, N>& y) {
  Dual<R, N> z;
  z.value = x.value + y.value;
  HOTLOOP_UNROLL
  for (int i = 0; i < N; ++i) z.d[i] = x.d[i] + y.d[i];
  return z;
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> operator-(const Dual<R, N>& x, const Dual<R, N>& y) {
  Dual<R, N> z;
  z.value = x.value - y.value;
  HOTLOOP_UNROLL
  for (int i = 0; i < N; ++i) z.d[i] = x.d[i] - y.d[i];
  return z;
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> operator*(const Dual<R, N>& x, const Dual<R, N>& y) {
  Dual<R, N> z;
  z.value = x.value * y.value;
  HOTLOOP_UNROLL
  for (int i = 0; i < N; ++i) z.d[i] = x.d[i] * y.value + x.value * y.d[i];
  return z;
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> operator/(const Dual<R, N>& x, const Dual<R, N>& y) {
  const R inverse = R(1) / y.value;
  Dual<R, N> z;
  z.value = x.value * inverse;
  HOTLOOP_UNROLL
  for (int i = 0; i < N; ++i) z.d[i] = (x.d[i] - z.value * y.d[i]) * inverse;
  return z;
}

// Mixed with plain numbers, which are constants: no derivative to carry.
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> operator+(const Dual<R, N>& x, R c) {
  return chain(x, x.value + c, R(1));
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> operator+(R c, const Dual<R, N>& x) {
  return chain(x, c + x.value, R(1));
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> operator-(const Dual<R, N>& x, R c) {
  return chain(x, x.value - c, R(1));
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> operator-(R c, const Dual<R, N>& x) {
  return chain(x, c - x.value, R(-1));
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> operator*(const Dual<R, N>& x, R c) {
  return chain(x, x.value * c, c);
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> operator*(R c, const Dual<R, N>& x) {
  return chain(x, c * x.value, c);
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> operator/(const Dual<R, N>& x, R c) {
  return chain(x, x.value / c, R(1) / c);
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> operator/(R c, const Dual<R, N>& x) {
  const R inverse = R(1) / x.value;
  return chain(x, c * inverse, -c * inverse * inverse);
}

// c ? x : y, element by element, so that the loop around it stays branch-free.
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> select(bool c, const Dual<R, N>& x, const Dual<R, N>& y) {
  Dual<R, N> z;
  z.value = c ? x.value : y.value;
  HOTLOOP_UNROLL
  for (int i = 0; i < N; ++i) z.d[i] = c ? x.d[i] : y.d[i];
  return z;
}
HOTLOOP_INLINE float select(bool c, float x, float y) { return c ? x : y; }
HOTLOOP_INLINE double select(bool c, double x, double y) { return c ? x : y; }

template <class R, int N>
HOTLOOP_INLINE R value_of(const Dual<R, N>& x) {
  return x.value;
}
HOTLOOP_INLINE float value_of(float x) { return x; }
HOTLOOP_INLINE double value_of(double x) { return x; }

// The plain number type under T.
template <class T>
struct RealOf {
  using type = T;
};
template <class R, int N>
struct RealOf<Dual<R, N>> {
  using type = R;
};
template <class T>
using Real = typename RealOf<T>::type;

}  // namespace hotloop
