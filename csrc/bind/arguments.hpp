// SPDX-License-Identifier: Apache-2.0
// The arrays of one call: each checked for what would corrupt memory, and kept alive until the call returns.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "bind/array.hpp"

namespace hotloop::bind {

// Arrays that a call keeps alive, each checked for what would corrupt memory.
class Arguments {
 public:
  Arguments(const char* op, std::size_t most, std::int32_t device = dlpack::kCpu) : op_(op), device_(device) {
    arrays_.reserve(most);
  }

  // Any array at all.
  const View& any(const py::object& object, const char* name) {
    return arrays_.emplace_back(object, op_, name, device_).view;
  }
  // A matrix whose rows are contiguous.
  const View& tile(const py::object& object, const char* name, bool writable) {
    const View& view = any(object, name);
    check_view(view, op_, name, 2, writable);
    return with_whole_rows(view, name);
  }
  // Any array of two or more dimensions whose last one is contiguous.
  const View& rows(const py::object& object, const char* name) {
    const View& view = any(object, name);
    if (view.rank < 2) fail(name, "expected rows, got shape " + view.shape_text());
    return with_whole_rows(view, name);
  }
  // A contiguous array of the given dtype and shape, or an empty view for None.
  View dense(const py::object& object, const char* name, Dtype dtype, std::vector<std::int64_t> shape, bool writable) {
    if (object.is_none()) return {};
    const View& view = any(object, name);
    check_view(view, op_, name, static_cast<int>(shape.size()), writable);
    if (view.dtype != dtype)
      fail(name, std::string("expected ") + dtype_name(dtype) + ", got " + dtype_name(view.dtype));
    std::int64_t stride = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
      const auto k = static_cast<std::size_t>(i);
      if (view.shape[k] != shape[k]) fail(name, "wrong shape " + view.shape_text());
      if (view.size() > 0 && view.shape[k] > 1 && view.stride[k] != stride) fail(name, "expected a contiguous array");
      stride *= view.shape[k];
    }
    return view;
  }
  // The elements of such an array of type T, nullptr for None; const ones are only read.
  template <class T>
  T* array(const py::object& object, const char* name, std::vector<std::int64_t> shape,
           bool writable = !std::is_const_v<T>) {
    return static_cast<T*>(
        dense(object, name, DtypeOf<std::remove_const_t<T>>::value, std::move(shape), writable).data);
  }
  // A contiguous uint8 array (n,), to be written to.
  const View& bytes(const py::object& object, const char* name) {
    const View& view = any(object, name);
    check_view(view, op_, name, 1, true);
    if (view.dtype != Dtype::kUInt8 || (view.shape[0] > 1 && view.stride[0] != 1))
      fail(name, "expected contiguous uint8");
    return view;
  }

  [[noreturn]] void fail(const char* name, const std::string& what) const {
    throw std::invalid_argument(std::string("[") + op_ + "] " + name + ": " + what + ".");
  }

 private:
  const View& with_whole_rows(const View& view, const char* name) const {
    const auto last = static_cast<std::size_t>(view.rank - 1);
    if (view.size() > 0 && view.shape[last] > 1 && view.stride[last] != 1) fail(name, "expected contiguous rows");
    return view;
  }

  const char* op_;
  std::int32_t device_;
  std::vector<Array> arrays_;
};

}  // namespace hotloop::bind
