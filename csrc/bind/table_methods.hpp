// SPDX-License-Identifier: Apache-2.0
// The methods of `_core.table.Table` and of `_cuda.table.Table`, written once over a backend.
//
// `Backend` names its Table, the memory its arrays lie in (kDevice; exports and imports lie on the host), and the guard
// under which it works without the GIL (Unlocked). It looks at offsets of bags (check_offsets) and pools in its own
// way. A method checks each array against the number of keys `n` and the settings of the table, releases the GIL and
// calls the table. Methods that only one backend has are in table.cpp and cuda_table.cpp.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bind/register.hpp"
#include "bind/table_arguments.hpp"
#include "bind/table_rules.hpp"
#include "table/store/calls.hpp"

namespace hotloop::bind {

using Size = std::int64_t;
using namespace hotloop::table;

template <class Backend>
struct TableMethods {
  using Table = typename Backend::Table;
  using Unlocked = typename Backend::Unlocked;

  struct Given : Arguments {
    Given(const char* op, std::size_t most, std::int32_t device = Backend::kDevice) : Arguments(op, most, device) {}
  };

  static Size states(const Table& t) { return static_cast<Size>(t.settings().initial_state.size()); }

  // A matrix (n, dim) of the type of the table.
  static Values values_of(Arguments& a, const Table& t, const py::object& values, const char* name, Size n,
                          bool writable) {
    return matrix(a, values, name, t.settings().dtype, n, t.settings().dim, writable);
  }
  // moment: (scores, epoch, time).
  static Stamp stamp_of(Arguments& a, const py::tuple& t, Size n) {
    return {words(a, t[0], "scores", n, false), t[1].cast<std::uint64_t>(), t[2].cast<std::uint32_t>()};
  }

  // bags: (n, keys, bags, offsets or None, weights or None, pool, scale).
  static Bags bags_of(Arguments& a, const py::tuple& t, const py::object& rows) {
    const auto n = t[0].cast<Size>();
    Bags b;
    b.count = t[2].cast<Size>();
    b.keys = {words(a, t[1], "keys", n, false), n};
    if (b.count < 0) a.fail("bags", "negative");
    b.offsets = a.array<const std::int64_t>(t[3], "offsets", {b.count + 1});
    if (b.offsets == nullptr && b.count != n) a.fail("bags", "expected one per key");
    b.weights = a.array<const float>(t[4], "weights", {n});
    b.pool = pool_named(t[5].cast<std::string>());
    b.scale = t[6].cast<float>();
    if (b.offsets != nullptr) Backend::check_offsets(a, b);
    b.rows = numbers(a, rows, "rows", n, false);
    return b;
  }

  static void locate(Table& t, Size n, const py::object& keys, const py::object& rows) {
    Given a("Table.locate", 2);
    const auto* k = words(a, keys, "keys", n, false);
    auto* r = numbers(a, rows, "rows", n, true);
    const Unlocked unlocked;
    t.locate({k, n}, r);
  }

  static void assign(Table& t, Size n, const py::object& keys, const py::object& values, const py::tuple& moment,
                     bool accumulate, const py::object& found) {
    Given a("Table.assign", 4);
    const auto* k = words(a, keys, "keys", n, false);
    const Values v = values_of(a, t, values, "values", n, false);
    const Stamp m = stamp_of(a, moment, n);
    auto* f = a.array<std::uint8_t>(found, "found", {n});
    const Unlocked unlocked;
    t.assign({k, n}, v, m, accumulate, f);
  }

  static void erase(Table& t, Size n, const py::object& keys, const py::object& found) {
    Given a("Table.erase", 2);
    const auto* k = words(a, keys, "keys", n, false);
    auto* f = a.array<std::uint8_t>(found, "found", {n});
    const Unlocked unlocked;
    t.erase({k, n}, f);
  }

  // arrays: (keys, values, state, scores, times) in host memory, None where not wanted.
  static Export export_of(Arguments& a, const Table& t, const py::tuple& arrays, Size n, bool writable) {
    Export e;
    e.keys = words(a, arrays[0], "keys", n, writable);
    e.values = values_of(a, t, arrays[1], "values", n, writable);
    e.state = matrix(a, arrays[2], "state", Dtype::kFloat32, n, states(t), writable);
    e.scores = words(a, arrays[3], "scores", n, writable);
    e.times = numbers(a, arrays[4], "times", n, writable);
    return e;
  }

  static Size export_rows(Table& t, Size begin, Size end, std::uint64_t since, const py::tuple& arrays) {
    Given a("Table.export", 5, dlpack::kCpu);
    if (begin < 0 || end < begin || end > kMaxRows) a.fail("rows", "out of range");
    if (since > 0 && !t.settings().versions) a.fail("since", "changes are not tracked");
    const auto out = export_of(a, t, arrays, end - begin, true);
    const Unlocked unlocked;
    return t.export_rows(begin, end, since, out);
  }

  static void import_rows(Table& t, Size n, const py::tuple& arrays, bool beyond) {
    Given a("Table.import", 5, dlpack::kCpu);
    const auto in = export_of(a, t, arrays, n, false);
    if (n > 0 && (in.keys == nullptr || in.values.data == nullptr)) a.fail("keys", "missing");
    const Unlocked unlocked;
    t.import_rows({in.keys, n}, in, beyond);
  }

  static Pooled pooled_of(Arguments& a, const Table& t, Size bags, const py::object& out, const py::object& sizes,
                          const py::object& largest) {
    const View& view = pooled(a, out, t.settings().dtype, bags, t.settings().dim);
    Pooled p{rows_of(view), view.dtype};
    p.sizes = a.array<std::int64_t>(sizes, "sizes", {bags});
    p.largest = a.array<std::int64_t>(largest, "largest", {bags, t.settings().dim});
    return p;
  }

  static void pool(Table& t, const py::tuple& bags, const py::object& rows, const py::object& out,
                   const py::object& sizes, const py::object& largest) {
    Given a("Table.pool", 7);
    const Bags b = bags_of(a, bags, rows);
    const Pooled p = pooled_of(a, t, b.count, out, sizes, largest);
    const Unlocked unlocked;
    Backend::pool(t, b, p);
  }

  // grad: (bags, dim) float32; its rows lie `stride` floats apart.
  static const float* gradient_of(Arguments& a, const Table& t, Size bags, const py::object& grad, Size& stride) {
    const Values g = matrix(a, grad, "grad", Dtype::kFloat32, bags, t.settings().dim, false);
    stride = g.stride / 4;
    return reinterpret_cast<const float*>(g.data);
  }

  static Update update_of(Arguments& a, const Table& t, const py::dict& rule, const Bags& b, const py::object& grad,
                          const py::object& sizes, const py::object& largest, std::uint32_t time, std::uint64_t seed) {
    const Size bags = b.count;
    Update u;
    u.spec = rule_spec(rule);
    if (state_floats(u.spec, t.settings().dim) != states(t)) a.fail("rule", "another state than the table's");
    u.stamp.time = time;
    u.seed = seed;
    u.grad = gradient_of(a, t, bags, grad, u.grad_stride);
    u.sizes = a.array<const std::int64_t>(sizes, "sizes", {bags});
    u.largest = a.array<const std::int64_t>(largest, "largest", {bags, t.settings().dim});
    if (b.rows == nullptr && b.keys.count > 0) a.fail("rows", "missing");
    if (b.pool == Pool::kMean && u.sizes == nullptr) a.fail("sizes", "missing");
    if (b.pool == Pool::kMax && u.largest == nullptr) a.fail("largest", "missing");
    return u;
  }

  // What both tables have; the class goes on to define the rest.
  static void define(py::class_<Table>& c) {
    const auto unlocked = py::call_guard<Unlocked>();
    c.def_property_readonly("size", &Table::size)
        .def_property_readonly("capacity", &Table::capacity)
        .def_property_readonly("slots", &Table::slots)
        .def_property_readonly("bytes", &Table::bytes)
        .def_property_readonly("state_floats", &states)
        .def_property("generation", &Table::generation, &Table::set_generation)
        .def_property("tick", &Table::tick, &Table::set_tick)
        .def("clear", &Table::clear, unlocked)
        .def("reserve", &Table::reserve, py::arg("rows"), unlocked)
        .def("expire", &Table::expire, py::arg("time"), unlocked)
        .def("import_rows", &import_rows, py::arg("n"), py::arg("arrays"), py::arg("beyond") = false)
        .def("mark", &Table::mark)
        .def(
            "erased_since", [](Table& t, std::uint64_t since) { return bytes_of(t.erased_since(since)); },
            py::arg("since"))
        .def("changed_since", &Table::changed_since, py::arg("since"), unlocked)
        .def("forget_erased", &Table::forget_erased, py::arg("until"));
    def(c, "locate", &locate, "n keys rows");
    def(c, "assign", &assign, "n keys values moment accumulate found");
    def(c, "erase", &erase, "n keys found");
    def(c, "export", &export_rows, "begin end since arrays");
    def(c, "pool", &pool, "bags rows out sizes largest");
  }
};

}  // namespace hotloop::bind
