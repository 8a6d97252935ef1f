// hotloop._cuda: the loops that run on a CUDA device. Importing it touches no device and needs no
// driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/array.hpp"
#include "bind/pair_arguments.hpp"
#include "bind/register.hpp"
#include "kernels/preference/pair_cuda.hpp"

namespace hotloop::bind {

namespace {

constexpr const char* kOp = PairArguments::kOp;

// The arguments are those of PairArguments, in memory of `device`; `stream` is a cudaStream_t.
// total: a float32 or float64 array (1,), which receives the sum of the losses, or None; with it,
// partials: a float64 array of at least PAIR_PARTIALS elements.
void run_pair_loop(const std::string& head, std::int64_t n, const py::list& inputs, const std::vector<double>& params,
                   const py::object& loss, const py::list& grads, double grad_scale, const py::object& total,
                   const py::object& partials, bool double_precision, int device, std::uintptr_t stream) {
  const PairArguments arguments(head, n, inputs, params, loss, grads, grad_scale, double_precision, dlpack::kCuda);
  preference::PairCudaCall call;
  call.pairs = arguments.call;
  call.on_host = arguments.is_number;
  call.device = device;
  call.stream = reinterpret_cast<void*>(stream);
  std::vector<Array> arrays;
  arrays.reserve(2);
  if (!total.is_none()) {
    const View& sum = arrays.emplace_back(total, kOp, "total", dlpack::kCuda).view;
    check_view(sum, kOp, "total", 1, true);
    if (sum.shape[0] != 1 || (sum.dtype != Dtype::kFloat32 && sum.dtype != Dtype::kFloat64)) {
      throw std::invalid_argument("[pair_loop] total: expected a float32 or float64 array of shape (1,), got " +
                                  std::string(dtype_name(sum.dtype)) + " " + sum.shape_text() + ".");
    }
    call.total = {sum.data, sum.dtype, 0};
    if (partials.is_none()) {
      throw std::invalid_argument("[pair_loop] partials: expected a float64 array with `total`, got None.");
    }
    const View& scratch = arrays.emplace_back(partials, kOp, "partials", dlpack::kCuda).view;
    check_view(scratch, kOp, "partials", 1, true);
    if (scratch.dtype != Dtype::kFloat64 || scratch.shape[0] < preference::kPairPartials || scratch.stride[0] != 1) {
      throw std::invalid_argument("[pair_loop] partials: expected a contiguous float64 array of at least " +
                                  std::to_string(preference::kPairPartials) + " elements, got " +
                                  dtype_name(scratch.dtype) + " " + scratch.shape_text() + ".");
    }
    call.partials = static_cast<double*>(scratch.data);
  }
  py::gil_scoped_release release;
  preference::pair_loop_cuda(call);
}

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
  py::module_ pointwise = m.def_submodule("pointwise");
  pointwise.def("pair_loop", &hotloop::bind::run_pair_loop, py::arg("head"), py::arg("n"), py::arg("inputs"),
                py::arg("params"), py::arg("loss"), py::arg("grads"), py::arg("grad_scale"), py::arg("total"),
                py::arg("partials"), py::arg("double_precision"), py::arg("device"), py::arg("stream"));
  pointwise.def("pair_heads", &hotloop::bind::pair_heads);
  pointwise.attr("PAIR_PARTIALS") = hotloop::preference::kPairPartials;
  m.def("device_count", &hotloop::bind::device_count);
  m.def("architectures", &hotloop::bind::architectures);
}
