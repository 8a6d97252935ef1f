// SPDX-License-Identifier: Apache-2.0
// The table on the CPU: the backend for table_methods.hpp, the methods that the table on a device does not have (find,
// find_or_insert, upsert, updates, trim), and two reductions over arrays. Offsets of bags are checked here, since the
// loops trust them. A call runs without the GIL and is counted while it runs, so that a fork waits for it.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bind/released.hpp"
#include "bind/table_methods.hpp"
#include "table/filter.hpp"
#include "table/store/pool.hpp"
#include "table/store/table.hpp"

namespace hotloop::bind {

namespace {

struct Cpu {
  using Table = table::Table;
  using Unlocked = Released;
  static constexpr std::int32_t kDevice = dlpack::kCpu;

  static void check_offsets(Arguments& a, const Bags& b) {
    if (b.offsets[0] != 0 || b.offsets[b.count] != b.keys.count) a.fail("offsets", "out of range");
    for (Size i = 0; i < b.count; ++i) {
      if (b.offsets[i] > b.offsets[i + 1]) a.fail("offsets", "decrease");
    }
  }
  static void pool(const Table& t, const Bags& b, const Pooled& p) { pool_bags(t, b, p); }
};

using Methods = TableMethods<Cpu>;
using Given = Methods::Given;

// admission: None, (CountFilter, threshold), or (seed, step, threshold, equal).
Admission admission_of(const py::object& given) {
  if (given.is_none()) return {};
  const auto t = given.cast<py::tuple>();
  if (t.size() == 2) {
    auto& filter = t[0].cast<CountFilter&>();
    const auto threshold = t[1].cast<std::uint32_t>();
    return {
        [&filter, threshold](std::uint64_t key, std::uint32_t count) { return filter.admits(key, count, threshold); },
        &filter};
  }
  const auto seed = t[0].cast<std::uint64_t>(), step = t[1].cast<std::uint64_t>();
  const auto threshold = t[2].cast<double>();
  const bool equal = t[3].cast<bool>();
  return {[=](std::uint64_t key, std::uint32_t count) {
    return probabilistic_admits(seed, key, step, count, threshold, equal);
  }};
}

Found found_of(Arguments& a, const Table& t, Size n, const py::object& values, float scale) {
  const View& view = pooled(a, values, t.settings().dtype, n, t.settings().dim);
  return {rows_of(view), view.dtype, scale};
}

void run_find(const Table& t, Size n, const py::object& keys, const py::object& values, const py::object& found,
              float scale) {
  Given a("Table.find", 3);
  const auto* k = words(a, keys, "keys", n, false);
  const Found out = found_of(a, t, n, values, scale);
  auto* f = a.array<std::uint8_t>(found, "found", {n});
  const Released released;
  find(t, {k, n}, out, f);
}

// found, and scores where they are asked for.
void run_contains(const Table& t, Size n, const py::object& keys, const py::object& found, const py::object& scores) {
  Given a("Table.contains", 3);
  const auto* k = words(a, keys, "keys", n, false);
  auto* f = a.array<std::uint8_t>(found, "found", {n});
  auto* s = words(a, scores, "scores", n, true);
  const Released released;
  t.find({k, n}, {}, f, s);
}

void run_find_or_insert(Table& t, Size n, const py::object& keys, const py::object& values, const py::object& found,
                        float scale, const py::tuple& moment, const py::object& admission) {
  Given a("Table.find_or_insert", 4);
  const Admission admit = admission_of(admission);
  Upsert call;
  call.keys = {words(a, keys, "keys", n, false), n};
  call.stamp = Methods::stamp_of(a, moment, n);
  call.admission = admit.admits ? &admit : nullptr;
  call.found = a.array<std::uint8_t>(found, "found", {n});
  const Found out = found_of(a, t, n, values, scale);
  const Released released;
  find_or_insert(t, call, out);
}

// The keys and values of evicted rows and their scores, as bytes, if they are kept.
py::object run_upsert(Table& t, Size n, const py::object& keys, const py::object& values, const py::tuple& moment,
                      const py::object& admission, bool keep_evicted, const py::object& rows, const py::object& found) {
  Given a("Table.upsert", 5);
  const Admission admit = admission_of(admission);
  Evicted evicted;
  Upsert call;
  call.keys = {words(a, keys, "keys", n, false), n};
  call.values = Methods::values_of(a, t, values, "values", n, false);
  call.stamp = Methods::stamp_of(a, moment, n);
  call.admission = admit.admits ? &admit : nullptr;
  call.evicted = keep_evicted ? &evicted : nullptr;
  call.rows = numbers(a, rows, "rows", n, true);
  call.found = a.array<std::uint8_t>(found, "found", {n});
  {
    const Released released;
    t.upsert(call);
  }
  if (!keep_evicted) return py::none();
  return py::make_tuple(bytes_of(evicted.keys), bytes_of(evicted.values), bytes_of(evicted.scores));
}

void run_pool_or_insert(Table& t, const py::tuple& bags, const py::tuple& moment, const py::object& admission,
                        const py::object& rows, const py::object& found, const py::object& out, const py::object& sizes,
                        const py::object& largest) {
  Given a("Table.pool_or_insert", 9);
  const Bags b = Methods::bags_of(a, bags, py::none());
  const Admission admit = admission_of(admission);
  Upsert call;
  call.keys = b.keys;
  call.stamp = Methods::stamp_of(a, moment, b.keys.count);
  call.admission = admit.admits ? &admit : nullptr;
  call.rows = numbers(a, rows, "rows", b.keys.count, true);
  call.found = a.array<std::uint8_t>(found, "found", {b.keys.count});
  const Pooled p = Methods::pooled_of(a, t, b.count, out, sizes, largest);
  const Released released;
  pool_or_insert(t, b, call, p);
}

// kept: (n, dim), as `pool` gave them out for bags of one key.
void run_weight_gradient(const Table& t, const py::tuple& bags, const py::object& kept, const py::object& grad,
                         const py::object& out) {
  Given a("Table.weight_gradient", 6);
  const Bags b = Methods::bags_of(a, bags, py::none());
  const View& view = pooled(a, kept, t.settings().dtype, b.keys.count, t.settings().dim);
  const auto rows = rows_of(view);
  const Dtype dtype = view.dtype;
  Size stride = 0;
  const float* g = Methods::gradient_of(a, t, b.count, grad, stride);
  auto* o = a.array<float>(out, "out", {b.keys.count});
  const Released released;
  weight_gradient(b, rows, dtype, t.settings().dim, g, stride, o);
}

Size run_update(Table& t, const py::dict& rule, const py::tuple& bags, const py::object& rows, const py::object& grad,
                const py::object& sizes, const py::object& largest, std::uint32_t time, std::uint64_t seed) {
  Given a("Table.update", 8);
  const Bags b = Methods::bags_of(a, bags, rows);
  const Update u = Methods::update_of(a, t, rule, b, grad, sizes, largest, time, seed);
  const Released released;
  return update_bags(t, b, u);
}

// The largest size among the numbers; NaN or infinity where there is one.
float run_largest(const py::object& x) {
  Arguments a("largest", 1);
  const View& v = a.tile(x, "grad", false);
  if (v.dtype != Dtype::kFloat32) a.fail("grad", "expected float32");
  const Released released;
  if (v.shape[0] <= 1 || v.stride[0] == v.shape[1]) return largest(static_cast<const float*>(v.data), v.size());
  float most = 0;
  for (Size i = 0; i < v.shape[0]; ++i) {
    const float row = largest(static_cast<const float*>(v.data) + i * v.stride[0], v.shape[1]);
    if (!(row <= most)) most = row;  // NaN stays
    if (most != most) break;
  }
  return most;
}

Size run_least(Size n, const py::object& x) {
  Arguments a("least", 1);
  const auto* data = a.array<const std::int64_t>(x, "scores", {n});
  Size least = n > 0 ? data[0] : 0;
  for (Size i = 1; i < n; ++i) least = std::min(least, data[i]);
  return least;
}

}  // namespace

HOTLOOP_BIND(table) {
  py::register_exception<TableFull>(m, "TableFull");
  py::class_<Table> c(m, "Table");
  c.def(py::init([](const py::dict& settings) { return std::make_unique<Table>(settings_of(settings)); }),
        py::arg("settings"))
      .def_property_readonly("row_bytes", [](const Table& t) { return t.layout().stride; })
      .def_property_readonly("end", [](const Table& t) { return t.arena().end(); })
      .def("trim", &Table::trim, py::call_guard<Released>());
  Methods::define(c);
  def(c, "find", &run_find, "n keys values found scale");
  def(c, "contains", &run_contains, "n keys found scores");
  def(c, "find_or_insert", &run_find_or_insert, "n keys values found scale moment admission");
  def(c, "upsert", &run_upsert, "n keys values moment admission keep_evicted rows found");
  def(c, "pool_or_insert", &run_pool_or_insert, "bags moment admission rows found out sizes largest");
  def(c, "weight_gradient", &run_weight_gradient, "bags kept grad out");
  def(c, "update", &run_update, "rule bags rows grad sizes largest time seed");
  def(m, "largest", &run_largest, "x");
  def(m, "least", &run_least, "n x");
}

}  // namespace hotloop::bind
