// One register_<room> per room; module.cpp calls them, cuda_module.cpp those that end in _cuda.
#pragma once

#include <pybind11/pybind11.h>

namespace hotloop::bind {

void register_core(pybind11::module_& m);
void register_decode(pybind11::module_& m);
void register_decode_cuda(pybind11::module_& m);
void register_decode_search(pybind11::module_& m);
void register_logprob(pybind11::module_& m);
void register_preference(pybind11::module_& m);
void register_table(pybind11::module_& m);
void register_table_cuda(pybind11::module_& m);
void register_table_updates(pybind11::module_& m);
void register_table_filters(pybind11::module_& m);
void register_table_multiplex(pybind11::module_& m);
void register_table_memory(pybind11::module_& m);

}  // namespace hotloop::bind
