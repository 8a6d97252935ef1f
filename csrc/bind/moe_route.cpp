// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bind/moe_arguments.hpp"
#include "bind/register.hpp"

namespace hotloop::bind {

namespace {

// Returns -1, or the first token whose logits have no softmax, or -2 for a bias that is not finite; the results then
// mean nothing.
std::int64_t run_route(const py::object& router_logits, const py::tuple& selection, const py::object& bias,
                       const py::object& mask, const py::object& offsets, const py::object& ids,
                       const py::object& weights, const py::object& counts, const py::object& prob_sums,
                       const py::object& logsumexp, const py::object& num_tokens, const py::object& slot_of_row,
                       const py::object& row_of_slot, const py::object& expert_offsets) {
  RouteArguments a("route");
  const moe::RouteCall call = a.route(router_logits, selection, bias, mask, offsets, ids, weights, counts, prob_sums,
                                      logsumexp, num_tokens, slot_of_row, row_of_slot, expert_offsets);
  py::gil_scoped_release release;
  return moe::route(call);
}

void run_route_backward(const py::object& router_logits, const py::tuple& selection, bool biased,
                        const py::object& mask, const py::object& offsets, const py::object& ids,
                        const py::object& d_weights, const py::object& d_prob_sums, const py::object& d_logsumexp,
                        const py::object& result) {
  RouteArguments a("route");
  const moe::RouteBackwardCall call =
      a.backward(router_logits, selection, biased, mask, offsets, ids, d_weights, d_prob_sums, d_logsumexp, result);
  py::gil_scoped_release release;
  moe::route_backward(call);
}

// capacity -1: no limit. Returns false where an id is out of range or a weight is NaN.
bool run_dispatch(const py::object& ids, std::int64_t num_experts, std::int64_t capacity, const py::object& weights,
                  std::int64_t align, const py::object& slot_of_row, const py::object& row_of_slot,
                  const py::object& expert_offsets, const py::object& expert_counts) {
  RouteArguments a("dispatch");
  const moe::DispatchCall call =
      a.dispatch(ids, num_experts, capacity, weights, align, slot_of_row, row_of_slot, expert_offsets, expert_counts);
  py::gil_scoped_release release;
  return moe::dispatch(call);
}

}  // namespace

HOTLOOP_BIND(moe) {
  def(m, "route", &run_route,
      "router_logits selection bias mask offsets ids weights counts prob_sums logsumexp num_tokens slot_of_row "
      "row_of_slot expert_offsets");
  def(m, "route_backward", &run_route_backward,
      "router_logits selection biased mask offsets ids d_weights d_prob_sums d_logsumexp result");
  def(m, "dispatch", &run_dispatch,
      "ids num_experts capacity weights align slot_of_row row_of_slot expert_offsets expert_counts");
}

}  // namespace hotloop::bind
