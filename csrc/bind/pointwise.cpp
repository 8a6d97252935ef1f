// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/pointwise_arguments.hpp"
#include "bind/register.hpp"

namespace hotloop::bind {

namespace {

// Offsets ascend from 0 to n: the loop steps from group to group, and would not end otherwise.
void check_offsets(const pointwise::Call& call) {
  const pointwise::Groups& groups = call.groups;
  if (groups.offsets == nullptr) return;
  const auto at = [&](std::int64_t k) {
    return groups.wide ? static_cast<const std::int64_t*>(groups.offsets)[k]
                       : std::int64_t{static_cast<const std::int32_t*>(groups.offsets)[k]};
  };
  bool ascend = at(0) == 0 && at(groups.count) == call.n;
  for (std::int64_t k = 0; k < groups.count; ++k) ascend = ascend && at(k) <= at(k + 1);
  if (!ascend) {
    throw std::invalid_argument("[pointwise] groups: expected ascending offsets from 0 to " + std::to_string(call.n) +
                                ". Pass cu_seqlens.");
  }
}

// The arguments are those of PointwiseArguments. Returns the sum of the losses (0 unless `total`); with `outs`
// the sum, the number of rows that count, and (sum, least, largest) of each extra value over them.
py::object run(int handle, std::int64_t n, const py::list& inputs, const std::vector<double>& params,
               const py::object& loss, const py::list& grads, double grad_scale, bool total, bool double_precision,
               const py::object& weight, const py::object& groups, bool outs) {
  const pointwise::Entry& head = pointwise::entry(handle);
  PointwiseArguments arguments(head.info, n, inputs, params, loss, grads, grad_scale, double_precision, weight, groups,
                               dlpack::kCpu);
  check_offsets(arguments.call);
  double sum = 0.0, counted = 0.0;
  std::array<pointwise::OutTotal, pointwise::kMaxOuts> totals{};
  arguments.call.total = total ? &sum : nullptr;
  if (outs) {
    arguments.call.outs = totals.data();
    arguments.call.counted = &counted;
  }
  {
    py::gil_scoped_release release;
    pointwise::loop(head, arguments.call);
  }
  if (!outs) return py::float_(sum);
  py::list reduced;
  for (int k = 0; k < head.info.outs; ++k) {
    const pointwise::OutTotal& t = totals[static_cast<std::size_t>(k)];
    reduced.append(py::make_tuple(t.sum, t.least, t.largest));
  }
  return py::make_tuple(sum, counted, reduced);
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
  const Array array(rows, "pointwise", "rows");
  const View& view = array.view;
  check_view(view, "pointwise", "rows", 1, false);
  const auto mark = [](auto v) { return (v == 0) | (v == 1); };
  const std::int64_t n = view.shape[0], stride = view.stride[0];
  if (view.dtype == Dtype::kFloat32) return all_of_rows(static_cast<const float*>(view.data), n, stride, mark);
  if (view.dtype == Dtype::kFloat64) return all_of_rows(static_cast<const double*>(view.data), n, stride, mark);
  throw std::invalid_argument("[pointwise] rows: expected float32 or float64.");
}

// Whether every value of rows, float32 or float64, (n,), lies in [0, high], or in [0, high) if `open`. NaN
// does not.
bool within(const py::object& rows, double high, bool open) {
  const Array array(rows, "pointwise", "rows");
  const View& view = array.view;
  check_view(view, "pointwise", "rows", 1, false);
  if (view.dtype == Dtype::kFloat32) return all_inside(view, static_cast<float>(high), open);
  if (view.dtype == Dtype::kFloat64) return all_inside(view, high, open);
  throw std::invalid_argument("[pointwise] rows: expected float32 or float64.");
}

}  // namespace

HOTLOOP_BIND(pointwise) {
  m.def("run", &run, py::arg("head"), py::arg("n"), py::arg("inputs"), py::arg("params"), py::arg("loss"),
        py::arg("grads"), py::arg("grad_scale"), py::arg("total"), py::arg("double_precision"),
        py::arg("weight") = py::none(), py::arg("groups") = py::none(), py::arg("outs") = false);
  m.def("heads", [] { return heads_by_room(pointwise::rooms()); });
  def(m, "within", &within, "rows high open");
  def(m, "are_marks", &are_marks, "rows");
}

}  // namespace hotloop::bind
