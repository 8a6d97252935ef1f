// SPDX-License-Identifier: Apache-2.0
// From the Python arguments of the segment loops to their calls, for the CPU and the CUDA module alike. Offsets, ids
// and order hold numbers that are used as indices: the front door, or counting_sort, has looked at them.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bind/arguments.hpp"
#include "core/segments.hpp"

namespace hotloop::bind {

inline segments::Reduction reduction_named(const std::string& name) {
  constexpr const char* kNames[] = {"sum", "mean", "max", "min", "logsumexp"};
  for (int i = 0; i < 5; ++i) {
    if (name == kNames[i]) return static_cast<segments::Reduction>(i);
  }
  throw std::invalid_argument("[segments] reduction: got " + name + ", which is not compiled in.");
}

class SegmentArguments : public Arguments {
 public:
  static constexpr std::size_t kMostArrays = 10;
  explicit SegmentArguments(std::int32_t device = dlpack::kCpu) : Arguments("segments", kMostArrays, device) {}

  // Of shape (n,) or (n, columns), at any strides. `written`: the gradient, contiguous.
  segments::Values values(const py::object& object, bool written = false) {
    const View& view = any(object, "values");
    if (view.rank != 1 && view.rank != 2) fail("values", "wrong shape " + view.shape_text());
    if (view.dtype > Dtype::kBFloat16) fail("values", "expected a float dtype");
    flat_ = view.rank == 1;
    segments::Values v{view.data, view.dtype, view.shape[0], 1, view.stride[0], 1};
    if (!flat_) {
      v.columns = view.shape[1];
      if (v.columns > 1) v.column_stride = view.stride[1];
    }
    const bool dense = (v.n <= 1 || v.row_stride == v.columns) && v.column_stride == 1;
    if (written && (view.read_only || (view.size() > 0 && !dense))) fail("values", "expected a contiguous array");
    return v;
  }

  // Of n rows: offsets (count + 1,), or ids (n,), the other is None.
  segments::Groups groups(std::int64_t n, std::int64_t count, const py::object& offsets, const py::object& ids,
                          const py::object& mask) {
    segments::Groups g;
    g.count = count;
    g.offsets = array<const std::int64_t>(offsets, "offsets", {count + 1});
    if (!ids.is_none()) {
      const View& view = keys(ids, "ids");
      if (view.shape[0] != n) fail("ids", "wrong shape " + view.shape_text());
      g.ids = n > 0 ? view.data : this;  // no rows have no memory, but are by ids still
      g.ids_dtype = view.dtype;
    }
    if ((g.offsets != nullptr) == (g.ids != nullptr)) fail("offsets", "expected either offsets or ids");
    g.mask = array<const std::uint8_t>(mask, "mask", {n});
    return g;
  }

  // int32 or int64, (n,).
  const View& keys(const py::object& object, const char* name) {
    const View& view = any(object, name);
    check_view(view, "segments", name, 1, false);
    if (view.shape[0] > 1 && view.stride[0] != 1) fail(name, "expected a contiguous array");
    if (view.dtype != Dtype::kInt32 && view.dtype != Dtype::kInt64) fail(name, "expected int32 or int64");
    return view;
  }

  // (segments,) or (segments, columns) like the values, contiguous.
  void* result(const py::object& object, const char* name, Dtype dtype, std::int64_t count, const segments::Values& v,
               bool writable) {
    std::vector<std::int64_t> shape{count};
    if (!flat_) shape.push_back(v.columns);
    return dense(object, name, dtype, shape, writable).data;
  }

 private:
  bool flat_ = true;
};

// What the loops compute in, and results are.
inline Dtype maths_of(const segments::Values& v) {
  return v.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

inline segments::ReduceCall reduce_call(SegmentArguments& a, const std::string& reduction, const py::object& values,
                                        std::int64_t count, const py::object& offsets, const py::object& ids,
                                        const py::object& mask, const py::object& out, const py::object& counts,
                                        const py::object& rows) {
  segments::ReduceCall call;
  call.reduction = reduction_named(reduction);
  call.values = a.values(values);
  call.groups = a.groups(call.values.n, count, offsets, ids, mask);
  call.out = a.result(out, "out", maths_of(call.values), count, call.values, true);
  call.counts = a.array<std::int64_t>(counts, "counts", {count});
  call.rows = static_cast<std::int64_t*>(a.result(rows, "rows", Dtype::kInt64, count, call.values, true));
  return call;
}

// result: the gradient of the values. values and out: kLogSumExp.
inline segments::SpreadCall spread_call(SegmentArguments& a, const std::string& reduction, const py::object& grad,
                                        std::int64_t count, const py::object& offsets, const py::object& ids,
                                        const py::object& mask, const py::object& counts, const py::object& rows,
                                        const py::object& values, const py::object& out, const py::object& result) {
  segments::SpreadCall call;
  call.reduction = reduction_named(reduction);
  const segments::Values written = a.values(result, true);
  call.result = const_cast<void*>(written.data);
  call.values = values.is_none() ? written : a.values(values);
  if (call.values.n != written.n || call.values.columns != written.columns || call.values.dtype != written.dtype) {
    a.fail("values", "expected the shape and dtype of their gradient");
  }
  call.groups = a.groups(written.n, count, offsets, ids, mask);
  call.grad = a.result(grad, "grad", maths_of(written), count, written, false);
  call.counts = a.array<const std::int64_t>(counts, "counts", {count});
  call.rows = static_cast<const std::int64_t*>(a.result(rows, "rows", Dtype::kInt64, count, written, false));
  call.out = a.result(out, "out", maths_of(written), count, written, false);
  return call;
}

}  // namespace hotloop::bind
