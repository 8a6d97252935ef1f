// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "bind/register.hpp"
#include "bind/segment_arguments.hpp"
#include "core/counting_sort.hpp"

namespace hotloop::bind {

namespace {

// Returns false where offsets do not rise from 0 to n or an id is out of range.
bool run_reduce(const std::string& reduction, const py::object& values, std::int64_t count, const py::object& offsets,
                const py::object& ids, const py::object& mask, const py::object& out, const py::object& counts,
                const py::object& rows) {
  SegmentArguments a;
  const segments::ReduceCall call = reduce_call(a, reduction, values, count, offsets, ids, mask, out, counts, rows);
  py::gil_scoped_release release;
  return segments::segment_reduce(call);
}

// The groups are those of a run_reduce that returned true.
void run_spread(const std::string& reduction, const py::object& grad, std::int64_t count, const py::object& offsets,
                const py::object& ids, const py::object& mask, const py::object& counts, const py::object& rows,
                const py::object& values, const py::object& out, const py::object& result) {
  SegmentArguments a;
  const segments::SpreadCall call =
      spread_call(a, reduction, grad, count, offsets, ids, mask, counts, rows, values, out, result);
  py::gil_scoped_release release;
  segments::segment_spread(call);
}

// order (n,), counts (num_keys,) and offsets (num_keys + 1,), int64; the last two or None. Returns -1, or the position
// of a key outside [0, num_keys).
std::int64_t run_counting_sort(const py::object& keys, std::int64_t num_keys, const py::object& order,
                               const py::object& counts, const py::object& offsets) {
  SegmentArguments a;
  const View& view = a.keys(keys, "keys");
  const std::int64_t n = view.shape[0];
  if (num_keys < 0) a.fail("num_keys", "expected at least 0");
  std::int64_t* const to = a.array<std::int64_t>(order, "order", {n});
  std::int64_t* const found = a.array<std::int64_t>(counts, "counts", {num_keys});
  std::int64_t* const starts = a.array<std::int64_t>(offsets, "offsets", {num_keys + 1});
  py::gil_scoped_release release;
  return counting_sort(view.data, view.dtype, n, num_keys, to, found, starts);
}

}  // namespace

HOTLOOP_BIND(segments) {
  def(m, "reduce", &run_reduce, "reduction values count offsets ids mask out counts rows");
  def(m, "spread", &run_spread, "reduction grad count offsets ids mask counts rows values out result");
  def(m, "counting_sort", &run_counting_sort, "keys num_keys order counts offsets");
}

}  // namespace hotloop::bind
