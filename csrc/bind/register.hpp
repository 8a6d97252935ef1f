// SPDX-License-Identifier: Apache-2.0
// Every file of csrc/bind registers what it binds by itself:
//
//     HOTLOOP_BIND(table) { m.def("evict", &run_evict, ...); }
//
// `m` is the submodule of that name, `_core.table` or `_cuda.table`, whichever module the file is linked into. Files
// of one room share its submodule.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace hotloop::bind {

struct Registration {
  Registration(const char* room, void (*fill)(pybind11::module_& m));
};

// Fills the submodules of `module` with what all files registered; called once, by PYBIND11_MODULE.
void add_rooms(pybind11::module_& module);

// "n keys rows" in words; std::logic_error, which fails the import, if they are not `count`.
std::vector<std::string> argument_names(const char* function, const std::string& names, std::size_t count);

// scope.def(name, f, py::arg("n"), py::arg("keys"), ...) for the names "n keys ...". Of a class, the first argument of
// `f` is the object and has no name.
template <class Scope, class Result, class... Given>
void def(Scope& scope, const char* name, Result (*f)(Given...), const std::string& names) {
  constexpr std::size_t kCount = sizeof...(Given) - (std::is_same_v<Scope, pybind11::module_> ? 0 : 1);
  const std::vector<std::string> words = argument_names(name, names, kCount);
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    scope.def(name, f, pybind11::arg(words[I].c_str())...);
  }(std::make_index_sequence<kCount>());
}

}  // namespace hotloop::bind

#define HOTLOOP_BIND(room)                                                                \
  static void bind_room(pybind11::module_& m);                                            \
  static const ::hotloop::bind::Registration registration_of_this_file{#room, bind_room}; \
  static void bind_room(pybind11::module_& m)
