// SPDX-License-Identifier: Apache-2.0
// From the Python arguments of the passes over rows to their calls, for the CPU and the CUDA module alike. What is read
// has whole rows at any row stride; results are contiguous. None stands for a matrix that is absent: zeros where it is
// read, nothing to write. Slots and rows are looked at by the loops, so that nothing outside the arrays is read
// whatever they hold.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/arguments.hpp"
#include "moe/row_pass.hpp"

namespace hotloop::bind {

inline int index_of(const char* what, const std::string& name, std::initializer_list<const char*> names) {
  int i = 0;
  for (const char* each : names) {
    if (name == each) return i;
    ++i;
  }
  throw std::invalid_argument(std::string("[moe] ") + what + ": got " + name + ", which is not compiled in.");
}

inline moe::Depth rule_named(const std::string& name) {
  return static_cast<moe::Depth>(
      index_of("rule", name, {"combine", "residual", "momentum", "adam", "robust", "lookahead"}));
}

struct PermuteCall {
  moe::Rows from;
  std::int64_t tokens, columns;
  moe::Slots slots;
  moe::RowsOut to;
};

class RowArguments : public Arguments {
 public:
  explicit RowArguments(std::int32_t device = dlpack::kCpu) : Arguments("moe", 32, device) {}

  moe::Rows read(const py::object& object, const char* name, std::int64_t rows, std::int64_t columns) {
    if (object.is_none()) return {};
    const View& view = of_shape(object, name, rows, columns);
    return {view.data, view.dtype, view.stride[0]};
  }
  moe::RowsOut write(const py::object& object, const char* name, std::int64_t rows, std::int64_t columns) {
    if (object.is_none()) return {};
    const View& view = of_shape(object, name, rows, columns);
    if (view.read_only) fail(name, "expected a writable array");
    if (view.size() > 0 && rows > 1 && view.stride[0] != columns) fail(name, "expected a contiguous array");
    return {view.data, view.dtype, columns};
  }
  // (n,), contiguous.
  moe::Rows read_row(const py::object& object, const char* name, std::int64_t n) {
    if (object.is_none()) return {};
    const View& view = flat(object, name, n);
    return {view.data, view.dtype, 0};
  }
  moe::RowsOut write_row(const py::object& object, const char* name, std::int64_t n) {
    if (object.is_none()) return {};
    const View& view = flat(object, name, n);
    if (view.read_only) fail(name, "expected a writable array");
    return {view.data, view.dtype, 0};
  }
  moe::Slots slots(const py::object& slot_of_row, const py::object& row_of_slot, std::int64_t tokens) {
    moe::Slots s;
    if (row_of_slot.is_none()) return s;
    const View& of_slot = any(row_of_slot, "row_of_slot");
    check_view(of_slot, "moe", "row_of_slot", 1, false);
    const std::int64_t count = of_slot.shape[0];
    s.k = tokens > 0 ? count / tokens : 0;
    if (s.k * tokens != count) fail("row_of_slot", "wrong shape " + of_slot.shape_text());
    s.row_of_slot = indices(of_slot, "row_of_slot");
    const View& of_row = any(slot_of_row, "slot_of_row");
    check_view(of_row, "moe", "slot_of_row", 1, false);
    s.rows = of_row.shape[0];
    s.slot_of_row = indices(of_row, "slot_of_row");
    return s;
  }
  // z (T, D), or expert rows beside slots.
  moe::Mixture mixture(const py::object& z, const py::object& weights, const moe::Slots& slots,
                       const py::object& shared, std::int64_t tokens, std::int64_t columns) {
    moe::Mixture m;
    m.slots = slots;
    m.rows = read(z, "z", slots.k > 0 ? slots.rows : tokens, columns);
    if (slots.k > 0) m.weights = read(weights, "weights", tokens, slots.k);
    m.shared = read(shared, "shared", tokens, columns);
    return m;
  }
  moe::Norm norm_of(const std::string& kind, const py::object& weight, const py::object& bias, double eps,
                    std::int64_t columns) {
    moe::Norm n;
    n.kind = static_cast<moe::NormKind>(index_of("norm", kind, {"", "layer", "rms"}));
    n.eps = eps;
    n.weight = read_row(weight, "norm_weight", columns);
    n.bias = read_row(bias, "norm_bias", columns);
    return n;
  }
  void copy_numbers(const std::vector<double>& given, double* to) const {
    if (given.size() > moe::kMaxNumbers) fail("numbers", "too many");
    std::copy(given.begin(), given.end(), to);
  }
  // One array per state, or none at all.
  template <class Each>
  void each_state(const py::tuple& given, Each&& each) {
    if (given.size() > moe::kMaxStates) fail("states", "too many");
    for (std::size_t i = 0; i < given.size(); ++i) each(i, py::object(given[i]));
  }

  moe::StepCall step(const std::string& rule, const std::vector<double>& numbers, bool wide, std::int64_t tokens,
                     std::int64_t columns, const py::object& x, const py::tuple& states, const py::object& z,
                     const py::object& weights, const py::object& slot_of_row, const py::object& row_of_slot,
                     const py::object& shared, const std::string& norm, const py::object& norm_weight,
                     const py::object& norm_bias, double eps, const py::object& out, const py::tuple& out_states,
                     const py::object& normed, const py::object& statistics) {
    moe::StepCall call;
    call.rule = rule_named(rule);
    copy_numbers(numbers, call.numbers);
    call.wide = wide;
    call.tokens = tokens;
    call.columns = columns;
    call.x = read(x, "x", tokens, columns);
    each_state(states, [&](std::size_t i, const py::object& s) { call.state[i] = read(s, "state", tokens, columns); });
    call.mixture = mixture(z, weights, slots(slot_of_row, row_of_slot, tokens), shared, tokens, columns);
    call.norm = norm_of(norm, norm_weight, norm_bias, eps, columns);
    call.out = write(out, "out", tokens, columns);
    each_state(out_states,
               [&](std::size_t i, const py::object& s) { call.out_state[i] = write(s, "out_state", tokens, columns); });
    call.normed = write(normed, "normed", tokens, columns);
    call.statistics = write(statistics, "statistics", tokens, 2);
    const Dtype maths = wide ? Dtype::kFloat64 : Dtype::kFloat32;
    if (call.statistics.data != nullptr && call.statistics.dtype != maths) fail("statistics", "wrong dtype");
    if (call.norm.kind != moe::NormKind::kNone && call.normed.data == nullptr && tokens * columns > 0) {
      fail("normed", "expected an array");
    }
    const bool reads_out = call.norm.kind != moe::NormKind::kNone && call.rule != moe::Depth::kLookahead;
    if (reads_out && call.out.data == nullptr && tokens * columns > 0) fail("out", "expected an array");
    return call;
  }

  // Arguments as of `step`, whose call this is the backward of. slopes: those of x, the states, z, weights, shared,
  // norm_weight, norm_bias and the numbers, each an array or None.
  moe::BackwardCall backward(const std::string& rule, const std::vector<double>& numbers, bool wide,
                             std::int64_t tokens, std::int64_t columns, const py::object& x, const py::tuple& states,
                             const py::object& z, const py::object& weights, const py::object& slot_of_row,
                             const py::object& row_of_slot, const py::object& shared, const std::string& norm,
                             const py::object& norm_weight, double eps, const py::object& after,
                             const py::object& after_state, const py::object& statistics, const py::object& grad,
                             const py::tuple& grad_states, const py::object& grad_normed, const py::object& slope_x,
                             const py::tuple& slope_states, const py::object& slope_z, const py::object& slope_weights,
                             const py::object& slope_shared, const py::object& slope_norm_weight,
                             const py::object& slope_norm_bias, const py::object& slope_numbers) {
    moe::BackwardCall call;
    call.rule = rule_named(rule);
    copy_numbers(numbers, call.numbers);
    call.wide = wide;
    call.tokens = tokens;
    call.columns = columns;
    call.x = read(x, "x", tokens, columns);
    each_state(states, [&](std::size_t i, const py::object& s) { call.state[i] = read(s, "state", tokens, columns); });
    call.mixture = mixture(z, weights, slots(slot_of_row, row_of_slot, tokens), shared, tokens, columns);
    call.norm = norm_of(norm, norm_weight, py::none(), eps, columns);
    call.after = read(after, "after", tokens, columns);
    call.after_state = read(after_state, "after_state", tokens, columns);
    call.statistics = read(statistics, "statistics", tokens, 2);
    const Dtype maths = wide ? Dtype::kFloat64 : Dtype::kFloat32;
    if (call.norm.kind != moe::NormKind::kNone && tokens * columns > 0 &&
        (call.statistics.data == nullptr || call.statistics.dtype != maths || call.statistics.stride != 2)) {
      fail("statistics", "expected those of the forward");
    }
    call.grad = read(grad, "grad", tokens, columns);
    each_state(grad_states, [&](std::size_t i, const py::object& s) {
      call.grad_state[i] = read(s, "grad_state", tokens, columns);
    });
    call.grad_normed = read(grad_normed, "grad_normed", tokens, columns);
    call.slope_x = write(slope_x, "slope_x", tokens, columns);
    each_state(slope_states, [&](std::size_t i, const py::object& s) {
      call.slope_state[i] = write(s, "slope_state", tokens, columns);
    });
    const moe::Slots& order = call.mixture.slots;
    call.slope_rows = write(slope_z, "slope_z", order.k > 0 ? order.rows : tokens, columns);
    if (order.k > 0) call.slope_weights = write(slope_weights, "slope_weights", tokens, order.k);
    call.slope_shared = write(slope_shared, "slope_shared", tokens, columns);
    call.slope_norm_weight = write_row(slope_norm_weight, "slope_norm_weight", columns);
    call.slope_norm_bias = write_row(slope_norm_bias, "slope_norm_bias", columns);
    call.slope_numbers = array<double>(slope_numbers, "slope_numbers", {moe::kMaxSlopes});
    if (call.slope_rows.data != nullptr && z.is_none()) call.mixture.rows.dtype = call.slope_rows.dtype;
    if (call.slope_rows.data != nullptr && call.mixture.rows.dtype != call.slope_rows.dtype) {
      fail("slope_z", "expected the dtype of z");
    }
    if (call.slope_weights.data != nullptr && z.is_none()) fail("z", "expected an array");
    return call;
  }

  PermuteCall permute(const py::object& x, const py::object& slot_of_row, const py::object& row_of_slot,
                      const py::object& out) {
    const View& view = rows(x, "x");
    PermuteCall call;
    call.tokens = view.shape[0];
    call.columns = view.shape[1];
    call.from = read(x, "x", call.tokens, call.columns);
    call.slots = slots(slot_of_row, row_of_slot, call.tokens);
    call.to = write(out, "out", call.slots.rows, call.columns);
    if (call.to.dtype != call.from.dtype) fail("out", "expected the dtype of x");
    return call;
  }

 private:
  const View& of_shape(const py::object& object, const char* name, std::int64_t rows, std::int64_t columns) {
    const View& view = any(object, name);
    check_view(view, "moe", name, 2, false);
    if (view.dtype > Dtype::kBFloat16) fail(name, "expected a float dtype");
    if (view.shape[0] != rows || view.shape[1] != columns) fail(name, "wrong shape " + view.shape_text());
    if (view.size() > 0 && columns > 1 && view.stride[1] != 1) fail(name, "expected contiguous rows");
    return view;
  }
  const View& flat(const py::object& object, const char* name, std::int64_t n) {
    const View& view = any(object, name);
    check_view(view, "moe", name, 1, false);
    if (view.dtype > Dtype::kBFloat16) fail(name, "expected a float dtype");
    if (view.shape[0] != n) fail(name, "wrong shape " + view.shape_text());
    if (n > 1 && view.stride[0] != 1) fail(name, "expected a contiguous array");
    return view;
  }
  const std::int64_t* indices(const View& view, const char* name) const {
    if (view.dtype != Dtype::kInt64) fail(name, "expected int64");
    if (view.shape[0] > 1 && view.stride[0] != 1) fail(name, "expected a contiguous array");
    return static_cast<const std::int64_t*>(view.data);
  }
};

}  // namespace hotloop::bind
