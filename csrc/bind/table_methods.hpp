// The methods of `_core.table.Table` and of `_cuda.table.Table`, written once over a backend.
//
// `Backend` names the types of its table (Table, Rows, Moment, Export, Pooled, Update), the memory its arrays lie in
// (kDevice; exports and imports lie on the host), and the guard under which it works without the GIL (Unlocked). It
// writes pool, export_rows and states in its own way. A method checks each array against the number of keys `n` and the
// settings of the table, releases the GIL and calls the table. Methods that only one backend has are in table.cpp and
// cuda_table.cpp.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bind/register.hpp"
#include "bind/table_arguments.hpp"
#include "bind/table_rules.hpp"

namespace hotloop::bind {

using Size = std::int64_t;

// bags: (n, keys, bags, offsets or None, weights or None, pool, scale).
struct BagArrays {
  Size n, count;
  const std::uint64_t* keys;
  const std::int64_t* offsets;  // (count + 1,)
  const float* weights;         // (n,)
  int pool;
  float scale;

  BagArrays(Arguments& a, const py::tuple& t)
      : n(t[0].cast<Size>()), count(t[2].cast<Size>()), keys(words(a, t[1], "keys", n, false)) {
    if (count < 0) a.fail("bags", "negative");
    offsets = column<std::int64_t>(a, t[3], "offsets", count + 1, false);
    if (offsets == nullptr && count != n) a.fail("bags", "expected one per key");
    weights = column<float>(a, t[4], "weights", n, false);
    pool = pool_named(t[5].cast<std::string>());
    scale = t[6].cast<float>();
  }
};

template <class Backend>
struct TableMethods {
  using Table = typename Backend::Table;
  using Rows = typename Backend::Rows;
  using Unlocked = typename Backend::Unlocked;

  struct Given : Arguments {
    Given(const char* op, std::size_t most, std::int32_t device = Backend::kDevice) : Arguments(op, most, device) {}
  };

  // A matrix (n, dim) of the type of the table.
  static Rows values_of(Arguments& a, const Table& t, const py::object& values, const char* name, Size n,
                        bool writable) {
    return matrix<Rows>(a, values, name, t.settings().dtype, n, t.settings().dim, writable);
  }
  // moment: (scores, epoch, time).
  static typename Backend::Moment moment_of(Arguments& a, const py::tuple& t, Size n) {
    return {words(a, t[0], "scores", n, false), t[1].cast<std::uint64_t>(), t[2].cast<std::uint32_t>()};
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
    const Rows v = values_of(a, t, values, "values", n, false);
    const auto m = moment_of(a, moment, n);
    auto* f = column<std::uint8_t>(a, found, "found", n, true);
    const Unlocked unlocked;
    t.assign({k, n}, v, m, accumulate, f);
  }

  static void erase(Table& t, Size n, const py::object& keys, const py::object& found) {
    Given a("Table.erase", 2);
    const auto* k = words(a, keys, "keys", n, false);
    auto* f = column<std::uint8_t>(a, found, "found", n, true);
    const Unlocked unlocked;
    t.erase({k, n}, f);
  }

  // arrays: (keys, values, state, scores, times) in host memory, None where not wanted.
  static typename Backend::Export export_of(Arguments& a, const Table& t, const py::tuple& arrays, Size n,
                                            bool writable) {
    typename Backend::Export e;
    e.keys = words(a, arrays[0], "keys", n, writable);
    e.values = values_of(a, t, arrays[1], "values", n, writable);
    e.state = matrix<Rows>(a, arrays[2], "state", Dtype::kFloat32, n, Backend::states(t), writable);
    e.scores = words(a, arrays[3], "scores", n, writable);
    e.times = numbers(a, arrays[4], "times", n, writable);
    return e;
  }

  static Size export_rows(Table& t, Size begin, Size end, std::uint64_t since, const py::tuple& arrays) {
    Given a("Table.export", 5, dlpack::kCpu);
    if (begin < 0 || end < begin || end > table::kMaxRows) a.fail("rows", "out of range");
    if (since > 0 && !t.settings().versions) a.fail("since", "changes are not tracked");
    const auto out = export_of(a, t, arrays, end - begin, true);
    const Unlocked unlocked;
    return Backend::export_rows(t, begin, end, since, out);
  }

  static void import_rows(Table& t, Size n, const py::tuple& arrays, bool beyond) {
    Given a("Table.import", 5, dlpack::kCpu);
    const auto in = export_of(a, t, arrays, n, false);
    if (n > 0 && (in.keys == nullptr || in.values.data == nullptr)) a.fail("keys", "missing");
    const Unlocked unlocked;
    t.import_rows({in.keys, n}, in, beyond);
  }

  static typename Backend::Pooled pooled_of(Arguments& a, const Table& t, Size bags, const py::object& out,
                                            const py::object& sizes, const py::object& largest) {
    typename Backend::Pooled p;
    const View& view = pooled(a, out, t.settings().dtype, bags, t.settings().dim);
    p.out = rows_of<Rows>(view);
    p.dtype = view.dtype;
    p.sizes = column<std::int64_t>(a, sizes, "sizes", bags, true);
    p.largest =
        static_cast<std::int64_t*>(a.dense(largest, "largest", Dtype::kInt64, {bags, t.settings().dim}, true).data);
    return p;
  }

  static void pool(Table& t, const py::tuple& bags, const py::object& rows, const py::object& out,
                   const py::object& sizes, const py::object& largest) {
    Given a("Table.pool", 7);
    const auto b = Backend::bags_of(a, bags, rows);
    const auto p = pooled_of(a, t, b.count, out, sizes, largest);
    const Unlocked unlocked;
    Backend::pool(t, b, p);
  }

  // grad: (bags, dim) float32; its rows lie `stride` floats apart.
  static const float* gradient_of(Arguments& a, const Table& t, Size bags, const py::object& grad, Size& stride) {
    const Rows g = matrix<Rows>(a, grad, "grad", Dtype::kFloat32, bags, t.settings().dim, false);
    stride = g.stride / 4;
    return reinterpret_cast<const float*>(g.data);
  }

  // All of an update but its time.
  static typename Backend::Update update_of(Arguments& a, const Table& t, const py::dict& rule, Size bags, int pool,
                                            const py::object& grad, const py::object& sizes, const py::object& largest,
                                            std::uint64_t seed) {
    typename Backend::Update u;
    u.spec = rule_spec(rule);
    if (state_floats(u.spec, t.settings().dim) != Backend::states(t)) a.fail("rule", "another state than the table's");
    u.seed = seed;
    u.grad = gradient_of(a, t, bags, grad, u.grad_stride);
    u.sizes = column<std::int64_t>(a, sizes, "sizes", bags, false);
    u.largest = static_cast<const std::int64_t*>(
        a.dense(largest, "largest", Dtype::kInt64, {bags, t.settings().dim}, false).data);
    constexpr int kMean = 1, kMax = 2;  // pool_named
    if (pool == kMean && u.sizes == nullptr) a.fail("sizes", "missing");
    if (pool == kMax && u.largest == nullptr) a.fail("largest", "missing");
    return u;
  }

  // What both tables have; the class goes on to define the rest.
  static void define(py::class_<Table>& c) {
    const auto unlocked = py::call_guard<Unlocked>();
    c.def_property_readonly("size", &Table::size)
        .def_property_readonly("capacity", &Table::capacity)
        .def_property_readonly("slots", &Table::slots)
        .def_property_readonly("bytes", &Table::bytes)
        .def_property_readonly("state_floats", &Backend::states)
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
