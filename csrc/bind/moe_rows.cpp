// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/moe_row_arguments.hpp"
#include "bind/register.hpp"

namespace hotloop::bind {

namespace {

// Returns false where a slot and its row do not name each other.
bool run_step(const std::string& rule, const std::vector<double>& numbers, bool wide, std::int64_t tokens,
              std::int64_t columns, const py::object& x, const py::tuple& states, const py::object& z,
              const py::object& weights, const py::object& slot_of_row, const py::object& row_of_slot,
              const py::object& shared, const std::string& norm, const py::object& norm_weight,
              const py::object& norm_bias, double eps, const py::object& out, const py::tuple& out_states,
              const py::object& normed, const py::object& statistics) {
  RowArguments a;
  const moe::StepCall call =
      a.step(rule, numbers, wide, tokens, columns, x, states, z, weights, slot_of_row, row_of_slot, shared, norm,
             norm_weight, norm_bias, eps, out, out_states, normed, statistics);
  py::gil_scoped_release release;
  return moe::step(call);
}

void run_step_backward(const std::string& rule, const std::vector<double>& numbers, bool wide, std::int64_t tokens,
                       std::int64_t columns, const py::object& x, const py::tuple& states, const py::object& z,
                       const py::object& weights, const py::object& slot_of_row, const py::object& row_of_slot,
                       const py::object& shared, const std::string& norm, const py::object& norm_weight, double eps,
                       const py::object& after, const py::object& after_state, const py::object& statistics,
                       const py::object& grad, const py::tuple& grad_states, const py::object& grad_normed,
                       const py::object& slope_x, const py::tuple& slope_states, const py::object& slope_z,
                       const py::object& slope_weights, const py::object& slope_shared,
                       const py::object& slope_norm_weight, const py::object& slope_norm_bias,
                       const py::object& slope_numbers) {
  RowArguments a;
  const moe::BackwardCall call =
      a.backward(rule, numbers, wide, tokens, columns, x, states, z, weights, slot_of_row, row_of_slot, shared, norm,
                 norm_weight, eps, after, after_state, statistics, grad, grad_states, grad_normed, slope_x,
                 slope_states, slope_z, slope_weights, slope_shared, slope_norm_weight, slope_norm_bias, slope_numbers);
  py::gil_scoped_release release;
  moe::step_backward(call);
}

bool run_permute(const py::object& x, const py::object& slot_of_row, const py::object& row_of_slot,
                 const py::object& out) {
  RowArguments a;
  const PermuteCall call = a.permute(x, slot_of_row, row_of_slot, out);
  py::gil_scoped_release release;
  return moe::permute(call.from, call.tokens, call.columns, call.slots, call.to);
}

}  // namespace

HOTLOOP_BIND(moe) {
  def(m, "step", &run_step,
      "rule numbers wide tokens columns x states z weights slot_of_row row_of_slot shared norm norm_weight norm_bias "
      "eps out out_states normed statistics");
  def(m, "step_backward", &run_step_backward,
      "rule numbers wide tokens columns x states z weights slot_of_row row_of_slot shared norm norm_weight eps after "
      "after_state statistics grad grad_states grad_normed slope_x slope_states slope_z slope_weights slope_shared "
      "slope_norm_weight slope_norm_bias slope_numbers");
  def(m, "permute", &run_permute, "x slot_of_row row_of_slot out");
}

}  // namespace hotloop::bind
