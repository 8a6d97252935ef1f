// The pair loop: one head over n rows, value and gradient in one pass.
#pragma once

#include <array>
#include <cstdint>

#include "core/simd.hpp"
#include "core/view.hpp"
#include "preference/head_list.hpp"

namespace hotloop::preference {

// An input column of any float dtype; stride 0 repeats one value.
struct InputColumn {
  const void* data;
  Dtype dtype;
  std::int64_t stride;
};
struct OutputColumn {
  void* data;  // nullptr: not wanted
  Dtype dtype;
  std::int64_t stride;
};

struct PairCall {
  int head = 0;
  std::int64_t n = 0;
  bool double_precision = false;
  std::array<InputColumn, kMaxHeadInputs> inputs{};  // differentiable ones first
  std::array<double, kMaxHeadParams> params{};
  std::array<OutputColumn, kMaxHeadInputs> grads{};
  OutputColumn loss{};      // per row
  double* total = nullptr;  // sum over rows, added in row order whatever the thread count
  double grad_scale = 1.0;
};

}  // namespace hotloop::preference

HOTLOOP_FOR_EACH_SIMD(void pair_loop(const preference::PairCall& call);)

namespace hotloop::preference {
inline void pair_loop(const PairCall& call) { HOTLOOP_SIMD_DISPATCH(pair_loop(call)) }
}  // namespace hotloop::preference
