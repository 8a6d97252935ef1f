// SPDX-License-Identifier: Apache-2.0
// Elementary functions that vectorise: branch-free float32 forms for SIMD loops, libm for float64, and
// their derivatives for dual numbers. Errors in ulp over the whole float32 range are in docs/numerics.md,
// measured by tests/core/test_vmath.py. On the GPU the same names call CUDA's functions.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "core/dual.hpp"
#include "core/macros.hpp"

namespace hotloop {

namespace detail {

// exp(x) = 2^k (1 + y): k = round(x / ln 2), y = exp(x - k ln 2) - 1 from a minimax polynomial of degree
// 6 (relative error 3.1e-9, fitted by us). ln 2 is split in two so that k * ln2_high is exact.
struct ExpParts {
  float y;
  std::int32_t k;
};
HOTLOOP_INLINE ExpParts exp_parts(float x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  const float shifted = x * kLog2e + kRound;
  const std::int32_t k = std::bit_cast<std::int32_t>(shifted) - std::bit_cast<std::int32_t>(kRound);
  const float kf = shifted - kRound;
  const float r = (x - kf * kLn2High) - kf * kLn2Low;
  float p = 1.38144663e-3f;
  p = p * r + 8.36878047e-3f;
  p = p * r + 4.16683942e-2f;
  p = p * r + 1.66665201e-1f;
  p = p * r + 4.99999934e-1f;
  return {r + r * r * p, k};
}
HOTLOOP_INLINE float power_of_two(std::int32_t k) {  // -126 <= k <= 127
  return std::bit_cast<float>((k + 127) << 23);
}

}  // namespace detail

namespace detail {
// x = 2^e m, sqrt(1/2) <= m < sqrt(2); log(m) = 2 s + s^3 R(s^2), s = (m - 1) / (m + 1). x must be normal
// and positive; `e_shift` is added to e.
HOTLOOP_INLINE float log_normal(float x, std::int32_t e_shift) {
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  // In unsigned arithmetic, where the bits of a negative x (whose result is not used) may wrap around.
  const auto bits = static_cast<std::int32_t>(std::bit_cast<std::uint32_t>(x) - 0x3f3504f3u);  // sqrt(1/2)
  const float e = static_cast<float>((bits >> 23) + e_shift);
  const float f = std::bit_cast<float>((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const float s = f / (2.0f + f);
  const float z = s * s;
  const float r = z * (6.66667771e-1f + z * (3.99774495e-1f + z * 2.98744202e-1f));
  const float half_square = 0.5f * f * f;
  // f - f^2/2 + s (f^2/2 + R): f carries the leading bits exactly.
  const float tail = s * (half_square + r) + e * kLn2Low;
  return e * kLn2High - ((half_square - tail) - f);
}
}  // namespace detail

// The same bits on CPU and GPU, where a * b + c is not contracted. One comparison per select throughout: GCC 12 does
// not vectorise a select on a conjunction.
HOTLOOP_INLINE float vlog_portable(float x) {
  const float scaled = x < 1.17549435e-38f ? x * 8388608.0f : x;
  float y = detail::log_normal(scaled, x < 1.17549435e-38f ? -23 : 0);
  y = x == 0.0f ? -INFINITY : y;
  y = x < 0.0f ? NAN : y;
  y = x > 3.40282347e38f ? x : y;
  return x != x ? x : y;
}

#if defined(__CUDACC__)
HOTLOOP_INLINE float vexp(float x) { return ::expf(x); }
HOTLOOP_INLINE float vexpm1(float x) { return ::expm1f(x); }
HOTLOOP_INLINE float vlog(float x) { return ::logf(x); }
HOTLOOP_INLINE float vlog1p(float x) { return ::log1pf(x); }
HOTLOOP_INLINE float vlog1p_unit(float x) { return ::log1pf(x); }
#else
// Overflows to inf above 88.72; results below the smallest normal are gradual; NaN stays NaN.
HOTLOOP_INLINE float vexp(float x) {
  float clamped = x > 89.0f ? 89.0f : x;
  clamped = clamped < -104.0f ? -104.0f : clamped;
  const detail::ExpParts e = detail::exp_parts(clamped);
  // 2^k in two factors, since k runs from -150 to 128.
  const std::int32_t half = e.k >> 1;
  return (1.0f + e.y) * detail::power_of_two(half) * detail::power_of_two(e.k - half);
}

// exp(x) for x <= 0 where anything below the smallest normal may be 0: a softmax weight, in fewer
// instructions than vexp. NaN stays NaN (which is why 2^k is a factor and not added to the exponent bits).
HOTLOOP_INLINE float vexp_weight(float x) {
  constexpr float kLeast = -87.3365402f;  // log of the smallest normal number, 2^-126
  const float clamped = x < kLeast ? kLeast : x;
  const detail::ExpParts e = detail::exp_parts(clamped);
  const float y = (1.0f + e.y) * detail::power_of_two(e.k);
  return x < kLeast ? 0.0f : y;
}

HOTLOOP_INLINE float vexpm1(float x) {
  float clamped = x > 89.0f ? 89.0f : x;
  clamped = clamped < -20.0f ? -20.0f : clamped;
  const detail::ExpParts e = detail::exp_parts(clamped);
  const std::int32_t half = e.k >> 1;
  const float a = detail::power_of_two(half);
  const float b = detail::power_of_two(e.k - half);
  // 2^k (1 + y) - 1 = 2^k y + (2^k - 1): the second term is exact, so nothing cancels near 0.
  return e.k > 64 ? (1.0f + e.y) * a * b : a * b * e.y + (a * b - 1.0f);
}

HOTLOOP_INLINE float vlog(float x) { return vlog_portable(x); }

// log(1 + x) = log(u) + (x - (u - 1)) / u with u = 1 + x rounded: the second term is what rounding lost, and
// all of the result where x is tiny.
HOTLOOP_INLINE float vlog1p(float x) {
  const float u = 1.0f + x;
  const float lost = x > 1.0f ? 1.0f - (u - x) : x - (u - 1.0f);
  float y = vlog(u) + (u > 0.0f ? lost / u : 0.0f);
  return x > 3.40282347e38f ? x : y;
}
// The same for 0 <= x <= 1: x times a minimax polynomial of degree 9 (relative error 4.7e-9, fitted by us),
// half the instructions and no division. NaN stays NaN.
HOTLOOP_INLINE float vlog1p_unit(float x) {
  const float x2 = x * x;
  const float low = (1.0f - 0.499999024f * x) + x2 * (0.333299624f - 0.249541336f * x);
  const float high = (0.196759389f - 0.153055918f * x) + x2 * (0.106036538f - 0.0569595253f * x);
  const float top = 0.0198514584f - 0.00324402444f * x;
  const float x4 = x2 * x2;
  return x * (low + x4 * (high + x4 * top));
}
#endif

HOTLOOP_INLINE double vexp(double x) { return ::exp(x); }
HOTLOOP_INLINE double vexpm1(double x) { return ::expm1(x); }
HOTLOOP_INLINE double vlog(double x) { return ::log(x); }
HOTLOOP_INLINE double vlog1p(double x) { return ::log1p(x); }
HOTLOOP_INLINE double vlog1p_unit(double x) { return ::log1p(x); }
#if defined(__CUDACC__)
HOTLOOP_INLINE float vexp_weight(float x) { return ::expf(x); }
#endif
HOTLOOP_INLINE double vexp_weight(double x) { return ::exp(x); }
HOTLOOP_INLINE float vabs(float x) { return ::fabsf(x); }
HOTLOOP_INLINE double vabs(double x) { return ::fabs(x); }

// Sigmoid and softplus take e^-|x| from vexp_weight: where it is below the smallest normal number it counts as 0.
template <class R>
HOTLOOP_INLINE R vsigmoid(R x) {
  const R e = vexp_weight(-vabs(x));
  const R inverse = R(1) / (R(1) + e);
  return x >= R(0) ? inverse : e * inverse;  // NaN: e is NaN
}
template <class R>
HOTLOOP_INLINE R vsoftplus(R x) {  // log(1 + e^x)
  return (x > R(0) ? x : R(0)) + vlog1p_unit(vexp_weight(-vabs(x)));
}
HOTLOOP_INLINE float vcopysign(float x, float sign) { return ::copysignf(x, sign); }
HOTLOOP_INLINE double vcopysign(double x, double sign) { return ::copysign(x, sign); }
template <class R>
HOTLOOP_INLINE R vtanh(R x) {
  const R e = vexpm1(R(-2) * vabs(x));
  return vcopysign(e / (R(2) + e), x);  // odd to the last bit, -0 included
}
// log(1 - e^a) for a < 0, by whichever of the two forms does not cancel.
template <class R>
HOTLOOP_INLINE R vlog1mexp(R a) {
  const R near = vlog(-vexpm1(a));
  const R far = vlog1p(-vexp(a));
  return a > R(-0.6931472) ? near : far;
}

// The same functions over dual numbers; value and slope share the exponential.
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> vexp(const Dual<R, N>& x) {
  const R y = vexp(x.value);
  return chain(x, y, y);
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> vexpm1(const Dual<R, N>& x) {
  const R y = vexpm1(x.value);
  return chain(x, y, y + R(1));
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> vlog(const Dual<R, N>& x) {
  return chain(x, vlog(x.value), R(1) / x.value);
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> vsigmoid(const Dual<R, N>& x) {
  const R e = vexp_weight(-vabs(x.value));
  const R inverse = R(1) / (R(1) + e);
  const R y = x.value >= R(0) ? inverse : e * inverse;
  return chain(x, y, e * inverse * inverse);
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> vsoftplus(const Dual<R, N>& x) {
  const R e = vexp_weight(-vabs(x.value));
  const R inverse = R(1) / (R(1) + e);
  const R value = (x.value > R(0) ? x.value : R(0)) + vlog1p_unit(e);
  return chain(x, value, x.value >= R(0) ? inverse : e * inverse);
}
template <class R, int N>
HOTLOOP_INLINE Dual<R, N> vlog1mexp(const Dual<R, N>& x) {
  return chain(x, vlog1mexp(x.value), R(-1) / vexpm1(-x.value));
}
// relu with subgradient 0 at 0, as in torch; NaN stays NaN.
template <class T>
HOTLOOP_INLINE T vrelu(const T& x) {
  return select(value_of(x) <= Real<T>(0), T(Real<T>(0)), x);
}

}  // namespace hotloop
