#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "bind/register.hpp"
#include "bind/released.hpp"
#include "bind/table_arguments.hpp"
#include "bind/table_rules.hpp"
#include "table/filter.hpp"
#include "table/store/pool.hpp"
#include "table/store/table.hpp"

namespace hotloop::bind {

namespace {

using namespace hotloop::table;
using Size = std::int64_t;

Keys keys_of(Arguments& a, const py::object& object, Size n) { return {words(a, object, "keys", n, false), n}; }

struct Moment {  // (scores, epoch, time)
  py::object scores = py::none();
  std::uint64_t epoch = 0;
  std::uint32_t time = 0;
  explicit Moment(const py::tuple& t)
      : scores(t[0]), epoch(t[1].cast<std::uint64_t>()), time(t[2].cast<std::uint32_t>()) {}
  Stamp stamp(Arguments& a, Size n) const { return {words(a, scores, "scores", n, false), epoch, time, 0}; }
};

Found found_of(Arguments& a, const Table& t, Size n, const py::object& values, float scale) {
  const View& view = pooled(a, values, t.settings().dtype, n, t.settings().dim);
  return {rows_of<Values>(view), view.dtype, scale};
}

void run_find(const Table& t, Size n, const py::object& keys, const py::object& values, const py::object& found,
              float scale) {
  Arguments a("Table.find", 3);
  const Keys k = keys_of(a, keys, n);
  const Found out = found_of(a, t, n, values, scale);
  auto* f = column<std::uint8_t>(a, found, "found", n, true);
  const Released released;
  find(t, k, out, f);
}

// found, and scores where they are asked for.
void run_contains(const Table& t, Size n, const py::object& keys, const py::object& found, const py::object& scores) {
  Arguments a("Table.contains", 3);
  const Keys k = keys_of(a, keys, n);
  auto* f = column<std::uint8_t>(a, found, "found", n, true);
  auto* s = words(a, scores, "scores", n, true);
  const Released released;
  t.find(k, {}, f, s);
}

void run_locate(const Table& t, Size n, const py::object& keys, const py::object& rows) {
  Arguments a("Table.locate", 2);
  const Keys k = keys_of(a, keys, n);
  auto* r = numbers(a, rows, "rows", n, true);
  const Released released;
  t.locate(k, r);
}

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

template <class T>
py::bytes bytes_of(const std::vector<T>& v) {
  return {reinterpret_cast<const char*>(v.data()), v.size() * sizeof(T)};
}

void run_find_or_insert(Table& t, Size n, const py::object& keys, const py::object& values, const py::object& found,
                        float scale, const py::tuple& moment, const py::object& admission) {
  Arguments a("Table.find_or_insert", 4);
  const Moment m(moment);
  const Admission admit = admission_of(admission);
  Upsert call;
  call.keys = keys_of(a, keys, n);
  call.stamp = m.stamp(a, n);
  call.admission = admit.admits ? &admit : nullptr;
  call.found = column<std::uint8_t>(a, found, "found", n, true);
  const Found out = found_of(a, t, n, values, scale);
  const Released released;
  find_or_insert(t, call, out);
}

py::object run_upsert(Table& t, Size n, const py::object& keys, const py::object& values, const py::tuple& moment,
                      const py::object& admission, bool keep_evicted, const py::object& rows, const py::object& found) {
  Arguments a("Table.upsert", 5);
  const Moment m(moment);
  const Admission admit = admission_of(admission);
  Evicted evicted;
  Upsert call;
  call.keys = keys_of(a, keys, n);
  call.values = matrix<Values>(a, values, "values", t.settings().dtype, n, t.settings().dim, false);
  call.stamp = m.stamp(a, n);
  call.admission = admit.admits ? &admit : nullptr;
  call.evicted = keep_evicted ? &evicted : nullptr;
  call.rows = numbers(a, rows, "rows", n, true);
  call.found = column<std::uint8_t>(a, found, "found", n, true);
  {
    const Released released;
    t.upsert(call);
  }
  if (!keep_evicted) return py::none();
  return py::make_tuple(bytes_of(evicted.keys), bytes_of(evicted.values), bytes_of(evicted.scores));
}

void run_assign(Table& t, Size n, const py::object& keys, const py::object& values, const py::tuple& moment,
                bool accumulate, const py::object& found) {
  Arguments a("Table.assign", 4);
  const Moment m(moment);
  const Keys k = keys_of(a, keys, n);
  const Values v = matrix<Values>(a, values, "values", t.settings().dtype, n, t.settings().dim, false);
  const Stamp s = m.stamp(a, n);
  auto* f = column<std::uint8_t>(a, found, "found", n, true);
  const Released released;
  t.assign(k, v, s, accumulate, f);
}

void run_erase(Table& t, Size n, const py::object& keys, const py::object& found) {
  Arguments a("Table.erase", 2);
  const Keys k = keys_of(a, keys, n);
  auto* f = column<std::uint8_t>(a, found, "found", n, true);
  const Released released;
  t.erase(k, f);
}

// arrays: (keys, values, state, scores, times), None where not wanted.
Table::Export export_of(Arguments& a, const Table& t, const py::tuple& arrays, Size n, bool writable) {
  Table::Export e;
  e.keys = words(a, arrays[0], "keys", n, writable);
  e.values = matrix<Values>(a, arrays[1], "values", t.settings().dtype, n, t.settings().dim, writable);
  e.state = matrix<Values>(a, arrays[2], "state", Dtype::kFloat32, n, t.layout().states, writable);
  e.scores = words(a, arrays[3], "scores", n, writable);
  e.times = numbers(a, arrays[4], "times", n, writable);
  return e;
}

Size run_export(const Table& t, Size begin, Size end, std::uint64_t since, const py::tuple& arrays) {
  Arguments a("Table.export", 5);
  if (begin < 0 || end < begin || end > kMaxRows) a.fail("rows", "out of range");
  if (since > 0 && t.layout().version < 0) a.fail("since", "changes are not tracked");
  const Table::Export e = export_of(a, t, arrays, end - begin, true);
  const Released released;
  const Size last = std::min<Size>(end, t.arena().end());
  return begin < last ? t.export_rows(static_cast<std::uint32_t>(begin), static_cast<std::uint32_t>(last), since, e)
                      : 0;
}

void run_import(Table& t, Size n, const py::tuple& arrays, bool beyond) {
  Arguments a("Table.import", 5);
  const Table::Export e = export_of(a, t, arrays, n, false);
  const Released released;
  t.import_rows({e.keys, n}, e, beyond);
}

// bags: (n, keys, bags, offsets or None, weights or None, pool, scale).
Bags bags_of(Arguments& a, const py::tuple& t) {
  Bags b;
  const Size n = t[0].cast<Size>();
  b.keys = keys_of(a, t[1], n);
  b.count = t[2].cast<Size>();
  if (b.count < 0) a.fail("bags", "negative");
  b.offsets = column<std::int64_t>(a, t[3], "offsets", b.count + 1, false);
  if (b.offsets == nullptr && b.count != n) a.fail("bags", "expected one per key");
  if (b.offsets != nullptr) {
    if (b.offsets[0] != 0 || b.offsets[b.count] != n) a.fail("offsets", "out of range");
    for (Size i = 0; i < b.count; ++i) {
      if (b.offsets[i] > b.offsets[i + 1]) a.fail("offsets", "decrease");
    }
  }
  b.weights = column<float>(a, t[4], "weights", n, false);
  b.pool = static_cast<Pool>(pool_named(t[5].cast<std::string>()));
  b.scale = t[6].cast<float>();
  return b;
}

Pooled pooled_of(Arguments& a, const Table& t, const Bags& b, const py::object& out, const py::object& sizes,
                 const py::object& largest) {
  Pooled p;
  const View& view = bind::pooled(a, out, t.settings().dtype, b.count, t.settings().dim);
  p.out = rows_of<Values>(view);
  p.dtype = view.dtype;
  p.sizes = column<std::int64_t>(a, sizes, "sizes", b.count, true);
  p.largest =
      static_cast<std::int64_t*>(a.dense(largest, "largest", Dtype::kInt64, {b.count, t.settings().dim}, true).data);
  return p;
}

void run_pool(const Table& t, const py::tuple& bags, const py::object& rows, const py::object& out,
              const py::object& sizes, const py::object& largest) {
  Arguments a("Table.pool", 7);
  const Bags b = bags_of(a, bags);
  const auto* r = numbers(a, rows, "rows", b.keys.count, false);
  const Pooled p = pooled_of(a, t, b, out, sizes, largest);
  const Released released;
  pool_bags(t, b, r, p);
}

void run_pool_or_insert(Table& t, const py::tuple& bags, const py::tuple& moment, const py::object& admission,
                        const py::object& rows, const py::object& found, const py::object& out, const py::object& sizes,
                        const py::object& largest) {
  Arguments a("Table.pool_or_insert", 9);
  const Bags b = bags_of(a, bags);
  const Moment m(moment);
  const Admission admit = admission_of(admission);
  Upsert call;
  call.keys = b.keys;
  call.stamp = m.stamp(a, b.keys.count);
  call.admission = admit.admits ? &admit : nullptr;
  call.rows = numbers(a, rows, "rows", b.keys.count, true);
  call.found = column<std::uint8_t>(a, found, "found", b.keys.count, true);
  const Pooled p = pooled_of(a, t, b, out, sizes, largest);
  const Released released;
  pool_or_insert(t, b, call, p);
}

const float* gradient_of(Arguments& a, const Table& t, const Bags& b, const py::object& grad, Size& stride) {
  const Values g = matrix<Values>(a, grad, "grad", Dtype::kFloat32, b.count, t.settings().dim, false);
  stride = g.stride / 4;
  return reinterpret_cast<const float*>(g.data);
}

// kept: (n, dim), as `pool` gave them out for bags of one key.
void run_weight_gradient(const Table& t, const py::tuple& bags, const py::object& kept, const py::object& grad,
                         const py::object& out) {
  Arguments a("Table.weight_gradient", 6);
  const Bags b = bags_of(a, bags);
  const View& view = bind::pooled(a, kept, t.settings().dtype, b.keys.count, t.settings().dim);
  const auto rows = rows_of<Values>(view);
  const Dtype dtype = view.dtype;
  Size stride = 0;
  const float* g = gradient_of(a, t, b, grad, stride);
  auto* o = column<float>(a, out, "out", b.keys.count, true);
  const Released released;
  weight_gradient(b, rows, dtype, t.settings().dim, g, stride, o);
}

Size run_update(Table& t, const py::dict& rule, const py::tuple& bags, const py::object& rows, const py::object& grad,
                const py::object& sizes, const py::object& largest, std::uint32_t time, std::uint64_t seed) {
  Arguments a("Table.update", 8);
  const Bags b = bags_of(a, bags);
  const auto* r = numbers(a, rows, "rows", b.keys.count, false);
  Update u;
  u.spec = rule_spec(rule);
  if (state_floats(u.spec, t.settings().dim) != t.layout().states) a.fail("rule", "another state than the table's");
  u.stamp.time = time;
  u.seed = seed;
  u.grad = gradient_of(a, t, b, grad, u.grad_stride);
  u.sizes = column<std::int64_t>(a, sizes, "sizes", b.count, false);
  u.largest = static_cast<const std::int64_t*>(
      a.dense(largest, "largest", Dtype::kInt64, {b.count, t.settings().dim}, false).data);
  if (b.pool == Pool::kMean && u.sizes == nullptr) a.fail("sizes", "missing");
  if (b.pool == Pool::kMax && u.largest == nullptr) a.fail("largest", "missing");
  const Released released;
  return update_bags(t, b, r, u);
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
  const auto* data = column<std::int64_t>(a, x, "scores", n, false);
  Size least = n > 0 ? data[0] : 0;
  for (Size i = 1; i < n; ++i) least = std::min(least, data[i]);
  return least;
}

}  // namespace

HOTLOOP_BIND(table) {
  py::register_exception<TableFull>(m, "TableFull");
  py::class_<Table>(m, "Table")
      .def(py::init([](const py::dict& settings) { return std::make_unique<Table>(settings_of(settings)); }))
      .def_property_readonly("size", &Table::size)
      .def_property_readonly("capacity", &Table::capacity)
      .def_property_readonly("slots", &Table::slots)
      .def_property_readonly("bytes", &Table::bytes)
      .def_property_readonly("row_bytes", [](const Table& t) { return t.layout().stride; })
      .def_property_readonly("state_floats", [](const Table& t) { return t.layout().states; })
      .def_property_readonly("end", [](const Table& t) { return t.arena().end(); })
      .def_property("generation", &Table::generation, &Table::set_generation)
      .def_property("tick", &Table::tick, &Table::set_tick)
      .def("find", run_find)
      .def("contains", run_contains)
      .def("find_or_insert", run_find_or_insert)
      .def("locate", run_locate)
      .def("upsert", run_upsert)
      .def("assign", run_assign)
      .def("erase", run_erase)
      .def("clear", &Table::clear, py::call_guard<Released>())
      .def("reserve", &Table::reserve, py::call_guard<Released>())
      .def("expire", &Table::expire, py::call_guard<Released>())
      .def("export", run_export)
      .def("import_rows", run_import, py::arg("n"), py::arg("arrays"), py::arg("beyond") = false)
      .def("trim", &Table::trim, py::call_guard<Released>())
      .def("mark", &Table::mark)
      .def("erased_since", [](const Table& t, std::uint64_t since) { return bytes_of(t.erased_since(since)); })
      .def("changed_since", &Table::changed_since, py::call_guard<Released>())
      .def("forget_erased", &Table::forget_erased)
      .def("pool", run_pool)
      .def("pool_or_insert", run_pool_or_insert)
      .def("weight_gradient", run_weight_gradient)
      .def("update", run_update);
  m.def("largest", run_largest);
  m.def("least", run_least);
}

}  // namespace hotloop::bind
