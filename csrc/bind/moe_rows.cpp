// SPDX-License-Identifier: Apache-2.0
// The passes over rows of moe. What is read has whole rows at any row stride; results are contiguous. None stands for a
// matrix that is absent: zeros where it is read, nothing to write. Slots and rows are looked at by the loops, so that
// nothing outside the arrays is read whatever they hold.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bind/arguments.hpp"
#include "bind/register.hpp"
#include "moe/row_pass.hpp"

namespace hotloop::bind {

namespace {

using namespace hotloop::moe;

int index_of(const char* what, const std::string& name, std::initializer_list<const char*> names) {
  int i = 0;
  for (const char* each : names) {
    if (name == each) return i;
    ++i;
  }
  throw std::invalid_argument(std::string("[moe] ") + what + ": got " + name + ", which is not compiled in.");
}

Depth rule_named(const std::string& name) {
  return static_cast<Depth>(index_of("rule", name, {"combine", "residual", "momentum", "adam", "robust", "lookahead"}));
}

class RowArguments : public Arguments {
 public:
  RowArguments() : Arguments("moe", 32) {}

  Rows read(const py::object& object, const char* name, std::int64_t rows, std::int64_t columns) {
    if (object.is_none()) return {};
    const View& view = of_shape(object, name, rows, columns);
    return {view.data, view.dtype, view.stride[0]};
  }
  RowsOut write(const py::object& object, const char* name, std::int64_t rows, std::int64_t columns) {
    if (object.is_none()) return {};
    const View& view = of_shape(object, name, rows, columns);
    if (view.read_only) fail(name, "expected a writable array");
    if (view.size() > 0 && rows > 1 && view.stride[0] != columns) fail(name, "expected a contiguous array");
    return {view.data, view.dtype, columns};
  }
  // (n,), contiguous.
  Rows read_row(const py::object& object, const char* name, std::int64_t n) {
    if (object.is_none()) return {};
    const View& view = flat(object, name, n);
    return {view.data, view.dtype, 0};
  }
  RowsOut write_row(const py::object& object, const char* name, std::int64_t n) {
    if (object.is_none()) return {};
    const View& view = flat(object, name, n);
    if (view.read_only) fail(name, "expected a writable array");
    return {view.data, view.dtype, 0};
  }
  Slots slots(const py::object& slot_of_row, const py::object& row_of_slot, std::int64_t tokens) {
    Slots s;
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
  Mixture mixture(const py::object& z, const py::object& weights, const Slots& slots, const py::object& shared,
                  std::int64_t tokens, std::int64_t columns) {
    Mixture m;
    m.slots = slots;
    m.rows = read(z, "z", slots.k > 0 ? slots.rows : tokens, columns);
    if (slots.k > 0) m.weights = read(weights, "weights", tokens, slots.k);
    m.shared = read(shared, "shared", tokens, columns);
    return m;
  }
  Norm norm(const std::string& kind, const py::object& weight, const py::object& bias, double eps,
            std::int64_t columns) {
    Norm n;
    n.kind = static_cast<NormKind>(index_of("norm", kind, {"", "layer", "rms"}));
    n.eps = eps;
    n.weight = read_row(weight, "norm_weight", columns);
    n.bias = read_row(bias, "norm_bias", columns);
    return n;
  }
  void numbers(const std::vector<double>& given, double* to) const {
    if (given.size() > kMaxNumbers) fail("numbers", "too many");
    std::copy(given.begin(), given.end(), to);
  }
  // One array per state, or none at all.
  template <class Each>
  void states(const py::tuple& given, Each&& each) {
    if (given.size() > kMaxStates) fail("states", "too many");
    for (std::size_t i = 0; i < given.size(); ++i) each(i, py::object(given[i]));
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

// Returns false where a slot and its row do not name each other.
bool run_step(const std::string& rule, const std::vector<double>& numbers, bool wide, std::int64_t tokens,
              std::int64_t columns, const py::object& x, const py::tuple& states, const py::object& z,
              const py::object& weights, const py::object& slot_of_row, const py::object& row_of_slot,
              const py::object& shared, const std::string& norm, const py::object& norm_weight,
              const py::object& norm_bias, double eps, const py::object& out, const py::tuple& out_states,
              const py::object& normed, const py::object& statistics) {
  RowArguments a;
  StepCall call;
  call.rule = rule_named(rule);
  a.numbers(numbers, call.numbers);
  call.wide = wide;
  call.tokens = tokens;
  call.columns = columns;
  call.x = a.read(x, "x", tokens, columns);
  a.states(states, [&](std::size_t i, const py::object& s) { call.state[i] = a.read(s, "state", tokens, columns); });
  call.mixture = a.mixture(z, weights, a.slots(slot_of_row, row_of_slot, tokens), shared, tokens, columns);
  call.norm = a.norm(norm, norm_weight, norm_bias, eps, columns);
  call.out = a.write(out, "out", tokens, columns);
  a.states(out_states,
           [&](std::size_t i, const py::object& s) { call.out_state[i] = a.write(s, "out_state", tokens, columns); });
  call.normed = a.write(normed, "normed", tokens, columns);
  call.statistics = a.write(statistics, "statistics", tokens, 2);
  const Dtype maths = wide ? Dtype::kFloat64 : Dtype::kFloat32;
  if (call.statistics.data != nullptr && call.statistics.dtype != maths) a.fail("statistics", "wrong dtype");
  if (call.norm.kind != NormKind::kNone && call.normed.data == nullptr && tokens * columns > 0) {
    a.fail("normed", "expected an array");
  }
  const bool reads_out = call.norm.kind != NormKind::kNone && call.rule != Depth::kLookahead;
  if (reads_out && call.out.data == nullptr && tokens * columns > 0) a.fail("out", "expected an array");
  py::gil_scoped_release release;
  return step(call);
}

// Arguments as of run_step, whose call this is the backward of. slopes: those of x, the states, z, weights, shared,
// norm_weight, norm_bias and the numbers, each an array or None.
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
  BackwardCall call;
  call.rule = rule_named(rule);
  a.numbers(numbers, call.numbers);
  call.wide = wide;
  call.tokens = tokens;
  call.columns = columns;
  call.x = a.read(x, "x", tokens, columns);
  a.states(states, [&](std::size_t i, const py::object& s) { call.state[i] = a.read(s, "state", tokens, columns); });
  call.mixture = a.mixture(z, weights, a.slots(slot_of_row, row_of_slot, tokens), shared, tokens, columns);
  call.norm = a.norm(norm, norm_weight, py::none(), eps, columns);
  call.after = a.read(after, "after", tokens, columns);
  call.after_state = a.read(after_state, "after_state", tokens, columns);
  call.statistics = a.read(statistics, "statistics", tokens, 2);
  const Dtype maths = wide ? Dtype::kFloat64 : Dtype::kFloat32;
  if (call.norm.kind != NormKind::kNone && tokens * columns > 0 &&
      (call.statistics.data == nullptr || call.statistics.dtype != maths || call.statistics.stride != 2)) {
    a.fail("statistics", "expected those of the forward");
  }
  call.grad = a.read(grad, "grad", tokens, columns);
  a.states(grad_states,
           [&](std::size_t i, const py::object& s) { call.grad_state[i] = a.read(s, "grad_state", tokens, columns); });
  call.grad_normed = a.read(grad_normed, "grad_normed", tokens, columns);
  call.slope_x = a.write(slope_x, "slope_x", tokens, columns);
  a.states(slope_states, [&](std::size_t i, const py::object& s) {
    call.slope_state[i] = a.write(s, "slope_state", tokens, columns);
  });
  const Slots& slots = call.mixture.slots;
  call.slope_rows = a.write(slope_z, "slope_z", slots.k > 0 ? slots.rows : tokens, columns);
  if (slots.k > 0) call.slope_weights = a.write(slope_weights, "slope_weights", tokens, slots.k);
  call.slope_shared = a.write(slope_shared, "slope_shared", tokens, columns);
  call.slope_norm_weight = a.write_row(slope_norm_weight, "slope_norm_weight", columns);
  call.slope_norm_bias = a.write_row(slope_norm_bias, "slope_norm_bias", columns);
  call.slope_numbers = a.array<double>(slope_numbers, "slope_numbers", {kMaxSlopes});
  if (call.slope_rows.data != nullptr && z.is_none()) call.mixture.rows.dtype = call.slope_rows.dtype;
  if (call.slope_rows.data != nullptr && call.mixture.rows.dtype != call.slope_rows.dtype) {
    a.fail("slope_z", "expected the dtype of z");
  }
  if (call.slope_weights.data != nullptr && z.is_none()) a.fail("z", "expected an array");
  py::gil_scoped_release release;
  step_backward(call);
}

bool run_permute(const py::object& x, const py::object& slot_of_row, const py::object& row_of_slot,
                 const py::object& out) {
  RowArguments a;
  const View& view = a.rows(x, "x");
  const std::int64_t tokens = view.shape[0], columns = view.shape[1];
  const Rows from = a.read(x, "x", tokens, columns);
  const Slots slots = a.slots(slot_of_row, row_of_slot, tokens);
  const RowsOut to = a.write(out, "out", slots.rows, columns);
  if (to.dtype != from.dtype) a.fail("out", "expected the dtype of x");
  py::gil_scoped_release release;
  return permute(from, tokens, columns, slots, to);
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
