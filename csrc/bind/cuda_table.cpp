#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bind/register.hpp"
#include "bind/table_arguments.hpp"
#include "bind/table_rules.hpp"
#include "kernels/table/table_cuda.hpp"
#include "table/rows/row_rules.hpp"

namespace hotloop::bind {

namespace {

using namespace hotloop::table;
using gpu::CudaTable;
using Size = std::int64_t;

// The methods are those of _core.Table, with arrays in device memory.
struct Given : Arguments {
  static constexpr std::size_t kMostArrays = 12;
  explicit Given(const char* op, std::int32_t device = dlpack::kCuda) : Arguments(op, kMostArrays, device) {}
};

void run_find(CudaTable& t, Size n, const py::object& keys, const py::object& values, const py::object& found,
              const py::object& scores) {
  Given a("Table.find");
  const auto* k = words(a, keys, "keys", n, false);
  const gpu::Rows v = matrix<gpu::Rows>(a, values, "values", t.settings().dtype, n, t.settings().dim, true);
  auto* f = column<std::uint8_t>(a, found, "found", n, true);
  auto* s = words(a, scores, "scores", n, true);
  py::gil_scoped_release release;
  t.find(k, n, v, f, s);
}

void run_locate(CudaTable& t, Size n, const py::object& keys, const py::object& rows) {
  Given a("Table.locate");
  const auto* k = words(a, keys, "keys", n, false);
  auto* r = numbers(a, rows, "rows", n, true);
  py::gil_scoped_release release;
  t.locate(k, n, r);
}

gpu::Moment moment_of(Given& a, const py::tuple& t, Size n) {
  return {words(a, t[0], "scores", n, false), t[1].cast<std::uint64_t>(), t[2].cast<std::uint32_t>()};
}

template <class T>
py::bytes bytes_of(const T* data, std::size_t n) {
  return {reinterpret_cast<const char*>(data), n * sizeof(T)};
}

// admission: a function of (keys, counts), the bytes of int64 and of uint32, to the bytes of as many flags; or None.
gpu::Ask ask_of(const py::object& admission) {
  if (admission.is_none()) return {};
  return [admission](Size n, const std::uint64_t* keys, const std::uint32_t* counts, std::uint8_t* admitted) {
    const py::gil_scoped_acquire gil;
    const auto size = static_cast<std::size_t>(n);
    const auto answer = admission(bytes_of(keys, size), bytes_of(counts, size)).cast<std::string>();
    if (answer.size() != size) throw std::invalid_argument("[Table.upsert] admission: another number of flags.");
    std::copy(answer.begin(), answer.end(), admitted);
  };
}

// How many rows had to leave, which `evicted` then gives out.
Size run_upsert(CudaTable& t, Size n, const py::object& keys, const py::object& values, const py::tuple& moment,
                const py::object& admission, bool keep_evicted, const py::object& rows, const py::object& found) {
  Given a("Table.upsert");
  const gpu::Ask ask = ask_of(admission);
  gpu::UpsertCall call;
  call.keys = words(a, keys, "keys", n, false);
  call.n = n;
  call.values = matrix<gpu::Rows>(a, values, "values", t.settings().dtype, n, t.settings().dim, false);
  call.moment = moment_of(a, moment, n);
  call.ask = ask ? &ask : nullptr;
  call.keep_evicted = keep_evicted;
  call.rows = numbers(a, rows, "rows", n, true);
  call.found = column<std::uint8_t>(a, found, "found", n, true);
  py::gil_scoped_release release;
  t.upsert(call);
  return t.evicted();
}

void run_evicted(CudaTable& t, const py::object& keys, const py::object& values, const py::object& scores) {
  Given a("Table.evicted");
  const Size n = t.evicted();
  auto* k = words(a, keys, "keys", n, true);
  const gpu::Rows v = matrix<gpu::Rows>(a, values, "values", t.settings().dtype, n, t.settings().dim, true);
  auto* s = words(a, scores, "scores", n, true);
  const Size width = t.settings().dim * item_size(t.settings().dtype);
  if (n > 1 && v.stride != width) a.fail("values", "expected a contiguous array");
  py::gil_scoped_release release;
  t.take_evicted(k, v, s);
}

void run_assign(CudaTable& t, Size n, const py::object& keys, const py::object& values, const py::tuple& moment,
                bool accumulate, const py::object& found) {
  Given a("Table.assign");
  const auto* k = words(a, keys, "keys", n, false);
  const gpu::Rows v = matrix<gpu::Rows>(a, values, "values", t.settings().dtype, n, t.settings().dim, false);
  const gpu::Moment m = moment_of(a, moment, n);
  auto* f = column<std::uint8_t>(a, found, "found", n, true);
  py::gil_scoped_release release;
  t.assign(k, n, v, m, accumulate, f);
}

void run_erase(CudaTable& t, Size n, const py::object& keys, const py::object& found) {
  Given a("Table.erase");
  const auto* k = words(a, keys, "keys", n, false);
  auto* f = column<std::uint8_t>(a, found, "found", n, true);
  py::gil_scoped_release release;
  t.erase(k, n, f);
}

void run_erase_host(CudaTable& t, Size n, const py::object& keys, const py::object& found) {
  Given a("Table.erase", dlpack::kCpu);
  const auto* k = words(a, keys, "keys", n, false);
  auto* f = column<std::uint8_t>(a, found, "found", n, true);
  py::gil_scoped_release release;
  t.erase_host(k, n, f);
}

// arrays: (keys, values, state, scores, times) in host memory, None where not wanted.
gpu::HostRows host_rows_of(Given& a, const CudaTable& t, const py::tuple& arrays, Size n, bool writable) {
  gpu::HostRows r;
  r.keys = words(a, arrays[0], "keys", n, writable);
  r.values = matrix<gpu::Rows>(a, arrays[1], "values", t.settings().dtype, n, t.settings().dim, writable);
  r.state = matrix<gpu::Rows>(a, arrays[2], "state", Dtype::kFloat32, n, t.states(), writable);
  r.scores = words(a, arrays[3], "scores", n, writable);
  r.times = numbers(a, arrays[4], "times", n, writable);
  return r;
}

Size run_export(CudaTable& t, Size begin, Size end, std::uint64_t since, const py::tuple& arrays) {
  Given a("Table.export", dlpack::kCpu);
  if (begin < 0 || end < begin) a.fail("rows", "out of range");
  if (since > 0 && !t.settings().versions) a.fail("since", "changes are not tracked");
  const gpu::HostRows out = host_rows_of(a, t, arrays, end - begin, true);
  py::gil_scoped_release release;
  return t.export_rows(begin, end, since, out);
}

void run_import(CudaTable& t, Size n, const py::tuple& arrays, bool beyond) {
  Given a("Table.import", dlpack::kCpu);
  const gpu::HostRows in = host_rows_of(a, t, arrays, n, false);
  if (n > 0 && (in.keys == nullptr || in.values.data == nullptr)) a.fail("keys", "missing");
  py::gil_scoped_release release;
  t.import_rows(n, in, beyond);
}

// bags: (n, keys, bags, offsets or None, weights or None, pool, scale). Offsets stay on the device: loops keep inside
// the batch whatever they are.
gpu::BagCall bags_of(Given& a, const py::tuple& t, const py::object& rows) {
  gpu::BagCall b;
  b.n = t[0].cast<Size>();
  b.keys = words(a, t[1], "keys", b.n, false);
  b.count = t[2].cast<Size>();
  if (b.count < 0) a.fail("bags", "negative");
  b.offsets = column<std::int64_t>(a, t[3], "offsets", b.count + 1, false);
  if (b.offsets == nullptr && b.count != b.n) a.fail("bags", "expected one per key");
  b.weights = column<float>(a, t[4], "weights", b.n, false);
  b.mode = static_cast<gpu::Mode>(pool_named(t[5].cast<std::string>()));
  b.rows = numbers(a, rows, "rows", b.n, false);
  return b;
}

void run_pool(CudaTable& t, const py::tuple& bags, const py::object& rows, const py::object& out,
              const py::object& sizes, const py::object& largest) {
  Given a("Table.pool");
  const gpu::BagCall b = bags_of(a, bags, rows);
  const View& view = pooled(a, out, t.settings().dtype, b.count, t.settings().dim);
  const auto rows_out = rows_of<gpu::Rows>(view);
  auto* s = column<std::int64_t>(a, sizes, "sizes", b.count, true);
  auto* l =
      static_cast<std::int64_t*>(a.dense(largest, "largest", Dtype::kInt64, {b.count, t.settings().dim}, true).data);
  const bool wide = view.dtype == Dtype::kFloat32;
  py::gil_scoped_release release;
  t.pool(b, rows_out, wide, s, l);
}

// kept: (n, dim), as `pool` gave them out for bags of one key.
void run_weight_gradient(CudaTable& t, const py::tuple& bags, const py::object& kept, const py::object& grad,
                         const py::object& out) {
  Given a("Table.weight_gradient");
  const gpu::BagCall b = bags_of(a, bags, py::none());
  const auto rows = matrix<gpu::Rows>(a, kept, "kept", t.settings().dtype, b.n, t.settings().dim, false);
  const gpu::Rows g = matrix<gpu::Rows>(a, grad, "grad", Dtype::kFloat32, b.count, t.settings().dim, false);
  auto* o = column<float>(a, out, "out", b.n, true);
  py::gil_scoped_release release;
  t.weight_gradient(b, rows, reinterpret_cast<const float*>(g.data), g.stride / 4, o);
}

Size run_update(CudaTable& t, const py::dict& rule, const py::tuple& bags, const py::object& rows,
                const py::object& grad, const py::object& sizes, const py::object& largest, std::uint32_t time,
                std::uint64_t seed, bool counts) {
  Given a("Table.update");
  const gpu::BagCall b = bags_of(a, bags, rows);
  gpu::UpdateCall u;
  u.spec = rule_spec(rule);
  if (state_floats(u.spec, t.settings().dim) != t.states()) a.fail("rule", "another state than the table's");
  u.time = time;
  u.seed = seed;
  u.counts = counts;
  const gpu::Rows g = matrix<gpu::Rows>(a, grad, "grad", Dtype::kFloat32, b.count, t.settings().dim, false);
  u.grad = reinterpret_cast<const float*>(g.data);
  u.grad_stride = g.stride / 4;
  u.sizes = column<std::int64_t>(a, sizes, "sizes", b.count, false);
  u.largest = static_cast<const std::int64_t*>(
      a.dense(largest, "largest", Dtype::kInt64, {b.count, t.settings().dim}, false).data);
  if (b.rows == nullptr && b.n > 0) a.fail("rows", "missing");
  if (b.mode == gpu::Mode::kMean && u.sizes == nullptr) a.fail("sizes", "missing");
  if (b.mode == gpu::Mode::kMax && u.largest == nullptr) a.fail("largest", "missing");
  py::gil_scoped_release release;
  return t.update(b, u);
}

}  // namespace

HOTLOOP_BIND(table) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  py::register_exception<gpu::Full>(m, "TableFull");
  py::class_<CudaTable>(m, "Table")
      .def(py::init([](const py::dict& settings, int device, std::uintptr_t stream) {
        return std::make_unique<CudaTable>(settings_of(settings), device, reinterpret_cast<void*>(stream));
      }))
      .def("use", [](CudaTable& t, std::uintptr_t stream) { t.use(reinterpret_cast<void*>(stream)); })
      .def_property_readonly("size", &CudaTable::size)
      .def_property_readonly("capacity", &CudaTable::capacity)
      .def_property_readonly("slots", &CudaTable::slots)
      .def_property_readonly("bytes", &CudaTable::bytes)
      .def_property_readonly("row_bytes", &CudaTable::row_bytes)
      .def_property_readonly("state_floats", &CudaTable::states)
      .def_property_readonly("end", &CudaTable::slots)
      .def_property("generation", &CudaTable::generation, &CudaTable::set_generation)
      .def_property("tick", &CudaTable::tick, &CudaTable::set_tick)
      .def("find", run_find)
      .def("locate", run_locate)
      .def("upsert", run_upsert)
      .def("evicted", run_evicted)
      .def("assign", run_assign)
      .def("erase", run_erase)
      .def("erase_host", run_erase_host)
      .def("clear", &CudaTable::clear, released)
      .def("reserve", &CudaTable::reserve, released)
      .def("expire", &CudaTable::expire, released)
      .def("export", run_export)
      .def("import_rows", run_import, py::arg("n"), py::arg("arrays"), py::arg("beyond") = false)
      .def("mark", &CudaTable::mark)
      .def("erased_since",
           [](CudaTable& t, std::uint64_t since) {
             const std::vector<std::uint64_t> keys = t.erased_since(since);
             return bytes_of(keys.data(), keys.size());
           })
      .def("changed_since", &CudaTable::changed_since, released)
      .def("forget_erased", &CudaTable::forget_erased)
      .def("pool", run_pool)
      .def("weight_gradient", run_weight_gradient)
      .def("update", run_update);
}

}  // namespace hotloop::bind
