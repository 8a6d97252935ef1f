// SPDX-License-Identifier: Apache-2.0
#include "bind/torch_tensor.hpp"

#include <vector>

namespace hotloop::bind {

namespace {

// DLPackExchangeAPI of DLPack 1.3: torch >= 2.10 describes a tensor without a capsule, in a quarter of the time.
struct ExchangeApi {
  dlpack::Version version;
  ExchangeApi* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*describe)(void* object, dlpack::Tensor* out);
  void* current_stream;
};

struct Torch {
  PyTypeObject* tensor = nullptr;
  PyObject* is_neg = nullptr;
  PyObject* to_dlpack = nullptr;
  const ExchangeApi* exchange = nullptr;
  // Types whose tensors hold their elements in plain memory: Tensor, Parameter, subclasses without operators of
  // their own. Kept alive, since a new type could take the address of one that was freed.
  std::vector<PyTypeObject*> plain;
};

// Never destroyed: the interpreter is gone before static objects are.
Torch& torch() {
  static auto* found = new Torch;
  return *found;
}

bool load() {
  Torch& t = torch();
  if (t.tensor != nullptr) return true;
  const py::dict modules = py::module_::import("sys").attr("modules");
  if (!modules.contains("torch")) return false;
  const py::object module = modules["torch"];
  if (!py::hasattr(module, "Tensor") || !py::hasattr(module, "utils")) return false;  // still being imported
  const py::object type = module.attr("Tensor");
  t.is_neg = py::object(type.attr("is_neg")).release().ptr();
  t.to_dlpack = py::object(py::module_::import("torch.utils.dlpack").attr("to_dlpack")).release().ptr();
  if (py::hasattr(type, "__dlpack_c_exchange_api__")) {
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    constexpr const char* kName = "dlpack_exchange_api";
    if (PyCapsule_IsValid(capsule.ptr(), kName) != 0) {
      const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), kName));
      if (api->version.major == 1 && api->describe != nullptr) t.exchange = api;
    }
  }
  t.tensor = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
  t.plain.push_back(t.tensor);
  return true;
}

bool plain_type(const PyTypeObject* type) {
  for (const PyTypeObject* known : torch().plain) {
    if (known == type) return true;
  }
  return false;
}

// hotloop.front.plain.readable: the tensor, a plain copy of it, or a TypeError.
py::object readable(const py::object& object, const std::string& op, const std::string& argument) {
  return py::module_::import("hotloop.front.plain").attr("readable")(op, argument, object);
}

bool lazily_negated(const py::object& object) {
  PyObject* arguments[] = {object.ptr()};
  const auto answer = py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch().is_neg, arguments, 1, nullptr));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

// Fills memory.tensor and says whether there is memory behind every element.
bool describe(TorchMemory& memory) {
  const Torch& t = torch();
  if (t.exchange != nullptr) {
    if (t.exchange->describe(memory.owner.ptr(), &memory.tensor) != 0) {
      PyErr_Clear();
      return false;
    }
  } else {
    PyObject* arguments[] = {memory.owner.ptr()};
    auto capsule = py::reinterpret_steal<py::object>(PyObject_Vectorcall(t.to_dlpack, arguments, 1, nullptr));
    if (!capsule) {
      PyErr_Clear();
      return false;
    }
    memory.tensor = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor;
    memory.owner = std::move(capsule);
  }
  if (memory.tensor.data != nullptr) return true;
  for (int i = 0; i < memory.tensor.rank; ++i) {
    if (memory.tensor.shape[i] == 0) return true;
  }
  return false;
}

}  // namespace

bool is_torch_tensor(const py::object& object) {
  if (!load()) return false;
  return Py_TYPE(object.ptr()) == torch().tensor || PyObject_TypeCheck(object.ptr(), torch().tensor) != 0;
}

TorchMemory torch_memory(const py::object& object, const std::string& op, const std::string& argument) {
  TorchMemory memory{object};
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (!plain_type(type)) {
    memory.owner = readable(object, op, argument);
    if (memory.owner.is(object)) {
      Py_INCREF(type);
      torch().plain.push_back(type);
    } else {
      memory.copied = true;
    }
  } else if (lazily_negated(object)) {
    memory.owner = readable(object, op, argument);
    memory.copied = true;
  }
  if (describe(memory)) return memory;
  memory.owner = readable(object, op, argument);
  memory.copied = true;
  if (describe(memory)) return memory;
  throw py::type_error("[" + op + "] " + argument + ": expected a tensor in plain memory, got one without.");
}

}  // namespace hotloop::bind
