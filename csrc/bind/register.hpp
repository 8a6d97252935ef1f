// Every file of csrc/bind registers what it binds by itself:
//
//     HOTLOOP_BIND(table) { m.def("evict", &run_evict, ...); }
//
// `m` is the submodule of that name, `_core.table` or `_cuda.table`, whichever module the file is linked into. Files
// of one room share its submodule.
#pragma once

#include <pybind11/pybind11.h>

namespace hotloop::bind {

struct Registration {
  Registration(const char* room, void (*fill)(pybind11::module_& m));
};

// Fills the submodules of `module` with what all files registered; called once, by PYBIND11_MODULE.
void add_rooms(pybind11::module_& module);

}  // namespace hotloop::bind

#define HOTLOOP_BIND(room)                                                                \
  static void bind_room(pybind11::module_& m);                                            \
  static const ::hotloop::bind::Registration registration_of_this_file{#room, bind_room}; \
  static void bind_room(pybind11::module_& m)
