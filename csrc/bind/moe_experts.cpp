// SPDX-License-Identifier: Apache-2.0
// The products of experts and the loops over rows between them. Whatever is called with groups and slots trusts them:
// they are those of an `expert_groups` that did not refuse.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/arguments.hpp"
#include "bind/register.hpp"
#include "moe/activation.hpp"
#include "moe/groups.hpp"
#include "moe/products.hpp"

namespace hotloop::bind {

namespace {

using namespace hotloop::moe;

constexpr const char* kOp = "experts";

class ExpertArguments : public Arguments {
 public:
  ExpertArguments() : Arguments(kOp, 8) {}

  const View& floats(const py::object& object, const char* name, int rank, bool writable) {
    const View& view = any(object, name);
    check_view(view, kOp, name, rank, writable);
    if (view.dtype > Dtype::kBFloat16) fail(name, "expected a float dtype");
    return view;
  }
  // A contiguous matrix.
  const View& matrix(const py::object& object, const char* name, bool writable) {
    const View& view = floats(object, name, 2, writable);
    const bool rows_apart = view.shape[0] > 1 && view.stride[0] != view.shape[1];
    if (view.size() > 0 && (rows_apart || (view.shape[1] > 1 && view.stride[1] != 1)))
      fail(name, "expected a contiguous array");
    return view;
  }
  std::pair<const Group*, std::int64_t> groups(const py::object& object) {
    static_assert(sizeof(Group) == 3 * sizeof(std::int64_t));
    const View& view = any(object, "groups");
    check_view(view, kOp, "groups", 2, false);
    const std::int64_t count = view.shape[0];
    return {reinterpret_cast<const Group*>(dense_again(view, "groups", {count, 3}).data), count};
  }
  const std::int64_t* slots(const py::object& object) {
    if (object.is_none()) return nullptr;
    const View& view = any(object, "slots");
    check_view(view, kOp, "slots", 1, false);
    return static_cast<const std::int64_t*>(dense_again(view, "slots", {view.shape[0]}).data);
  }
  // (rows, slots, choices, first_row): a matrix, and how a row is found in it.
  Operand operand(const py::tuple& given, const char* name, bool rows_are_lanes, std::int64_t& columns) {
    if (given.size() != 4) fail(name, "expected rows, slots, choices and the first row");
    const View& view = floats(given[0], name, 2, false);
    Operand o;
    o.data = view.data;
    o.dtype = view.dtype;
    o.lane_stride = view.stride[rows_are_lanes ? 0 : 1];
    o.depth_stride = view.stride[rows_are_lanes ? 1 : 0];
    o.slots = slots(given[1]);
    o.choices = given[2].cast<std::int64_t>();
    o.first_row = o.slots == nullptr ? given[3].cast<std::int64_t>() : 0;
    columns = view.shape[1];
    return o;
  }

 private:
  const View& dense_again(const View& view, const char* name, const std::vector<std::int64_t>& shape) {
    std::int64_t stride = 1;
    if (view.dtype != Dtype::kInt64) fail(name, "expected int64");
    for (std::size_t i = shape.size(); i-- > 0; stride *= shape[i]) {
      if (view.shape[i] != shape[i]) fail(name, "wrong shape " + view.shape_text());
      if (view.size() > 0 && shape[i] > 1 && view.stride[i] != stride) fail(name, "expected a contiguous array");
    }
    return view;
  }
};

// The rows held and spans (first group, last group, first row, last row); None where the order does not hold.
py::object expert_groups(const py::object& slot_of_row, const py::object& row_of_slot, const py::object& offsets,
                         const py::object& counts, std::int64_t rows, const py::object& groups, std::int64_t most,
                         std::int64_t border) {
  ExpertArguments a;
  Order order;
  const View& cuts = a.any(offsets, "expert_offsets");
  if (cuts.rank != 1 || cuts.shape[0] < 1) a.fail("expert_offsets", "expected one dimension");
  order.experts = cuts.shape[0] - 1;
  order.rows = rows;
  order.expert_offsets = a.array<const std::int64_t>(offsets, "expert_offsets", {order.experts + 1});
  order.expert_counts = a.array<const std::int64_t>(counts, "expert_counts", {order.experts});
  order.slot_of_row = a.array<const std::int64_t>(slot_of_row, "slot_of_row", {rows});
  if (order.slot_of_row != nullptr || !slot_of_row.is_none()) {
    const View& places = a.any(row_of_slot, "row_of_slot");
    if (places.rank != 1) a.fail("row_of_slot", "expected one dimension");
    order.slots = places.shape[0];
    order.row_of_slot = a.array<const std::int64_t>(row_of_slot, "row_of_slot", {order.slots});
  }
  auto* const found = reinterpret_cast<Group*>(a.array<std::int64_t>(groups, "groups", {order.experts, 3}));
  std::int64_t held = 0;
  std::vector<Span> spans;
  {
    py::gil_scoped_release release;
    held = make_groups(order, found);
    if (held >= 0) spans = make_spans(found, order.experts, most, border);
  }
  if (held < 0) return py::none();
  py::list list;
  for (const Span& s : spans) list.append(py::make_tuple(s.first_group, s.last_group, s.first_row, s.last_row));
  return py::make_tuple(held, list);
}

// out[rows of a group] = rows weight[its expert]^T + bias. `rows` as ExpertArguments::operand takes it.
void rows_product(const py::tuple& rows, const py::object& weight, const py::object& bias, const py::object& groups,
                  const py::object& out, std::int64_t out_first_row) {
  ExpertArguments a;
  ProductCall call;
  std::tie(call.groups, call.group_count) = a.groups(groups);
  call.a = a.operand(rows, "rows", true, call.depth);
  const View& w = a.floats(weight, "weight", 3, false);
  const View& o = a.matrix(out, "out", true);
  if (call.depth != w.shape[2] || o.shape[1] != w.shape[1]) a.fail("weight", "wrong shape " + w.shape_text());
  call.b = {w.data, w.dtype, w.stride[0], w.stride[1], w.stride[2], nullptr, 1, 0};
  call.b_lanes = w.shape[1];
  call.bias = a.dense(bias, "bias", w.dtype, {w.shape[0], w.shape[1]}, false).data;
  call.out = o.data;
  call.out_dtype = o.dtype;
  call.out_row_stride = o.shape[1];
  call.out_first_row = out_first_row;
  py::gil_scoped_release release;
  grouped_product(call);
}

// out[expert] = left[rows of a group]^T right[rows of it], 0 for a group without rows.
void outer_product(const py::tuple& left, const py::tuple& right, const py::object& groups, const py::object& out) {
  ExpertArguments a;
  ProductCall call;
  call.outer = true;
  std::tie(call.groups, call.group_count) = a.groups(groups);
  call.a = a.operand(left, "left", false, call.a_lanes);
  call.b = a.operand(right, "right", false, call.b_lanes);
  const View& o = a.floats(out, "out", 3, true);
  if (o.shape[1] != call.a_lanes || o.shape[2] != call.b_lanes) a.fail("out", "wrong shape " + o.shape_text());
  std::int64_t row = o.stride[1], column = o.stride[2];
  if (column != 1 && call.b_lanes > 1) {  // stored the other way round
    std::swap(call.a, call.b);
    std::swap(call.a_lanes, call.b_lanes);
    std::swap(row, column);
  }
  if (column != 1 && call.b_lanes > 1) a.fail("out", "expected rows or columns side by side");
  call.out = o.data;
  call.out_dtype = o.dtype;
  call.out_expert_stride = o.stride[0];
  call.out_row_stride = row;
  py::gil_scoped_release release;
  grouped_product(call);
}

// (function, gated, interleaved, limit or None, alpha, shift)
Activation activation_of(ExpertArguments& a, const py::tuple& given) {
  if (given.size() != 6) a.fail("activation", "expected 6 options");
  Activation f;
  const auto name = given[0].cast<std::string>();
  constexpr const char* kNames[] = {"silu", "gelu", "gelu_tanh", "relu", "relu2"};
  int at = 0;
  while (at < 5 && name != kNames[at]) ++at;
  if (at == 5) a.fail("activation", "got " + name + ", which is not compiled in");
  f.function = static_cast<Function>(at);
  f.gated = given[1].cast<bool>();
  f.interleaved = given[2].cast<bool>();
  f.limit = given[3].is_none() ? std::numeric_limits<double>::infinity() : given[3].cast<double>();
  f.alpha = given[4].cast<double>();
  f.shift = given[5].cast<double>();
  return f;
}

// Of rows whose slots begin at `slots`.
void fill(ExpertArguments& a, ActivateCall& call, const py::tuple& activation, const py::object& slots,
          const py::object& inner, const py::object& out) {
  call.activation = activation_of(a, activation);
  const View& from = a.matrix(inner, "inner", false);
  const View& to = a.matrix(out, "out", true);
  call.dtype = from.dtype;
  call.rows = from.shape[0];
  call.width = to.shape[1];
  if (to.dtype != from.dtype || to.shape[0] != call.rows ||
      from.shape[1] != (call.activation.gated ? 2 : 1) * call.width)
    a.fail("out", "wrong shape " + to.shape_text());
  call.slots = a.array<const std::int64_t>(slots, "slots", {call.rows});
  call.inner = from.data;
  call.out = to.data;
}

void run_activate(const py::tuple& activation, const py::object& slots, const py::object& inner,
                  const py::object& out) {
  ExpertArguments a;
  ActivateCall call;
  fill(a, call, activation, slots, inner, out);
  py::gil_scoped_release release;
  activate(call);
}

void run_activate_gradient(const py::tuple& activation, const py::object& slots, const py::object& inner,
                           const py::object& above, const py::object& weights, const py::object& begin,
                           const py::object& gradient, const py::object& out, const py::object& weight_gradient) {
  ExpertArguments a;
  ActivateGradientCall call;
  fill(a, call, activation, slots, inner, out);
  const Dtype sums = call.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const std::int64_t inner_width = (call.activation.gated ? 2 : 1) * call.width;
  call.above = a.dense(above, "above", sums, {call.rows, call.width}, false).data;
  call.gradient = a.dense(gradient, "gradient", call.dtype, {call.rows, inner_width}, true).data;
  call.begin = a.dense(begin, "begin", sums, {call.rows, 1}, false).data;
  if (!weights.is_none()) {
    const std::int64_t count = a.any(weights, "weights").shape[0];
    call.weights = a.dense(weights, "weights", sums, {count}, false).data;
    call.weight_gradient = a.dense(weight_gradient, "weight_gradient", sums, {count}, true).data;
  }
  py::gil_scoped_release release;
  activate_gradient(call);
}

// Of rows whose slots begin at `slots`.
void run_scatter_add(const py::object& slots, std::int64_t choices, const py::object& rows, const py::object& weights,
                     const py::object& out) {
  ExpertArguments a;
  ScatterCall call;
  const View& from = a.matrix(rows, "rows", false);
  const View& to = a.matrix(out, "out", true);
  call.wide = from.dtype == Dtype::kFloat64;
  call.rows = from.shape[0];
  call.columns = from.shape[1];
  if ((from.dtype != Dtype::kFloat32 && !call.wide) || to.dtype != from.dtype || to.shape[1] != call.columns)
    a.fail("out", "expected the columns and type of sums of rows");
  call.choices = choices;
  call.slots = a.array<const std::int64_t>(slots, "slots", {call.rows});
  call.from = from.data;
  if (!weights.is_none()) {
    const std::int64_t count = a.any(weights, "weights").shape[0];
    call.weights = a.dense(weights, "weights", from.dtype, {count}, false).data;
  }
  call.out = to.data;
  py::gil_scoped_release release;
  scatter_add(call);
}

}  // namespace

HOTLOOP_BIND(moe) {
  def(m, "expert_groups", &expert_groups,
      "slot_of_row row_of_slot expert_offsets expert_counts rows groups most border");
  def(m, "rows_product", &rows_product, "rows weight bias groups out out_first_row");
  def(m, "outer_product", &outer_product, "left right groups out");
  def(m, "activate", &run_activate, "activation slots inner out");
  def(m, "activate_gradient", &run_activate_gradient,
      "activation slots inner above weights begin gradient out weight_gradient");
  def(m, "scatter_add", &run_scatter_add, "slots choices rows weights out");
}

}  // namespace hotloop::bind
