// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "bind/register.hpp"
#include "bind/segment_arguments.hpp"
#include "kernels/core/segments_cuda.hpp"

namespace hotloop::bind {

namespace {

using namespace hotloop::segments;

CudaStream where(int device, std::uintptr_t stream) { return {device, reinterpret_cast<void*>(stream)}; }

// parts: float64, (6 tiles columns,), tiles = ceil(n / TILE). order: of ids, whose sort gave the offsets; or None.
void run_reduce(const std::string& reduction, const py::object& values, std::int64_t count, const py::object& offsets,
                const py::object& order, const py::object& mask, const py::object& out, const py::object& counts,
                const py::object& rows, const py::object& parts, int device, std::uintptr_t stream) {
  SegmentArguments a(dlpack::kCuda);
  ReduceCall call = reduce_call(a, reduction, values, count, offsets, py::none(), mask, out, counts, rows);
  call.order = a.array<const std::int64_t>(order, "order", {call.values.n});
  const std::int64_t numbers = 6 * cuda_tiles(call.values.n, kCudaTile) * call.values.columns;
  static_assert(sizeof(Part) == 3 * sizeof(double));
  call.parts = static_cast<Part*>(a.dense(parts, "parts", Dtype::kFloat64, {numbers}, true).data);
  py::gil_scoped_release release;
  segment_reduce_cuda(call, where(device, stream));
}

void run_spread(const std::string& reduction, const py::object& grad, std::int64_t count, const py::object& offsets,
                const py::object& ids, const py::object& mask, const py::object& counts, const py::object& rows,
                const py::object& values, const py::object& out, const py::object& result, int device,
                std::uintptr_t stream) {
  SegmentArguments a(dlpack::kCuda);
  const SpreadCall call = spread_call(a, reduction, grad, count, offsets, ids, mask, counts, rows, values, out, result);
  py::gil_scoped_release release;
  segment_spread_cuda(call, where(device, stream));
}

// other: (n,), or None up to 256 keys. starts: (256 (ceil(n / SORT_TILE) + 1),).
void run_counting_sort(const py::object& keys, std::int64_t num_keys, const py::object& order, const py::object& counts,
                       const py::object& offsets, const py::object& other, const py::object& starts, int device,
                       std::uintptr_t stream) {
  SegmentArguments a(dlpack::kCuda);
  const View& view = a.keys(keys, "keys");
  const std::int64_t n = view.shape[0], digits = std::int64_t{1} << kCudaDigitBits;
  if (num_keys < 0 || (num_keys > digits && n > 0 && other.is_none())) a.fail("other", "expected scratch");
  CudaSortCall call;
  call.keys = view.data;
  call.dtype = view.dtype;
  call.n = n;
  call.num_keys = num_keys;
  call.order = a.array<std::int64_t>(order, "order", {n});
  call.counts = a.array<std::int64_t>(counts, "counts", {num_keys});
  call.offsets = a.array<std::int64_t>(offsets, "offsets", {num_keys + 1});
  call.other = a.array<std::int64_t>(other, "other", {n});
  call.starts = a.array<std::int64_t>(starts, "starts", {digits * (cuda_tiles(n, kCudaSortTile) + 1)});
  py::gil_scoped_release release;
  counting_sort_cuda(call, where(device, stream));
}

}  // namespace

HOTLOOP_BIND(segments) {
  def(m, "reduce", &run_reduce, "reduction values count offsets order mask out counts rows parts device stream");
  def(m, "spread", &run_spread, "reduction grad count offsets ids mask counts rows values out result device stream");
  def(m, "counting_sort", &run_counting_sort, "keys num_keys order counts offsets other starts device stream");
  m.attr("TILE") = kCudaTile;
  m.attr("SORT_TILE") = kCudaSortTile;
}

}  // namespace hotloop::bind
