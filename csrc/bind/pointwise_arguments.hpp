// SPDX-License-Identifier: Apache-2.0
// From the Python arguments of `pointwise.run` to a Call, for the CPU and the CUDA module alike.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/array.hpp"
#include "core/pointwise.hpp"

namespace hotloop::bind {

// inputs: in the order of the head, arrays of shape (n,) or (1,), or plain numbers; group columns of shape (groups,).
// groups: rows per group, or offsets (groups + 1,), int32 or int64. weight: array (n,) or None. grads: arrays (n,) or
// None, one per differentiable input. loss: array (n,) or None. Owns what the call points to: keep it alive, and in
// place, until the call has been made.
class PointwiseArguments {
 public:
  static constexpr const char* kOp = "pointwise";

  PointwiseArguments(const pointwise::HeadInfo& info, std::int64_t n, const py::list& inputs,
                     const std::vector<double>& params, const py::object& loss, const py::list& grads,
                     double grad_scale, bool double_precision, const py::object& weight, const py::object& groups,
                     std::int32_t device)
      : device_(device) {
    const int plain = info.grads + info.rows;
    if (static_cast<int>(inputs.size()) != plain + info.groups || static_cast<int>(grads.size()) != info.grads ||
        static_cast<int>(params.size()) != info.params) {
      throw std::invalid_argument("[pointwise] " + std::string(info.name) +
                                  ": wrong number of inputs, gradients or parameters.");
    }
    call.n = n;
    arrays_.reserve(inputs.size() + grads.size() + 3);
    if (info.groups > 0) read_groups(groups);
    for (std::size_t k = 0; k < inputs.size(); ++k) {
      call.inputs[k] = input(inputs[k], k, static_cast<int>(k) < plain ? n : group_count_);
    }
    if (!weight.is_none()) {
      call.weight = input(weight, pointwise::kMaxInputs, n);
    }
    for (std::size_t k = 0; k < grads.size(); ++k) call.grads[k] = output(grads[k]);
    call.loss = output(loss);
    for (std::size_t k = 0; k < params.size(); ++k) call.params[k] = params[k];
    call.grad_scale = grad_scale;
    call.double_precision = double_precision;
  }
  PointwiseArguments(const PointwiseArguments&) = delete;
  PointwiseArguments& operator=(const PointwiseArguments&) = delete;

  pointwise::Call call;
  // Inputs that are plain numbers: their column points to host memory, whatever the device of the arrays.
  std::array<bool, pointwise::kMaxInputs + 1> is_number{};

 private:
  void read_groups(const py::object& groups) {
    if (PyLong_Check(groups.ptr())) {
      call.groups.rows = groups.cast<std::int64_t>();
      if (call.groups.rows < 1 || call.n % call.groups.rows != 0) {
        throw std::invalid_argument("[pointwise] groups: expected a divisor of " + std::to_string(call.n) +
                                    " rows, got " + std::to_string(call.groups.rows) + ".");
      }
      group_count_ = call.n / call.groups.rows;
      return;
    }
    const View& view = arrays_.emplace_back(groups, kOp, "groups", device_).view;
    check_view(view, kOp, "groups", 1, false);
    if ((view.dtype != Dtype::kInt32 && view.dtype != Dtype::kInt64) || view.shape[0] < 1 || view.stride[0] != 1) {
      throw std::invalid_argument("[pointwise] groups: expected contiguous int32 or int64 offsets.");
    }
    group_count_ = view.shape[0] - 1;
    call.groups = {1, view.data, view.dtype == Dtype::kInt64, group_count_};
  }

  pointwise::InputColumn input(const py::handle& item, std::size_t k, std::int64_t rows) {
    if (PyFloat_Check(item.ptr()) || PyLong_Check(item.ptr())) {
      is_number[k] = true;
      numbers_[k] = item.cast<double>();
      return {&numbers_[k], Dtype::kFloat64, 0};
    }
    const View& view = arrays_.emplace_back(py::reinterpret_borrow<py::object>(item), kOp, "inputs", device_).view;
    check_view(view, kOp, "inputs", 1, false);
    if (view.shape[0] != rows && view.shape[0] != 1) {
      throw std::invalid_argument("[pointwise] inputs: expected shape (" + std::to_string(rows) + ",), got " +
                                  view.shape_text() + ".");
    }
    if (view.dtype > Dtype::kBFloat16) throw std::invalid_argument("[pointwise] inputs: expected a float dtype.");
    return {view.data, view.dtype, view.shape[0] == 1 && rows != 1 ? 0 : view.stride[0]};
  }

  pointwise::OutputColumn output(const py::handle& item) {
    if (item.is_none()) return {nullptr, Dtype::kFloat32, 0};
    const View& view = arrays_.emplace_back(py::reinterpret_borrow<py::object>(item), kOp, "outputs", device_).view;
    check_view(view, kOp, "outputs", 1, true);
    if (view.shape[0] != call.n || view.dtype > Dtype::kBFloat16) {
      throw std::invalid_argument("[pointwise] outputs: expected a float array of n rows.");
    }
    return {view.data, view.dtype, view.stride[0]};
  }

  std::int32_t device_;
  std::int64_t group_count_ = 0;
  std::vector<Array> arrays_;
  std::array<double, pointwise::kMaxInputs + 1> numbers_{};
};

// Room -> head -> (handle, differentiable inputs, constants of the row, of the group, parameters, extra values).
inline py::dict heads_by_room(const std::vector<pointwise::RoomInfo>& rooms) {
  py::dict found;
  int first = 0;
  for (const pointwise::RoomInfo& room : rooms) {
    py::dict heads;
    int handle = first;
    for (const pointwise::HeadInfo& head : room.heads) {
      heads[head.name] = py::make_tuple(handle++, head.grads, head.rows, head.groups, head.params, head.outs);
    }
    found[room.name] = heads;
    first += pointwise::kRoomStride;
  }
  return found;
}

}  // namespace hotloop::bind
