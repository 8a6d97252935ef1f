// SPDX-License-Identifier: Apache-2.0
#include "bind/table_rules.hpp"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "table/rows/row_rules.hpp"

namespace hotloop::bind {

namespace py = pybind11;
using Size = std::int64_t;
using namespace hotloop::table;

namespace {

constexpr std::array<std::pair<const char*, Rule>, 6> kRules = {{{"sgd", Rule::kSgd},
                                                                 {"rowwise_adagrad", Rule::kRowwiseAdagrad},
                                                                 {"adagrad", Rule::kAdagrad},
                                                                 {"adam", Rule::kAdam},
                                                                 {"ftrl", Rule::kFtrl},
                                                                 {"group_adagrad", Rule::kGroupAdagrad}}};

Rule rule_named(const std::string& name) {
  for (const auto& [known, rule] : kRules) {
    if (name == known) return rule;
  }
  throw std::invalid_argument("[table] rule: expected a row optimizer, got " + name + ".");
}

template <class Enum, std::size_t N>
Enum named(const char* what, const std::string& name, const char* const (&names)[N]) {
  for (std::size_t i = 0; i < N; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
  }
  throw std::invalid_argument(std::string("[Table] ") + what + ": got " + name + ".");
}
constexpr const char* kStrategies[] = {"none", "lru", "lfu", "epoch_lru", "epoch_lfu", "custom"};
constexpr const char* kInitializers[] = {"constant", "uniform", "normal"};
constexpr const char* kPools[] = {"sum", "mean", "max"};

}  // namespace

RuleSpec rule_spec(const py::dict& rule) {
  RuleParameters p;
  for (const auto& [key, value] : rule) {
    const auto name = key.cast<std::string>();
    const std::pair<const char*, double*> numbers[] = {{"lr", &p.lr},
                                                       {"eps", &p.eps},
                                                       {"beta1", &p.beta1},
                                                       {"beta2", &p.beta2},
                                                       {"weight_decay", &p.weight_decay},
                                                       {"initial_accumulator_value", &p.initial_accumulator_value},
                                                       {"beta", &p.beta},
                                                       {"l1", &p.l1},
                                                       {"l2", &p.l2}};
    const std::pair<const char*, bool*> flags[] = {
        {"decoupled", &p.decoupled}, {"nesterov", &p.nesterov}, {"uncorrected_eps", &p.uncorrected_eps},
        {"rowwise", &p.rowwise},     {"group", &p.group},       {"stochastic_rounding", &p.stochastic_rounding}};
    bool known = name == "rule" || name == "step";
    if (name == "rule") p.rule = rule_named(value.cast<std::string>());
    if (name == "step") p.step = value.cast<std::int64_t>();
    for (const auto& [field, at] : numbers) {
      if (name != field) continue;
      *at = value.cast<double>();
      known = true;
    }
    for (const auto& [field, at] : flags) {
      if (name != field) continue;
      *at = value.cast<bool>();
      known = true;
    }
    if (!known) throw std::invalid_argument("[table] rule: no parameter is called " + name + ".");
  }
  return resolve(p);
}

Settings settings_of(const py::dict& d) {
  Settings s;
  s.dim = d["dim"].cast<Size>();
  const auto dtype = d["dtype"].cast<std::string>();
  s.dtype = dtype == "float32"    ? Dtype::kFloat32
            : dtype == "float16"  ? Dtype::kFloat16
            : dtype == "bfloat16" ? Dtype::kBFloat16
                                  : Dtype::kUInt8;
  if (!d["rule"].is_none()) {
    const RuleSpec spec = rule_spec(d["rule"].cast<py::dict>());
    s.initial_state.resize(static_cast<std::size_t>(state_floats(spec, s.dim)));
    init_state(spec, s.dim, s.initial_state.data());
  }
  s.strategy = named<Strategy>("evict_strategy", d["strategy"].cast<std::string>(), kStrategies);
  s.times = d["times"].cast<bool>();
  s.versions = d["versions"].cast<bool>();
  s.initializer = named<Initializer>("initializer", d["initializer"].cast<std::string>(), kInitializers);
  s.first = d["first"].cast<float>();
  s.second = d["second"].cast<float>();
  s.seed = d["seed"].cast<std::uint64_t>();
  s.hash_seed = d["hash_seed"].cast<std::uint64_t>();
  s.capacity = d["capacity"].cast<Size>();
  if (!d["max_rows"].is_none()) s.max_rows = d["max_rows"].cast<Size>();
  s.max_load_factor = d["max_load_factor"].cast<double>();
  return s;
}

Pool pool_named(const std::string& name) { return named<Pool>("mode", name, kPools); }

}  // namespace hotloop::bind
