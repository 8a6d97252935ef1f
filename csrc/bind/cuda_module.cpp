// SPDX-License-Identifier: Apache-2.0
// hotloop._cuda: the loops that run on a CUDA device. Importing it touches no device and needs no
// driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "bind/register.hpp"

namespace hotloop::bind {

namespace {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  static_cast<void>(cudaGetLastError());  // no driver or no device: not an error of a later call
  return 0;
}

// HOTLOOP_CUDA_ARCH_LIST is one string, comma-separated: sm_* for machine code, compute_* for PTX.
std::vector<std::string> architectures() {
  std::vector<std::string> names;
  std::istringstream list(HOTLOOP_CUDA_ARCH_LIST);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

}  // namespace

}  // namespace hotloop::bind

PYBIND11_MODULE(_cuda, m) {
  namespace py = pybind11;
  m.doc() =
      "hotloop's CUDA loops. Use the functions of the hotloop package, which check their "
      "arguments.";
  hotloop::bind::add_rooms(m);
  m.def("device_count", &hotloop::bind::device_count);
  m.def("architectures", &hotloop::bind::architectures);
}
