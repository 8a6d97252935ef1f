// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "bind/cuda_workspace.hpp"
#include "bind/moe_row_arguments.hpp"
#include "bind/register.hpp"
#include "kernels/moe/moe_cuda.hpp"

namespace hotloop::bind {

namespace {

moe::CudaPlace place_of(void* memory, int device, std::uintptr_t stream) {
  return {memory, device, reinterpret_cast<void*>(stream)};
}

// live: a float64 array of the first numbers of the rule, in the place of those of the call; or None.
moe::LiveNumbers live_numbers(RowArguments& a, const py::object& live) {
  if (live.is_none()) return {};
  const View& view = a.any(live, "live");
  const bool fits = view.rank == 1 && view.dtype == Dtype::kFloat64 && view.shape[0] <= moe::kMaxNumbers;
  if (!fits || (view.shape[0] > 1 && view.stride[0] != 1)) a.fail("live", "expected a contiguous float64 array");
  return {static_cast<const double*>(view.data), static_cast<int>(view.shape[0])};
}

// Kernels read streams, states and rows in their own width: float64 if and only if `wide`.
void check_width(const RowArguments& a, bool wide, std::initializer_list<const moe::Rows*> all) {
  for (const moe::Rows* x : all) {
    if (x->data != nullptr && (x->dtype == Dtype::kFloat64) != wide) a.fail("x", "expected one width of all rows");
  }
}
void check_width(const RowArguments& a, bool wide, std::initializer_list<const moe::RowsOut*> all) {
  for (const moe::RowsOut* x : all) {
    if (x->data != nullptr && (x->dtype == Dtype::kFloat64) != wide) a.fail("out", "expected one width of all rows");
  }
}

void run_step(const std::string& rule, const std::vector<double>& numbers, bool wide, std::int64_t tokens,
              std::int64_t columns, const py::object& x, const py::tuple& states, const py::object& z,
              const py::object& weights, const py::object& slot_of_row, const py::object& row_of_slot,
              const py::object& shared, const std::string& norm, const py::object& norm_weight,
              const py::object& norm_bias, double eps, const py::object& out, const py::tuple& out_states,
              const py::object& normed, const py::object& statistics, const py::object& live, int device,
              std::uintptr_t stream) {
  RowArguments a(dlpack::kCuda);
  const moe::StepCall call =
      a.step(rule, numbers, wide, tokens, columns, x, states, z, weights, slot_of_row, row_of_slot, shared, norm,
             norm_weight, norm_bias, eps, out, out_states, normed, statistics);
  const moe::Mixture& m = call.mixture;
  check_width(a, wide, {&call.x, &call.state[0], &call.state[1], &call.state[2], &m.rows, &m.shared});
  check_width(a, wide, {&call.out_state[0], &call.out_state[1], &call.out_state[2], &call.normed});
  if (call.rule != moe::Depth::kCombine) check_width(a, wide, {&call.out});
  const moe::LiveNumbers first = live_numbers(a, live);
  py::gil_scoped_release release;
  moe::step_cuda(call, first, place_of(nullptr, device, stream));
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
                       const py::object& slope_numbers, const py::object& live, const py::function& workspace,
                       int device, std::uintptr_t stream) {
  RowArguments a(dlpack::kCuda);
  const moe::BackwardCall call =
      a.backward(rule, numbers, wide, tokens, columns, x, states, z, weights, slot_of_row, row_of_slot, shared, norm,
                 norm_weight, eps, after, after_state, statistics, grad, grad_states, grad_normed, slope_x,
                 slope_states, slope_z, slope_weights, slope_shared, slope_norm_weight, slope_norm_bias, slope_numbers);
  const moe::Mixture& m = call.mixture;
  check_width(a, wide,
              {&call.x, &call.state[0], &call.state[1], &call.state[2], &m.rows, &m.shared, &call.after,
               &call.after_state, &call.grad_state[0], &call.grad_state[1], &call.grad_state[2], &call.grad_normed});
  if (call.rule != moe::Depth::kCombine) check_width(a, wide, {&call.grad});
  check_width(a, wide,
              {&call.slope_x, &call.slope_state[0], &call.slope_state[1], &call.slope_state[2], &call.slope_rows,
               &call.slope_shared});
  const moe::LiveNumbers first = live_numbers(a, live);
  void* const memory = workspace_of(a, workspace, moe::step_backward_cuda_bytes(call));
  py::gil_scoped_release release;
  moe::step_backward_cuda(call, first, place_of(memory, device, stream));
}

void run_permute(const py::object& x, const py::object& slot_of_row, const py::object& row_of_slot,
                 const py::object& out, int device, std::uintptr_t stream) {
  RowArguments a(dlpack::kCuda);
  const PermuteCall call = a.permute(x, slot_of_row, row_of_slot, out);
  py::gil_scoped_release release;
  moe::permute_cuda(call.from, call.tokens, call.columns, call.slots, call.to, place_of(nullptr, device, stream));
}

}  // namespace

HOTLOOP_BIND(moe) {
  def(m, "step", &run_step,
      "rule numbers wide tokens columns x states z weights slot_of_row row_of_slot shared norm norm_weight norm_bias "
      "eps out out_states normed statistics live device stream");
  def(m, "step_backward", &run_step_backward,
      "rule numbers wide tokens columns x states z weights slot_of_row row_of_slot shared norm norm_weight eps after "
      "after_state statistics grad grad_states grad_normed slope_x slope_states slope_z slope_weights slope_shared "
      "slope_norm_weight slope_norm_bias slope_numbers live workspace device stream");
  def(m, "permute", &run_permute, "x slot_of_row row_of_slot out device stream");
}

}  // namespace hotloop::bind
