#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/pair_arguments.hpp"
#include "bind/register.hpp"

namespace hotloop::bind {

namespace {

// The arguments are those of PairArguments. Returns the sum of the losses if `total`.
double run_pair_loop(const std::string& head, std::int64_t n, const py::list& inputs, const std::vector<double>& params,
                     const py::object& loss, const py::list& grads, double grad_scale, bool total,
                     bool double_precision) {
  PairArguments arguments(head, n, inputs, params, loss, grads, grad_scale, double_precision, dlpack::kCpu);
  double sum = 0.0;
  arguments.call.total = total ? &sum : nullptr;
  py::gil_scoped_release release;
  preference::pair_loop(arguments.call);
  return sum;
}

// Whether `inside` holds for every value. The comparisons of a block are collected without a branch,
// so that they vectorise.
template <class T, class Inside>
bool all_of_rows(const T* x, std::int64_t n, std::int64_t stride, Inside inside) {
  constexpr std::int64_t kBlock = 4096;
  for (std::int64_t first = 0; first < n; first += kBlock) {
    const std::int64_t last = std::min(n, first + kBlock);
    int outside = 0;
    if (stride == 1) {
      for (std::int64_t i = first; i < last; ++i) outside |= static_cast<int>(!inside(x[i]));
    } else {
      for (std::int64_t i = first; i < last; ++i) outside |= static_cast<int>(!inside(x[i * stride]));
    }
    if (outside != 0) return false;
  }
  return true;
}

template <class T>
bool all_inside(const View& view, T high, bool open) {
  const auto* x = static_cast<const T*>(view.data);
  const std::int64_t n = view.shape[0], stride = view.stride[0];
  if (open) return all_of_rows(x, n, stride, [=](T v) { return (v >= T(0)) & (v < high); });
  return all_of_rows(x, n, stride, [=](T v) { return (v >= T(0)) & (v <= high); });
}

// Whether every value of rows, float32 or float64, (n,), is 0 or 1.
bool are_marks(const py::object& rows) {
  const Array array(rows, "pair_loop", "rows");
  const View& view = array.view;
  check_view(view, "pair_loop", "rows", 1, false);
  const auto mark = [](auto v) { return (v == 0) | (v == 1); };
  const std::int64_t n = view.shape[0], stride = view.stride[0];
  if (view.dtype == Dtype::kFloat32) return all_of_rows(static_cast<const float*>(view.data), n, stride, mark);
  if (view.dtype == Dtype::kFloat64) return all_of_rows(static_cast<const double*>(view.data), n, stride, mark);
  throw std::invalid_argument("[pair_loop] rows: expected float32 or float64.");
}

// Whether every value of rows, float32 or float64, (n,), lies in [0, high], or in [0, high) if `open`. NaN
// does not.
bool within(const py::object& rows, double high, bool open) {
  const Array array(rows, "pair_loop", "rows");
  const View& view = array.view;
  check_view(view, "pair_loop", "rows", 1, false);
  if (view.dtype == Dtype::kFloat32) return all_inside(view, static_cast<float>(high), open);
  if (view.dtype == Dtype::kFloat64) return all_inside(view, high, open);
  throw std::invalid_argument("[pair_loop] rows: expected float32 or float64.");
}

}  // namespace

HOTLOOP_BIND(pointwise) {
  def(m, "pair_loop", &run_pair_loop, "head n inputs params loss grads grad_scale total double_precision");
  def(m, "within", &within, "rows high open");
  def(m, "are_marks", &are_marks, "rows");
  m.def("pair_heads", &pair_heads);
}

}  // namespace hotloop::bind
