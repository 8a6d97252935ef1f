// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bind/cuda_workspace.hpp"
#include "bind/moe_arguments.hpp"
#include "bind/register.hpp"
#include "kernels/moe/moe_cuda.hpp"

namespace hotloop::bind {

namespace {

// Arguments as of the CPU's; `stream` is a cudaStream_t.
void run_route(const py::object& router_logits, const py::tuple& selection, const py::object& bias,
               const py::object& mask, const py::object& offsets, const py::object& ids, const py::object& weights,
               const py::object& counts, const py::object& prob_sums, const py::object& logsumexp,
               const py::object& num_tokens, const py::object& slot_of_row, const py::object& row_of_slot,
               const py::object& expert_offsets, const py::function& workspace, int device, std::uintptr_t stream) {
  RouteArguments a("route", dlpack::kCuda);
  const moe::RouteCall call = a.route(router_logits, selection, bias, mask, offsets, ids, weights, counts, prob_sums,
                                      logsumexp, num_tokens, slot_of_row, row_of_slot, expert_offsets);
  void* const memory = workspace_of(a, workspace, moe::route_cuda_bytes(call));
  py::gil_scoped_release release;
  moe::route_cuda(call, {memory, device, reinterpret_cast<void*>(stream)});
}

void run_route_backward(const py::object& router_logits, const py::tuple& selection, bool biased,
                        const py::object& mask, const py::object& offsets, const py::object& ids,
                        const py::object& d_weights, const py::object& d_prob_sums, const py::object& d_logsumexp,
                        const py::object& result, int device, std::uintptr_t stream) {
  RouteArguments a("route", dlpack::kCuda);
  const moe::RouteBackwardCall call =
      a.backward(router_logits, selection, biased, mask, offsets, ids, d_weights, d_prob_sums, d_logsumexp, result);
  py::gil_scoped_release release;
  moe::route_backward_cuda(call, {nullptr, device, reinterpret_cast<void*>(stream)});
}

void run_dispatch(const py::object& ids, std::int64_t num_experts, std::int64_t capacity, const py::object& weights,
                  std::int64_t align, const py::object& slot_of_row, const py::object& row_of_slot,
                  const py::object& expert_offsets, const py::object& expert_counts, const py::function& workspace,
                  int device, std::uintptr_t stream) {
  RouteArguments a("dispatch", dlpack::kCuda);
  const moe::DispatchCall call =
      a.dispatch(ids, num_experts, capacity, weights, align, slot_of_row, row_of_slot, expert_offsets, expert_counts);
  if (num_experts > (std::int64_t{1} << 30)) a.fail("num_experts", "expected at most 2^30");
  void* const memory = workspace_of(a, workspace, moe::dispatch_cuda_bytes(call));
  py::gil_scoped_release release;
  moe::dispatch_cuda(call, {memory, device, reinterpret_cast<void*>(stream)});
}

}  // namespace

HOTLOOP_BIND(moe) {
  def(m, "route", &run_route,
      "router_logits selection bias mask offsets ids weights counts prob_sums logsumexp num_tokens slot_of_row "
      "row_of_slot expert_offsets workspace device stream");
  def(m, "route_backward", &run_route_backward,
      "router_logits selection biased mask offsets ids d_weights d_prob_sums d_logsumexp result device stream");
  def(m, "dispatch", &run_dispatch,
      "ids num_experts capacity weights align slot_of_row row_of_slot expert_offsets expert_counts workspace device "
      "stream");
}

}  // namespace hotloop::bind
