// SPDX-License-Identifier: Apache-2.0
// Rules as the loops take them, and their state. Linked into the modules of CPU and GPU.
#include <cmath>

#include "core/rules.hpp"

namespace hotloop {

RuleSpec resolve(const RuleParameters& p) {
  const auto number = [](double x) { return static_cast<float>(x); };
  RuleSpec s{};
  s.rule = p.rule;
  s.lr = number(p.lr);
  s.eps = number(p.eps);
  s.weight_decay = number(p.weight_decay);
  s.initial_accumulator_value = number(p.initial_accumulator_value);
  s.beta = number(p.beta);
  s.l1 = number(p.l1);
  s.l2 = number(p.l2);
  s.l2_decay = number(p.decoupled ? 0.0 : p.weight_decay);
  s.keep = number(p.decoupled ? 1.0 - p.lr * p.weight_decay : 1.0);
  s.rest1 = number(1.0 - p.beta1);
  s.rest2 = number(1.0 - p.beta2);
  s.log_beta1 = std::log(p.beta1);
  s.log_beta2 = std::log(p.beta2);
  s.of_gradient = p.nesterov ? s.rest1 : 0.0f;
  s.of_average = p.nesterov ? number(p.beta1) : 1.0f;
  s.uncorrected_eps = p.uncorrected_eps;
  s.rowwise = p.rowwise;
  s.group = p.group;
  s.stochastic_rounding = p.stochastic_rounding;
  s.step = p.step;
  return s;
}

std::int64_t state_scalars(const RuleSpec& spec) {
  switch (spec.rule) {
    case Rule::kRowwiseAdagrad:
    case Rule::kGroupAdagrad:
      return 1;
    case Rule::kAdam:
      return spec.rowwise ? 2 : 1;
    default:
      return 0;
  }
}

std::int64_t state_vectors(const RuleSpec& spec) {
  switch (spec.rule) {
    case Rule::kAdagrad:
      return 1;
    case Rule::kAdam:
      return spec.rowwise ? 1 : 2;
    case Rule::kFtrl:
      return 2;
    default:
      return 0;
  }
}

std::int64_t state_floats(const RuleSpec& spec, std::int64_t dim) {
  return state_scalars(spec) + state_vectors(spec) * dim;
}

void init_state(const RuleSpec& spec, std::int64_t dim, float* state) {
  const std::int64_t count = state_floats(spec, dim);
  // FTRL starts its second vector, n, with the value; Adam has none.
  const std::int64_t first = spec.rule == Rule::kFtrl ? dim : 0;
  for (std::int64_t i = 0; i < count; ++i) {
    state[i] = i < first || spec.rule == Rule::kAdam ? 0.0f : spec.initial_accumulator_value;
  }
}

}  // namespace hotloop
