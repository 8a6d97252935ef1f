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
  std::int64_t* const to = a.integers(order, "order", n, true);
  std::int64_t* const found = a.integers(counts, "counts", num_keys, true);
  std::int64_t* const starts = a.integers(offsets, "offsets", num_keys + 1, true);
  py::gil_scoped_release release;
  if (view.dtype == Dtype::kInt32) {
    return counting_sort(static_cast<const std::int32_t*>(view.data), n, num_keys, to, found, starts);
  }
  return counting_sort(static_cast<const std::int64_t*>(view.data), n, num_keys, to, found, starts);
}

}  // namespace

HOTLOOP_BIND(segments) {
  m.def("reduce", &run_reduce, py::arg("reduction"), py::arg("values"), py::arg("count"), py::arg("offsets"),
        py::arg("ids"), py::arg("mask"), py::arg("out"), py::arg("counts"), py::arg("rows"));
  m.def("spread", &run_spread, py::arg("reduction"), py::arg("grad"), py::arg("count"), py::arg("offsets"),
        py::arg("ids"), py::arg("mask"), py::arg("counts"), py::arg("rows"), py::arg("values"), py::arg("out"),
        py::arg("result"));
  m.def("counting_sort", &run_counting_sort, py::arg("keys"), py::arg("num_keys"), py::arg("order"), py::arg("counts"),
        py::arg("offsets"));
}

}  // namespace hotloop::bind
