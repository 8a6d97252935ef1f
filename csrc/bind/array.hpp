// SPDX-License-Identifier: Apache-2.0
// From a Python array (torch tensor, buffer protocol or DLPack) to a View, without copying. Keep the Array alive while
// the view is used.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "core/dlpack.hpp"
#include "core/view.hpp"

namespace hotloop::bind {

namespace py = pybind11;

class Array {
 public:
  // `device`: the DLPack device type the caller can read (CPU here, CUDA in the GPU module).
  Array(const py::object& object, const char* op, const char* argument, std::int32_t device = dlpack::kCpu);

  View view;

 private:
  void from_buffer(const py::object& object);
  void from_tensor(const dlpack::Tensor& tensor, bool read_only, std::int32_t device);
  std::string where() const { return "[" + op_ + "] " + argument_ + ": "; }

  struct Release {
    void operator()(Py_buffer* buffer) const {
      PyBuffer_Release(buffer);
      delete buffer;
    }
  };
  std::unique_ptr<Py_buffer, Release> buffer_;
  py::object owner_;  // a capsule, or the tensor whose memory is read
  std::string op_, argument_;
};

}  // namespace hotloop::bind
