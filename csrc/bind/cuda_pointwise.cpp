// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/array.hpp"
#include "bind/pointwise_arguments.hpp"
#include "bind/register.hpp"
#include "kernels/core/pointwise_cuda.hpp"

namespace hotloop::bind {

namespace {

constexpr const char* kOp = PointwiseArguments::kOp;

// Arrays of the call beside its columns, in device memory.
class Scratch {
 public:
  explicit Scratch(std::size_t count) { arrays_.reserve(count); }

  // A contiguous float64 array of at least `least` elements.
  double* numbers(const py::object& object, const char* name, std::int64_t least) {
    const View& view = arrays_.emplace_back(object, kOp, name, dlpack::kCuda).view;
    check_view(view, kOp, name, 1, true);
    if (view.dtype != Dtype::kFloat64 || view.shape[0] < least || view.stride[0] != 1) {
      throw std::invalid_argument(std::string("[pointwise] ") + name +
                                  ": expected a contiguous float64 array of at least " + std::to_string(least) +
                                  " elements, got " + dtype_name(view.dtype) + " " + view.shape_text() + ".");
    }
    return static_cast<double*>(view.data);
  }

  pointwise::OutputColumn total(const py::object& object) {
    const View& view = arrays_.emplace_back(object, kOp, "total", dlpack::kCuda).view;
    check_view(view, kOp, "total", 1, true);
    if (view.shape[0] != 1 || (view.dtype != Dtype::kFloat32 && view.dtype != Dtype::kFloat64)) {
      throw std::invalid_argument("[pointwise] total: expected a float32 or float64 array of shape (1,), got " +
                                  std::string(dtype_name(view.dtype)) + " " + view.shape_text() + ".");
    }
    return {view.data, view.dtype, 0};
  }

 private:
  std::vector<Array> arrays_;
};

// The arguments are those of PointwiseArguments, in memory of `device`; `stream` is a cudaStream_t. total: an array
// (1,), which receives the sum of the losses, or None. outs: a float64 array (3 * extra values,), which receives sum,
// least and largest of each, with counted: a float64 array (1,) for the rows that count; or None. partials: float64
// scratch of PARTIALS elements, with outs PARTIALS * (2 + 3 * MAX_OUTS); needed for sums. Returns the number of extra
// values of the head.
int run(int handle, std::int64_t n, const py::list& inputs, const std::vector<double>& params, const py::object& loss,
        const py::list& grads, double grad_scale, const py::object& total, const py::object& partials,
        bool double_precision, int device, std::uintptr_t stream, const py::object& weight, const py::object& groups,
        const py::object& outs, const py::object& counted) {
  const pointwise::HeadInfo& info = pointwise::info_cuda(handle);
  const PointwiseArguments arguments(info, n, inputs, params, loss, grads, grad_scale, double_precision, weight, groups,
                                     dlpack::kCuda);
  pointwise::CudaCall call;
  call.rows = arguments.call;
  call.on_host = arguments.is_number;
  call.device = device;
  call.stream = reinterpret_cast<void*>(stream);
  Scratch scratch(4);
  if (!total.is_none()) call.total = scratch.total(total);
  if (!outs.is_none()) {
    call.outs = scratch.numbers(outs, "outs", 3 * info.outs);
    call.counted = scratch.numbers(counted, "counted", 1);
  }
  if (!total.is_none() || !outs.is_none()) {
    if (partials.is_none()) {
      throw std::invalid_argument("[pointwise] partials: expected a float64 array with `total`, got None.");
    }
    call.partials =
        scratch.numbers(partials, "partials", pointwise::kPartials * (outs.is_none() ? 1 : pointwise::kWidth));
  }
  py::gil_scoped_release release;
  pointwise::loop_cuda(handle, call);
  return info.outs;
}

}  // namespace

HOTLOOP_BIND(pointwise) {
  m.def("run", &run, py::arg("head"), py::arg("n"), py::arg("inputs"), py::arg("params"), py::arg("loss"),
        py::arg("grads"), py::arg("grad_scale"), py::arg("total"), py::arg("partials"), py::arg("double_precision"),
        py::arg("device"), py::arg("stream"), py::arg("weight") = py::none(), py::arg("groups") = py::none(),
        py::arg("outs") = py::none(), py::arg("counted") = py::none());
  m.def("heads", [] { return heads_by_room(pointwise::rooms_cuda()); });
  m.attr("PARTIALS") = pointwise::kPartials;
  m.attr("MAX_OUTS") = pointwise::kMaxOuts;
}

}  // namespace hotloop::bind
