// SPDX-License-Identifier: Apache-2.0
// Array forms of the elementary functions: what Python's hotloop.core calls and the accuracy tests measure.
#include <atomic>
#include <cstdint>

#include "core/exponentials.hpp"
#include "core/parallel.hpp"
#include "core/simd.hpp"
#include "core/vmath.hpp"
#include "core/vmath_kernels.hpp"

#include "core/simd_begin.hpp"

namespace {

constexpr std::int64_t kGrain = 16384;  // about 10 us of work: below that a second thread costs more than it brings

template <class R, class F>
void map(const R* x, R* y, std::int64_t n, F f) {
  parallel_for(n, kGrain, [&](std::int64_t begin, std::int64_t end) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) y[i] = f(x[i]);
  });
}

// exp from an exponential of 2 on [0, 1]: x = (k + r) ln 2 with k = floor(x / ln 2).
template <class R, class F>
HOTLOOP_INLINE R exp_by(R x, F exp2_unit) {
  const R scaled = x * R(1.4426950408889634);
  const R k = static_cast<R>(__builtin_floor(static_cast<double>(scaled)));
  const R r = (x - k * R(0.693359375)) + k * R(2.1219444005469057e-4);  // x - k ln 2, in two steps
  return static_cast<R>(
      __builtin_ldexp(static_cast<double>(exp2_unit(r * R(1.4426950408889634))), static_cast<int>(k)));
}

template <class R>
HOTLOOP_INLINE R exp_evolved(R v) {
  return exp_by(v, [](R r) { return static_cast<R>(exp2_evolved(static_cast<double>(r))); });
}
template <class R>
HOTLOOP_INLINE R exp_minimax(R v) {
  R c = v > R(88.7) ? R(88.7) : v;
  c = c < R(-87.3) ? R(-87.3) : c;
  return exp_by(c, [](R r) { return exp2_minimax5(r); });
}

template <class R>
void map_any(MathFunction function, const R* x, R* y, std::int64_t n) {
  switch (function) {
#define HOTLOOP_MAP(constant, name, call) \
  case MathFunction::constant:            \
    return map(x, y, n, [](R v) { return call; });
    HOTLOOP_MATH_FUNCTIONS(HOTLOOP_MAP)
#undef HOTLOOP_MAP
  }
}

}  // namespace

void map_function(MathFunction function, const float* x, float* y, std::int64_t n) {
  note_simd_level();
  map_any(function, x, y, n);
}
void map_function(MathFunction function, const double* x, double* y, std::int64_t n) {
  note_simd_level();
  map_any(function, x, y, n);
}

#include "core/simd_end.hpp"
