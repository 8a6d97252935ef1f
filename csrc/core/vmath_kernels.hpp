#pragma once

#include <cstdint>

#include "core/simd.hpp"

namespace hotloop {

enum class MathFunction : int {
  kExp,
  kExpWeight,
  kExpm1,
  kLog,
  kLog1p,
  kSigmoid,
  kSoftplus,
  kTanh,
  kLog1mexp,
  kExp2Evolved,
  kExp2EvolvedCoarse,
  kExp2Minimax5,
  kExp2Minimax6,
  kExpEvolved,
  kExpMinimax,
};

inline constexpr const char* kMathFunctionNames[] = {"exp",
                                                     "exp_weight",
                                                     "expm1",
                                                     "log",
                                                     "log1p",
                                                     "sigmoid",
                                                     "softplus",
                                                     "tanh",
                                                     "log1mexp",
                                                     "exp2_evolved",
                                                     "exp2_evolved_coarse",
                                                     "exp2_minimax5",
                                                     "exp2_minimax6",
                                                     "exp_evolved",
                                                     "exp_minimax"};

}  // namespace hotloop

HOTLOOP_FOR_EACH_SIMD(void map_function(MathFunction function, const float* x, float* y, std::int64_t n);
                      void map_function(MathFunction function, const double* x, double* y, std::int64_t n);)

namespace hotloop {
template <class R>
void map_function(MathFunction function, const R* x, R* y, std::int64_t n) {
  HOTLOOP_SIMD_DISPATCH(map_function(function, x, y, n))
}
}  // namespace hotloop
