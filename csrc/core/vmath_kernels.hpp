// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/simd.hpp"

// The functions that have an array form: X(constant, name, the function at v of type R).
#define HOTLOOP_MATH_FUNCTIONS(X)                                                                           \
  X(kExp, "exp", vexp(v))                                                                                   \
  X(kExpWeight, "exp_weight", vexp_weight(v))                                                               \
  X(kExpm1, "expm1", vexpm1(v))                                                                             \
  X(kLog, "log", vlog(v))                                                                                   \
  X(kLog1p, "log1p", vlog1p(v))                                                                             \
  X(kSigmoid, "sigmoid", vsigmoid(v))                                                                       \
  X(kSoftplus, "softplus", vsoftplus(v))                                                                    \
  X(kTanh, "tanh", vtanh(v))                                                                                \
  X(kLog1mexp, "log1mexp", vlog1mexp(v))                                                                    \
  X(kExp2Evolved, "exp2_evolved", static_cast<R>(exp2_evolved(static_cast<double>(v))))                     \
  X(kExp2EvolvedCoarse, "exp2_evolved_coarse", static_cast<R>(exp2_evolved_coarse(static_cast<double>(v)))) \
  X(kExp2Minimax5, "exp2_minimax5", exp2_minimax5(v))                                                       \
  X(kExp2Minimax6, "exp2_minimax6", exp2_minimax6(v))                                                       \
  X(kExpEvolved, "exp_evolved", exp_evolved(v))                                                             \
  X(kExpMinimax, "exp_minimax", exp_minimax(v))

namespace hotloop {

#define HOTLOOP_CONSTANT(constant, name, call) constant,
enum class MathFunction : int { HOTLOOP_MATH_FUNCTIONS(HOTLOOP_CONSTANT) };
#undef HOTLOOP_CONSTANT

#define HOTLOOP_NAME(constant, name, call) name,
inline constexpr const char* kMathFunctionNames[] = {HOTLOOP_MATH_FUNCTIONS(HOTLOOP_NAME)};
#undef HOTLOOP_NAME

}  // namespace hotloop

HOTLOOP_FOR_EACH_SIMD(void map_function(MathFunction function, const float* x, float* y, std::int64_t n);
                      void map_function(MathFunction function, const double* x, double* y, std::int64_t n);)

namespace hotloop {
template <class R>
void map_function(MathFunction function, const R* x, R* y, std::int64_t n) {
  HOTLOOP_SIMD_DISPATCH(map_function(function, x, y, n))
}
}  // namespace hotloop
