// SPDX-License-Identifier: Apache-2.0
// Row updates of dense tensors, merging of duplicate ids, int8 quantization, and the shape of an optimizer's state. Row
// numbers are compared with the number of rows of the weight before a loop runs, since the loop writes to any row
// number it is given.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind/arguments.hpp"
#include "bind/register.hpp"
#include "bind/released.hpp"
#include "bind/table_rules.hpp"
#include "table/rows/merge.hpp"
#include "table/rows/quantize.hpp"
#include "table/rows/row_rules.hpp"

namespace hotloop::bind {

using namespace hotloop::table;

namespace {

bool is_float(Dtype dtype) { return dtype == Dtype::kFloat32 || dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16; }

// A float matrix whose rows are contiguous; None of its items lies outside what the loops will touch.
const View& float_rows(Arguments& a, const py::object& object, const char* name, bool writable) {
  const View& view = a.tile(object, name, writable);
  if (!is_float(view.dtype))
    a.fail(name, std::string("expected float32, float16 or bfloat16, got ") + dtype_name(view.dtype));
  return view;
}

// state: scalars (rows,) or (rows, 1) first, then vectors (rows, dim).
void update(const py::dict& rule, const py::object& weight, const py::object& grad, const py::list& state,
            const py::object& rows, bool distinct, std::uint64_t seed) {
  constexpr const char* kOp = "table_update_rows";
  Arguments a(kOp, 8);
  UpdateCall call;
  call.spec = rule_spec(rule);
  const View& w = float_rows(a, weight, "weight", true);
  const View& g = a.tile(grad, "grad", false);
  if (g.dtype != Dtype::kFloat32 || g.shape[1] != w.shape[1])
    a.fail("grad", "expected float32 like weight, got " + g.shape_text());
  call.n = g.shape[0];
  call.dim = w.shape[1];
  call.grad = static_cast<const float*>(g.data);
  call.grad_stride = g.stride[0];
  call.values = w.data;
  call.dtype = w.dtype;
  call.value_stride = w.stride[0];
  call.distinct = distinct;
  call.seed = seed;
  const std::int64_t scalars = state_scalars(call.spec), vectors = state_vectors(call.spec);
  if (static_cast<std::int64_t>(state.size()) != scalars + vectors) {
    a.fail("state", "expected " + std::to_string(scalars + vectors) + " arrays, got " + std::to_string(state.size()));
  }
  for (std::int64_t k = 0; k < scalars + vectors; ++k) {
    const py::object item = state[static_cast<std::size_t>(k)];
    if (item.is_none() && k == 0 && call.spec.step > 0) continue;  // a step of all rows
    const View& view = a.tile(item, "state", true);
    const std::int64_t width = k < scalars ? 1 : call.dim;
    if (view.dtype != Dtype::kFloat32 || view.shape[0] != w.shape[0] || view.shape[1] != width) {
      a.fail("state", "expected float32 of one row per weight, got " + view.shape_text());
    }
    StateColumn& column = k < scalars ? call.scalars[k] : call.vectors[k - scalars];
    column = {static_cast<float*>(view.data), view.stride[0]};
  }
  if (rows.is_none()) {
    if (g.shape[0] != w.shape[0]) a.fail("grad", "expected one row per row of weight, got " + g.shape_text());
  } else {
    call.rows = a.array<const std::int64_t>(rows, "rows", {call.n});
    for (std::int64_t i = 0; i < call.n; ++i) {
      if (call.rows[i] < 0 || call.rows[i] >= w.shape[0]) {
        a.fail("ids", "expected 0 to " + std::to_string(w.shape[0] - 1) + ", got " + std::to_string(call.rows[i]) +
                          " at [" + std::to_string(i) + "]");
      }
    }
  }
  const Released released;
  update_rows(call);
}

std::int64_t number(const py::object& ids, const py::object& inverse, const py::object& unique,
                    const py::object& counts) {
  constexpr const char* kOp = "table_number_ids";
  Arguments a(kOp, 4);
  const Array first(ids, kOp, "ids");
  check_view(first.view, kOp, "ids", 1, false);
  const std::int64_t n = first.view.shape[0];
  const auto dense = [&](const py::object& x, const char* name, bool writable) {
    return static_cast<std::int64_t*>(a.dense(x, name, Dtype::kInt64, {n}, writable).data);
  };
  const std::int64_t* const in = dense(ids, "ids", false);
  std::int64_t* const number_of = dense(inverse, "inverse", true);
  std::int64_t* const out = dense(unique, "unique", true);
  std::int64_t* const many = dense(counts, "counts", true);
  const Released released;
  return number_ids(in, n, number_of, out, many);
}

void merge(const py::object& grads, const py::object& inverse, const py::object& out) {
  constexpr const char* kOp = "table_merge_rows";
  Arguments a(kOp, 3);
  MergeCall call;
  const View& g = float_rows(a, grads, "grads", false);
  call.n = g.shape[0];
  call.dim = g.shape[1];
  call.grads = g.data;
  call.dtype = g.dtype;
  call.grad_stride = g.stride[0];
  call.inverse = a.array<const std::int64_t>(inverse, "inverse", {call.n});
  const View& sums = a.tile(out, "out", true);
  call.unique = sums.shape[0];
  call.out = a.array<float>(out, "out", {call.unique, call.dim});
  // Numbers must first appear in ascending order: rows of `out` are written, not added to, when they do.
  std::int64_t seen = 0;
  for (std::int64_t i = 0; i < call.n; ++i) {
    if (call.inverse[i] < 0 || call.inverse[i] > seen || call.inverse[i] >= call.unique) {
      a.fail("inverse", "expected numbers in the order of their first occurrence");
    }
    seen += call.inverse[i] == seen ? 1 : 0;
  }
  const Released released;
  merge_rows(call);
}

// codes: the int8 matrix, seen as uint8.
void quantize(const py::object& values, const py::object& codes, double range, bool encode) {
  constexpr const char* kOp = "table_quantize";
  Arguments a(kOp, 2);
  QuantizeCall call;
  const View& v = float_rows(a, values, "values", !encode);
  const View& q = a.tile(codes, "codes", encode);
  if (q.dtype != Dtype::kUInt8 || q.shape[0] != v.shape[0] || q.shape[1] != v.shape[1]) {
    a.fail("codes", "expected bytes of the shape of values, got " + q.shape_text());
  }
  call.n = v.shape[0];
  call.dim = v.shape[1];
  call.range = static_cast<float>(range);
  call.values = v.data;
  call.dtype = v.dtype;
  call.value_stride = v.stride[0];
  call.codes = static_cast<std::int8_t*>(q.data);
  call.code_stride = q.stride[0];
  const Released released;
  quantize_rows(call, encode);
}

py::tuple state_shape(const py::dict& rule) {
  const RuleSpec spec = rule_spec(rule);
  return py::make_tuple(state_scalars(spec), state_vectors(spec));
}

}  // namespace

HOTLOOP_BIND(table) {
  def(m, "update_rows", &update, "rule weight grad state rows distinct seed");
  def(m, "state_shape", &state_shape, "rule");
  def(m, "number_ids", &number, "ids inverse unique counts");
  def(m, "merge_rows", &merge, "grads inverse out");
  def(m, "quantize", &quantize, "values codes value_range encode");
}

}  // namespace hotloop::bind
