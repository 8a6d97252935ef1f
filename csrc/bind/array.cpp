// SPDX-License-Identifier: Apache-2.0
// How each kind of Python object becomes a View. A DLPack capsule is read as it is, a NumPy array through the buffer
// protocol, a torch tensor through torch_tensor.cpp, anything else through its `__dlpack__`. An array that a View
// cannot describe (another device or dtype, strides that are no multiple of an element, more dimensions) raises an
// error with op and argument.
#include "bind/array.hpp"

#include "bind/torch_tensor.hpp"

namespace hotloop::bind {

namespace {

const char* device_name(std::int32_t type) {
  switch (type) {
    case dlpack::kCpu:
    case dlpack::kCudaHost:
      return "cpu";
    case dlpack::kCuda:
    case dlpack::kCudaManaged:
      return "cuda";
    default:
      return "another device";
  }
}

bool same_device(std::int32_t have, std::int32_t want) {
  return have == want || (want == dlpack::kCpu && have == dlpack::kCudaHost) ||
         (want == dlpack::kCuda && have == dlpack::kCudaManaged);
}

}  // namespace

Array::Array(const py::object& object, const char* op, const char* argument, std::int32_t device)
    : op_(op), argument_(argument) {
  if (PyCapsule_CheckExact(object.ptr()) != 0) {
    owner_ = object;
  } else if (device == dlpack::kCpu && PyObject_CheckBuffer(object.ptr()) != 0) {
    from_buffer(object);
    return;
  } else if (is_torch_tensor(object)) {
    TorchMemory memory = torch_memory(object, op_, argument_);
    from_tensor(memory.tensor, memory.copied, device);
    owner_ = std::move(memory.owner);
    return;
  } else if (device == dlpack::kCuda && py::hasattr(object, "__dlpack__")) {
    // -1: do not synchronise. The caller names its stream; the default would make the legacy default
    // stream wait for it, which also breaks the capture of a CUDA graph.
    owner_ = object.attr("__dlpack__")(py::arg("stream") = -1);
  } else if (py::hasattr(object, "__dlpack__")) {
    owner_ = object.attr("__dlpack__")();
  } else {
    throw py::type_error(where() + "expected an array (buffer protocol or DLPack), got " +
                         std::string(py::str(py::type::of(object).attr("__name__"))) + ".");
  }
  // The capsule is read, not consumed: it still owns the tensor and frees it when it goes.
  if (PyCapsule_IsValid(owner_.ptr(), "dltensor") != 0) {
    const auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(owner_.ptr(), "dltensor"));
    from_tensor(managed->tensor, false, device);
  } else if (PyCapsule_IsValid(owner_.ptr(), "dltensor_versioned") != 0) {
    const auto* managed =
        static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(owner_.ptr(), "dltensor_versioned"));
    from_tensor(managed->tensor, (managed->flags & dlpack::kReadOnly) != 0, device);
  } else {
    throw py::type_error(where() + "expected an unused DLPack capsule, got one that was consumed. Export it again.");
  }
}

void Array::from_tensor(const dlpack::Tensor& tensor, bool read_only, std::int32_t device) {
  if (!same_device(tensor.device.type, device)) {
    throw py::value_error(where() + "expected an array on " + device_name(device) + ", got one on " +
                          device_name(tensor.device.type) + ". Move it first.");
  }
  if (tensor.rank > kMaxRank) {
    throw py::value_error(where() + "expected at most " + std::to_string(kMaxRank) + " dimensions, got " +
                          std::to_string(tensor.rank) + ".");
  }
  const dlpack::DataType t = tensor.dtype;
  if (t.lanes == 1 && t.code == dlpack::kFloat && t.bits == 32) {
    view.dtype = Dtype::kFloat32;
  } else if (t.lanes == 1 && t.code == dlpack::kFloat && t.bits == 64) {
    view.dtype = Dtype::kFloat64;
  } else if (t.lanes == 1 && t.code == dlpack::kFloat && t.bits == 16) {
    view.dtype = Dtype::kFloat16;
  } else if (t.lanes == 1 && t.code == dlpack::kBFloat && t.bits == 16) {
    view.dtype = Dtype::kBFloat16;
  } else if (t.lanes == 1 && t.code == dlpack::kInt && t.bits == 64) {
    view.dtype = Dtype::kInt64;
  } else if (t.lanes == 1 && t.code == dlpack::kInt && t.bits == 32) {
    view.dtype = Dtype::kInt32;
  } else if (t.lanes == 1 && t.bits == 8 && (t.code == dlpack::kUInt || t.code == dlpack::kBool)) {
    view.dtype = Dtype::kUInt8;
  } else {
    throw py::type_error(where() +
                         "expected float64, float32, float16, bfloat16, int64, int32 or uint8, got DLPack type code " +
                         std::to_string(t.code) + " with " + std::to_string(t.bits) + " bits.");
  }
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.rank = tensor.rank;
  view.read_only = read_only;
  std::int64_t stride = 1;
  for (int i = tensor.rank - 1; i >= 0; --i) {
    const auto k = static_cast<std::size_t>(i);
    view.shape[k] = tensor.shape[i];
    view.stride[k] = tensor.strides == nullptr ? stride : tensor.strides[i];
    stride *= tensor.shape[i];
  }
}

void Array::from_buffer(const py::object& object) {
  auto buffer = std::make_unique<Py_buffer>();
  if (PyObject_GetBuffer(object.ptr(), buffer.get(), PyBUF_STRIDES | PyBUF_FORMAT) != 0) throw py::error_already_set();
  buffer_.reset(buffer.release());
  const Py_buffer& b = *buffer_;
  std::string format = b.format == nullptr ? "B" : b.format;
  if (format.size() == 2 && (format[0] == '<' || format[0] == '=' || format[0] == '@')) format.erase(0, 1);
  if (format == "f") {
    view.dtype = Dtype::kFloat32;
  } else if (format == "d") {
    view.dtype = Dtype::kFloat64;
  } else if (format == "e") {
    view.dtype = Dtype::kFloat16;
  } else if ((format == "l" || format == "q") && b.itemsize == 8) {
    view.dtype = Dtype::kInt64;
  } else if ((format == "i" || format == "l") && b.itemsize == 4) {
    view.dtype = Dtype::kInt32;
  } else if (format == "B" || format == "?") {
    view.dtype = Dtype::kUInt8;
  } else {
    const bool swapped = format[0] == '>' || format[0] == '!';
    throw py::type_error(where() +
                         "expected float64, float32, float16, int64, int32 or uint8 in native byte order, got " +
                         (swapped ? "big-endian '" : "format '") + format + "'. " +
                         (swapped ? "Use array.astype(array.dtype.newbyteorder('='))." : "Convert it first."));
  }
  if (b.ndim > kMaxRank) {
    throw py::value_error(where() + "expected at most " + std::to_string(kMaxRank) + " dimensions, got " +
                          std::to_string(b.ndim) + ".");
  }
  view.data = b.buf;
  view.rank = b.ndim;
  view.read_only = b.readonly != 0;
  for (int i = 0; i < b.ndim; ++i) {
    const auto k = static_cast<std::size_t>(i);
    view.shape[k] = b.shape[i];
    if (b.strides[i] % b.itemsize != 0) {
      throw py::value_error(where() + "expected strides that are whole elements, got " + std::to_string(b.strides[i]) +
                            " bytes for items of " + std::to_string(b.itemsize) + ". Pass a copy.");
    }
    view.stride[k] = b.strides[i] / b.itemsize;
  }
  if (view.size() > 0 && reinterpret_cast<std::uintptr_t>(view.data) % static_cast<std::uintptr_t>(b.itemsize) != 0) {
    throw py::value_error(where() + "expected an aligned array, got one that starts inside an element. Pass a copy.");
  }
}

}  // namespace hotloop::bind
