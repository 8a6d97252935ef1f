// SPDX-License-Identifier: Apache-2.0
// The table in the memory of a CUDA device: the backend for table_methods.hpp, and the methods that the table on the
// CPU does not have. Arrays lie on the device, except those of exports, imports and erase_host, which lie on the host.
// Admission filters are Python objects: an insertion hands the unknown keys to a Python function and waits for its
// flags.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "bind/table_methods.hpp"
#include "kernels/table/calls.hpp"

namespace hotloop::bind {

namespace {

using gpu::DeviceTable;

struct Cuda {
  using Table = DeviceTable;
  using Unlocked = py::gil_scoped_release;
  static constexpr std::int32_t kDevice = dlpack::kCuda;

  // They stay on the device: loops keep inside the batch whatever they are.
  static void check_offsets(Arguments&, const Bags&) {}
  static void pool(Table& t, const Bags& b, const Pooled& p) { t.pool(b, p); }
};

using Methods = TableMethods<Cuda>;
using Given = Methods::Given;

void run_find(DeviceTable& t, Size n, const py::object& keys, const py::object& values, const py::object& found,
              const py::object& scores) {
  Given a("Table.find", 4);
  const auto* k = words(a, keys, "keys", n, false);
  const Values v = Methods::values_of(a, t, values, "values", n, true);
  auto* f = a.array<std::uint8_t>(found, "found", {n});
  auto* s = words(a, scores, "scores", n, true);
  py::gil_scoped_release release;
  t.find({k, n}, v, f, s);
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
Size run_upsert(DeviceTable& t, Size n, const py::object& keys, const py::object& values, const py::tuple& moment,
                const py::object& admission, bool keep_evicted, const py::object& rows, const py::object& found) {
  Given a("Table.upsert", 5);
  const gpu::Ask ask = ask_of(admission);
  gpu::UpsertCall call;
  call.keys = {words(a, keys, "keys", n, false), n};
  call.values = Methods::values_of(a, t, values, "values", n, false);
  call.stamp = Methods::stamp_of(a, moment, n);
  call.ask = ask ? &ask : nullptr;
  call.keep_evicted = keep_evicted;
  call.rows = numbers(a, rows, "rows", n, true);
  call.found = a.array<std::uint8_t>(found, "found", {n});
  py::gil_scoped_release release;
  t.upsert(call);
  return t.evicted();
}

void run_evicted(DeviceTable& t, const py::object& keys, const py::object& values, const py::object& scores) {
  Given a("Table.evicted", 3);
  const Size n = t.evicted();
  auto* k = words(a, keys, "keys", n, true);
  const Values v = Methods::values_of(a, t, values, "values", n, true);
  auto* s = words(a, scores, "scores", n, true);
  if (n > 1 && v.stride != t.settings().dim * item_size(t.settings().dtype)) {
    a.fail("values", "expected a contiguous array");
  }
  py::gil_scoped_release release;
  t.take_evicted(k, v, s);
}

void run_erase_host(DeviceTable& t, Size n, const py::object& keys, const py::object& found) {
  Given a("Table.erase", 2, dlpack::kCpu);
  const auto* k = words(a, keys, "keys", n, false);
  auto* f = a.array<std::uint8_t>(found, "found", {n});
  py::gil_scoped_release release;
  t.erase_host({k, n}, f);
}

// kept: (n, dim), as `pool` gave them out for bags of one key.
void run_weight_gradient(DeviceTable& t, const py::tuple& bags, const py::object& kept, const py::object& grad,
                         const py::object& out) {
  Given a("Table.weight_gradient", 6);
  const Bags b = Methods::bags_of(a, bags, py::none());
  const Values rows = Methods::values_of(a, t, kept, "kept", b.keys.count, false);
  Size stride = 0;
  const float* g = Methods::gradient_of(a, t, b.count, grad, stride);
  auto* o = a.array<float>(out, "out", {b.keys.count});
  py::gil_scoped_release release;
  t.weight_gradient(b, rows, g, stride, o);
}

// counts: return how many positions lost their row, which the host has to wait for.
Size run_update(DeviceTable& t, const py::dict& rule, const py::tuple& bags, const py::object& rows,
                const py::object& grad, const py::object& sizes, const py::object& largest, std::uint32_t time,
                std::uint64_t seed, bool counts) {
  Given a("Table.update", 8);
  const Bags b = Methods::bags_of(a, bags, rows);
  const Update u = Methods::update_of(a, t, rule, b, grad, sizes, largest, time, seed);
  py::gil_scoped_release release;
  return t.update(b, u, counts);
}

}  // namespace

HOTLOOP_BIND(table) {
  py::register_exception<TableFull>(m, "TableFull");
  py::class_<DeviceTable> c(m, "Table");
  c.def(py::init([](const py::dict& settings, int device, std::uintptr_t stream) {
          return gpu::cuda_table(settings_of(settings), device, reinterpret_cast<void*>(stream));
        }),
        py::arg("settings"), py::arg("device"), py::arg("stream"))
      .def(
          "use", [](DeviceTable& t, std::uintptr_t stream) { t.use(reinterpret_cast<void*>(stream)); },
          py::arg("stream"))
      .def_property_readonly("row_bytes", &DeviceTable::row_bytes)
      .def_property_readonly("end", &DeviceTable::slots);
  Methods::define(c);
  def(c, "find", &run_find, "n keys values found scores");
  def(c, "upsert", &run_upsert, "n keys values moment admission keep_evicted rows found");
  def(c, "evicted", &run_evicted, "keys values scores");
  def(c, "erase_host", &run_erase_host, "n keys found");
  def(c, "weight_gradient", &run_weight_gradient, "bags kept grad out");
  def(c, "update", &run_update, "rule bags rows grad sizes largest time seed counts");
}

}  // namespace hotloop::bind
