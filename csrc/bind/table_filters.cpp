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
  const auto* k = column<std::int64_t>(a, keys, "keys", n, false);
  auto* o = column<std::int64_t>(a, out, "out", n, true);
  const Released released;
  salted_hash_bucket(n, k, hash_salt(feature, chunk, seed), buckets, o);
}

void run_hash_strings(std::int64_t n, const py::bytes& text, const py::object& offsets, const py::object& out) {
  Arguments a("hash_strings", 2);
  const std::string_view bytes = text;
  auto* o = column<std::int64_t>(a, out, "out", n, true);
  const auto* begins = column<std::int64_t>(a, offsets, "offsets", n + 1, false);
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
  const auto* k = column<std::int64_t>(a, keys, "keys", n, false);
  const auto* c = column<std::int64_t>(a, counts, "counts", n, false);
  auto* o = column<std::int64_t>(a, old, "out", n, true);
  const Released released;
  filter.add(n, k, c, o);
}

void run_count(const CountFilter& filter, std::int64_t n, const py::object& keys, const py::object& counts) {
  Arguments a("CountFilter.counts", 2);
  const auto* k = column<std::int64_t>(a, keys, "keys", n, false);
  auto* c = column<std::int64_t>(a, counts, "out", n, true);
  const Released released;
  filter.count(n, k, c);
}

void run_admits(CountFilter& filter, std::int64_t n, const py::object& keys, const py::object& counts,
                std::uint32_t threshold, const py::object& admitted) {
  Arguments a("frequency_admission_filter", 3);
  const auto* k = column<std::int64_t>(a, keys, "keys", n, false);
  const auto* c = column<std::int64_t>(a, counts, "counts", n, false);
  auto* o = column<std::uint8_t>(a, admitted, "out", n, true);
  const Released released;
  filter.admits(n, k, c, threshold, o);
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
  return py::make_tuple(state.head, state.advances, state.failures, state.elements);
}

void run_load(CountFilter& filter, std::int64_t head, std::int64_t advances, std::int64_t failures,
              const std::vector<std::int64_t>& elements, const py::object& cells) {
  Arguments a("CountFilter.load_state_dict", 1);
  const View in = a.dense(cells, "cells", Dtype::kUInt8, {filter.splits(), filter.cells_per_split(), 2}, false);
  if (in.data == nullptr) a.fail("cells", "expected an array, got None");
  if (head < 0 || head >= filter.splits()) a.fail("head", "out of range");
  if (elements.size() != static_cast<std::size_t>(filter.splits())) a.fail("elements", "wrong size");
  const Released released;
  filter.load({head, advances, failures, elements}, static_cast<const std::uint16_t*>(in.data));
}

// mark: None for all lines that hold anything. (state as of `save`, names int64, cells uint16), the latter two as
// bytes.
py::tuple run_changed_since(const CountFilter& filter, std::optional<std::uint64_t> mark) {
  CountFilter::Lines lines;
  {
    const Released released;
    lines = filter.changed_since(mark);
  }
  const CountFilter::State& s = lines.state;
  return py::make_tuple(py::make_tuple(s.head, s.advances, s.failures, s.elements), bytes_of(lines.names),
                        bytes_of(lines.cells));
}

// cells: uint8 (n, 64), the bytes of lines of 32 cells.
void run_put(CountFilter& filter, std::int64_t head, std::int64_t advances, std::int64_t failures,
             const std::vector<std::int64_t>& elements, std::int64_t n, const py::object& names,
             const py::object& cells, bool whole) {
  Arguments a("Table.apply", 2);
  const auto* l = column<std::int64_t>(a, names, "filter_lines", n, false);
  const View in = a.dense(cells, "filter_cells", Dtype::kUInt8, {n, CountFilter::kLine * 2}, false);
  const std::int64_t lines = filter.cells_per_split() / CountFilter::kLine * filter.splits();
  if (head < 0 || head >= filter.splits()) a.fail("head", "out of range");
  if (elements.size() != static_cast<std::size_t>(filter.splits())) a.fail("elements", "wrong size");
  for (std::int64_t i = 0; i < n; ++i) {
    if (l[i] < 0 || l[i] >= lines) a.fail("filter_lines", "out of range");
  }
  const Released released;
  filter.put({head, advances, failures, elements}, l, static_cast<const std::uint16_t*>(in.data), n, whole);
}

void run_probabilistic(std::int64_t n, std::uint64_t seed, const py::object& keys, std::uint64_t step,
                       const py::object& counts, double threshold, bool equal, const py::object& admitted) {
  Arguments a("probabilistic_admission_filter", 3);
  const auto* k = column<std::int64_t>(a, keys, "keys", n, false);
  const auto* c = column<std::int64_t>(a, counts, "counts", n, false);
  auto* o = column<std::uint8_t>(a, admitted, "out", n, true);
  const Released released;
  probabilistic_admits(n, seed, k, step, c, threshold, equal, o);
}

// slots: (ids, counts, last_access, used), updated in place. incoming: (ids, counts, last_access, admitted or None).
py::tuple run_evict(std::int64_t slots, const py::tuple& state, std::int64_t n, const py::tuple& incoming,
                    std::int64_t now, const std::string& policy, double decay_exponent, const py::object& mapping) {
  Arguments a("mch_evict_batch", 9);
  MchCall call{};
  call.slots = slots;
  call.slot_ids = column<std::int64_t>(a, state[0], "slots.ids", slots, true);
  call.slot_counts = column<std::int64_t>(a, state[1], "slots.counts", slots, true);
  call.slot_last = column<std::int64_t>(a, state[2], "slots.last_access", slots, true);
  call.slot_used = column<std::uint8_t>(a, state[3], "slots.used", slots, true);
  call.incoming = n;
  call.ids = column<std::int64_t>(a, incoming[0], "ids", n, false);
  call.counts = column<std::int64_t>(a, incoming[1], "counts", n, false);
  call.last = column<std::int64_t>(a, incoming[2], "last_access", n, false);
  call.admitted = column<std::uint8_t>(a, incoming[3], "admitted", n, false);
  call.now = now;
  call.policy = policy == "lfu" ? MchPolicy::kLfu : policy == "lru" ? MchPolicy::kLru : MchPolicy::kDistanceLfu;
  call.decay_exponent = decay_exponent;
  call.mapping = column<std::int64_t>(a, mapping, "mapping", n, true);
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
  def(c, "load", &run_load, "head advances failures elements cells");
  def(c, "changed_since", &run_changed_since, "mark");
  def(c, "put", &run_put, "head advances failures elements n names cells whole");
}

}  // namespace hotloop::bind
