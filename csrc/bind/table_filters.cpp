// SPDX-License-Identifier: Apache-2.0
// Hashing of keys and strings, admission filters, and the eviction of managed slots. A CountFilter is an object of
// Python that tables hold by reference: a filter and all tables that use it count the same sightings. Its saved cells
// are passed as bytes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bind/register.hpp"
#include "bind/released.hpp"
#include "bind/table_arguments.hpp"
#include "table/filter.hpp"
#include "table/hash_loops.hpp"
#include "table/managed_slots.hpp"

namespace hotloop::bind {

namespace {

using namespace hotloop::table;

void run_hash_bucket(std::int64_t n, const py::object& keys, std::uint64_t feature, std::uint64_t chunk,
                     std::uint64_t seed, std::uint64_t buckets, const py::object& out) {
  Arguments a("salted_hash_bucket", 2);
  const auto* k = a.array<const std::int64_t>(keys, "keys", {n});
  auto* o = a.array<std::int64_t>(out, "out", {n});
  const Released released;
  salted_hash_bucket(n, k, hash_salt(feature, chunk, seed), buckets, o);
}

void run_hash_strings(std::int64_t n, const py::bytes& text, const py::object& offsets, const py::object& out) {
  Arguments a("hash_strings", 2);
  const std::string_view bytes = text;
  auto* o = a.array<std::int64_t>(out, "out", {n});
  const auto* begins = a.array<const std::int64_t>(offsets, "offsets", {n + 1});
  for (std::int64_t i = 0; i <= n; ++i) {
    const std::int64_t least = i == 0 ? 0 : begins[i - 1];
    if (begins[i] < least || begins[i] > static_cast<std::int64_t>(bytes.size())) a.fail("offsets", "out of range");
  }
  const Released released;
  hash_strings(n, reinterpret_cast<const unsigned char*>(bytes.data()), begins, o);
}

void run_add(CountFilter& filter, std::int64_t n, const py::object& keys, const py::object& counts,
             const py::object& old) {
  Arguments a("CountFilter.add", 3);
  const auto* k = a.array<const std::int64_t>(keys, "keys", {n});
  const auto* c = a.array<const std::int64_t>(counts, "counts", {n});
  auto* o = a.array<std::int64_t>(old, "out", {n});
  const Released released;
  filter.add(n, k, c, o);
}

void run_count(const CountFilter& filter, std::int64_t n, const py::object& keys, const py::object& counts) {
  Arguments a("CountFilter.counts", 2);
  const auto* k = a.array<const std::int64_t>(keys, "keys", {n});
  auto* c = a.array<std::int64_t>(counts, "out", {n});
  const Released released;
  filter.count(n, k, c);
}

void run_admits(CountFilter& filter, std::int64_t n, const py::object& keys, const py::object& counts,
                std::uint32_t threshold, const py::object& admitted) {
  Arguments a("frequency_admission_filter", 3);
  const auto* k = a.array<const std::int64_t>(keys, "keys", {n});
  const auto* c = a.array<const std::int64_t>(counts, "counts", {n});
  auto* o = a.array<std::uint8_t>(admitted, "out", {n});
  const Released released;
  filter.admits(n, k, c, threshold, o);
}

// A state: (head, advances, failures, elements).
py::tuple packed(const CountFilter::State& s) { return py::make_tuple(s.head, s.advances, s.failures, s.elements); }
CountFilter::State state_of(Arguments& a, const CountFilter& filter, const py::tuple& t) {
  CountFilter::State s{t[0].cast<std::int64_t>(), t[1].cast<std::int64_t>(), t[2].cast<std::int64_t>(),
                       t[3].cast<std::vector<std::int64_t>>()};
  if (s.head < 0 || s.head >= filter.splits()) a.fail("head", "out of range");
  if (s.elements.size() != static_cast<std::size_t>(filter.splits())) a.fail("elements", "wrong size");
  return s;
}

// cells: uint8 (splits, cells_per_split, 2), the bytes of the 16-bit cells, or None.
py::tuple run_save(const CountFilter& filter, const py::object& cells) {
  Arguments a("CountFilter.state_dict", 1);
  const View out = a.dense(cells, "cells", Dtype::kUInt8, {filter.splits(), filter.cells_per_split(), 2}, true);
  CountFilter::State state;
  {
    const Released released;
    state = filter.save(static_cast<std::uint16_t*>(out.data));
  }
  return packed(state);
}

void run_load(CountFilter& filter, const py::tuple& state, const py::object& cells) {
  Arguments a("CountFilter.load_state_dict", 1);
  const View in = a.dense(cells, "cells", Dtype::kUInt8, {filter.splits(), filter.cells_per_split(), 2}, false);
  if (in.data == nullptr) a.fail("cells", "expected an array, got None");
  const CountFilter::State loaded = state_of(a, filter, state);
  const Released released;
  filter.load(loaded, static_cast<const std::uint16_t*>(in.data));
}

// mark: None for all lines that hold anything. (state as of `save`, names int64, cells uint16), the latter two as
// bytes.
py::tuple run_changed_since(const CountFilter& filter, std::optional<std::uint64_t> mark) {
  CountFilter::Lines lines;
  {
    const Released released;
    lines = filter.changed_since(mark);
  }
  return py::make_tuple(packed(lines.state), bytes_of(lines.names), bytes_of(lines.cells));
}

// cells: uint8 (n, 64), the bytes of lines of 32 cells.
void run_put(CountFilter& filter, const py::tuple& state, std::int64_t n, const py::object& names,
             const py::object& cells, bool whole) {
  Arguments a("Table.apply", 2);
  const auto* l = a.array<const std::int64_t>(names, "filter_lines", {n});
  const View in = a.dense(cells, "filter_cells", Dtype::kUInt8, {n, CountFilter::kLine * 2}, false);
  const std::int64_t lines = filter.cells_per_split() / CountFilter::kLine * filter.splits();
  const CountFilter::State taken = state_of(a, filter, state);
  for (std::int64_t i = 0; i < n; ++i) {
    if (l[i] < 0 || l[i] >= lines) a.fail("filter_lines", "out of range");
  }
  const Released released;
  filter.put(taken, l, static_cast<const std::uint16_t*>(in.data), n, whole);
}

void run_probabilistic(std::int64_t n, std::uint64_t seed, const py::object& keys, std::uint64_t step,
                       const py::object& counts, double threshold, bool equal, const py::object& admitted) {
  Arguments a("probabilistic_admission_filter", 3);
  const auto* k = a.array<const std::int64_t>(keys, "keys", {n});
  const auto* c = a.array<const std::int64_t>(counts, "counts", {n});
  auto* o = a.array<std::uint8_t>(admitted, "out", {n});
  const Released released;
  probabilistic_admits(n, seed, k, step, c, threshold, equal, o);
}

// slots: (ids, counts, last_access, used), updated in place. incoming: (ids, counts, last_access, admitted or None).
py::tuple run_evict(std::int64_t slots, const py::tuple& state, std::int64_t n, const py::tuple& incoming,
                    std::int64_t now, const std::string& policy, double decay_exponent, const py::object& mapping) {
  Arguments a("mch_evict_batch", 9);
  MchCall call{};
  call.slots = slots;
  call.slot_ids = a.array<std::int64_t>(state[0], "slots.ids", {slots});
  call.slot_counts = a.array<std::int64_t>(state[1], "slots.counts", {slots});
  call.slot_last = a.array<std::int64_t>(state[2], "slots.last_access", {slots});
  call.slot_used = a.array<std::uint8_t>(state[3], "slots.used", {slots});
  call.incoming = n;
  call.ids = a.array<const std::int64_t>(incoming[0], "ids", {n});
  call.counts = a.array<const std::int64_t>(incoming[1], "counts", {n});
  call.last = a.array<const std::int64_t>(incoming[2], "last_access", {n});
  call.admitted = a.array<const std::uint8_t>(incoming[3], "admitted", {n});
  call.now = now;
  call.policy = policy == "lfu" ? MchPolicy::kLfu : policy == "lru" ? MchPolicy::kLru : MchPolicy::kDistanceLfu;
  call.decay_exponent = decay_exponent;
  call.mapping = a.array<std::int64_t>(mapping, "mapping", {n});
  MchResult result;
  {
    const Released released;
    result = mch_evict_batch(call);
  }
  return py::make_tuple(result.duplicate, result.refilled, result.evicted_ids, result.was_used);
}

}  // namespace

HOTLOOP_BIND(table) {
  def(m, "filter_cells", &CountFilter::cells_for, "capacity splits");
  def(m, "hash_bucket", &run_hash_bucket, "n keys feature chunk seed buckets out");
  def(m, "hash_strings", &run_hash_strings, "n text offsets out");
  def(m, "probabilistic", &run_probabilistic, "n seed keys step counts threshold equal admitted");
  def(m, "evict", &run_evict, "slots state n incoming now policy decay_exponent mapping");
  // Shared: a table that admits by it keeps it alive.
  py::class_<CountFilter, std::shared_ptr<CountFilter>> c(m, "CountFilter");
  c.def(py::init([](std::int64_t capacity, int splits) {
          if (capacity < 2 * splits || splits < 1 || splits == 2 || splits > 64) {
            throw std::invalid_argument("[CountFilter] capacity: out of range for these splits.");
          }
          return std::make_shared<CountFilter>(capacity, splits);
        }),
        py::arg("capacity"), py::arg("splits"))
      .def_property_readonly("cells_per_split", &CountFilter::cells_per_split)
      .def_property_readonly("bytes", &CountFilter::bytes)
      .def("mark", &CountFilter::mark)
      .def("has_changed_since", &CountFilter::has_changed_since, py::arg("mark"))
      .def("clear", &CountFilter::clear, py::call_guard<Released>());
  def(c, "add", &run_add, "n keys counts old");
  def(c, "count", &run_count, "n keys counts");
  def(c, "admits", &run_admits, "n keys counts threshold admitted");
  def(c, "save", &run_save, "cells");
  def(c, "load", &run_load, "state cells");
  def(c, "changed_since", &run_changed_since, "mark");
  def(c, "put", &run_put, "state n names cells whole");
}

}  // namespace hotloop::bind
