// SPDX-License-Identifier: Apache-2.0
// From a torch.Tensor to the DLPack description of its memory. torch itself is not linked: its functions are
// looked up in the module that the caller has imported.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "core/dlpack.hpp"

namespace hotloop::bind {

namespace py = pybind11;

struct TorchMemory {
  py::object owner;  // what keeps the memory: the tensor, a copy of it, or a capsule
  dlpack::Tensor tensor{};
  bool copied = false;  // writing to it would not reach the tensor given
};

// Whether the object is a torch.Tensor, of any subclass. False where torch was not imported.
bool is_torch_tensor(const py::object& object);

// The memory of a tensor whose elements are what its memory holds. A lazily negated view is copied; a wrapper
// subclass, a sparse tensor and the like raise the TypeError of hotloop/front/plain.py. This is the one way by which
// tensors reach the compiled loops.
TorchMemory torch_memory(const py::object& object, const std::string& op, const std::string& argument);

}  // namespace hotloop::bind
