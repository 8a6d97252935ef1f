// SPDX-License-Identifier: Apache-2.0
// Arrays of table calls, on the CPU and on a device. The front door has checked everything; this keeps a wrong call
// from touching memory that is not its own.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bind/arguments.hpp"
#include "table/store/calls.hpp"

namespace hotloop::bind {

inline std::uint64_t* words(Arguments& a, const py::object& object, const char* name, std::int64_t n, bool writable) {
  return reinterpret_cast<std::uint64_t*>(a.array<std::int64_t>(object, name, {n}, writable));
}
inline std::uint32_t* numbers(Arguments& a, const py::object& object, const char* name, std::int64_t n, bool writable) {
  return reinterpret_cast<std::uint32_t*>(a.array<std::int32_t>(object, name, {n}, writable));
}

template <class T>
py::bytes bytes_of(const T* data, std::size_t n) {
  return {reinterpret_cast<const char*>(data), n * sizeof(T)};
}
template <class T>
py::bytes bytes_of(const std::vector<T>& v) {
  return bytes_of(v.data(), v.size());
}

inline table::Values rows_of(const View& view) {
  // The stride of a single row, or of none, says nothing.
  const std::int64_t stride = view.shape[0] > 1 ? view.stride[0] : view.shape[1];
  return {static_cast<char*>(view.data), stride * item_size(view.dtype)};
}
inline table::Values matrix(Arguments& a, const py::object& object, const char* name, Dtype dtype, std::int64_t n,
                            std::int64_t width, bool writable) {
  if (object.is_none()) return {};
  const View& view = a.tile(object, name, writable);
  // NumPy has no bfloat16: its bits come as float16.
  const bool bits = dtype == Dtype::kBFloat16 && view.dtype == Dtype::kFloat16;
  if (view.dtype != dtype && !bits)
    a.fail(name, std::string("expected ") + dtype_name(dtype) + ", got " + dtype_name(view.dtype));
  if (view.shape[0] != n || view.shape[1] != width) a.fail(name, "wrong shape " + view.shape_text());
  return rows_of(view);
}
// Out of pooling: float32, or the type of the table if it is one of floats.
inline const View& pooled(Arguments& a, const py::object& out, Dtype stored, std::int64_t bags, std::int64_t dim) {
  const View& view = a.tile(out, "out", true);
  if (view.shape[0] != bags || view.shape[1] != dim) a.fail("out", "wrong shape " + view.shape_text());
  if (view.dtype != Dtype::kFloat32 && (view.dtype != stored || stored == Dtype::kUInt8)) a.fail("out", "wrong type");
  return view;
}

}  // namespace hotloop::bind
