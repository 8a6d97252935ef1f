#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bind/pair_arguments.hpp"
#include "bind/register.hpp"

namespace hotloop::bind {

namespace {

// The arguments are those of PairArguments. Returns the sum of the losses if `total`.
double run_pair_loop(const std::string& head, std::int64_t n, const py::list& inputs,
                     const std::vector<double>& params, const py::object& loss,
                     const py::list& grads, double grad_scale, bool total, bool double_precision) {
  PairArguments arguments(head, n, inputs, params, loss, grads, grad_scale, double_precision,
                          dlpack::kCpu);
  double sum = 0.0;
  arguments.call.total = total ? &sum : nullptr;
  py::gil_scoped_release release;
  preference::pair_loop(arguments.call);
  return sum;
}

}  // namespace

void register_preference(py::module_& m) {
  m.def("pair_loop", &run_pair_loop, py::arg("head"), py::arg("n"), py::arg("inputs"),
        py::arg("params"), py::arg("loss"), py::arg("grads"), py::arg("grad_scale"),
        py::arg("total"), py::arg("double_precision"));
  m.def("pair_heads", &pair_heads);
}

}  // namespace hotloop::bind
