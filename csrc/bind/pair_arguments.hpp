// From the Python arguments of `pair_loop` to a PairCall, for the CPU and the CUDA module alike.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/array.hpp"
#include "preference/pair.hpp"

namespace hotloop::bind {

// inputs: arrays of shape (n,) or (1,), or plain numbers, in the order of the head. grads: arrays
// (n,) or None, one per differentiable input. loss: array (n,) or None. Owns what the call points
// to: keep it alive, and in place, until the call has been made.
class PairArguments {
 public:
  static constexpr const char* kOp = "pair_loop";

  PairArguments(const std::string& head, std::int64_t n, const py::list& inputs, const std::vector<double>& params,
                const py::object& loss, const py::list& grads, double grad_scale, bool double_precision,
                std::int32_t device)
      : device_(device) {
    call.head = find_head(head);
    const preference::HeadInfo& info = preference::head_table(preference::PairHeads{})[call.head];
    if (static_cast<int>(inputs.size()) != info.grads + info.constants ||
        static_cast<int>(grads.size()) != info.grads || static_cast<int>(params.size()) != info.params) {
      throw std::invalid_argument("[pair_loop] " + head + ": wrong number of inputs, gradients or parameters.");
    }
    call.n = n;
    arrays_.reserve(inputs.size() + grads.size() + 1);
    for (std::size_t k = 0; k < inputs.size(); ++k) call.inputs[k] = input(inputs[k], k);
    for (std::size_t k = 0; k < grads.size(); ++k) call.grads[k] = output(grads[k]);
    call.loss = output(loss);
    for (std::size_t k = 0; k < params.size(); ++k) call.params[k] = params[k];
    call.grad_scale = grad_scale;
    call.double_precision = double_precision;
  }
  PairArguments(const PairArguments&) = delete;
  PairArguments& operator=(const PairArguments&) = delete;

  preference::PairCall call;
  // Inputs that are plain numbers: their column points to host memory, whatever the device of the
  // arrays.
  std::array<bool, preference::kMaxHeadInputs> is_number{};

 private:
  static int find_head(const std::string& name) {
    const preference::HeadInfo* table = preference::head_table(preference::PairHeads{});
    for (int i = 0; i < preference::PairHeads::kSize; ++i) {
      if (name == table[i].name) return i;
    }
    throw std::invalid_argument("[pair_loop] head: got " + name + ", which is not compiled in.");
  }

  preference::InputColumn input(const py::object& item, std::size_t k) {
    if (PyFloat_Check(item.ptr()) || PyLong_Check(item.ptr())) {
      is_number[k] = true;
      numbers_[k] = item.cast<double>();
      return {&numbers_[k], Dtype::kFloat64, 0};
    }
    const View& view = arrays_.emplace_back(item, kOp, "inputs", device_).view;
    check_view(view, kOp, "inputs", 1, false);
    if (view.shape[0] != call.n && view.shape[0] != 1) {
      throw std::invalid_argument("[pair_loop] inputs: expected shape (" + std::to_string(call.n) + ",), got " +
                                  view.shape_text() + ".");
    }
    if (view.dtype > Dtype::kBFloat16) throw std::invalid_argument("[pair_loop] inputs: expected a float dtype.");
    return {view.data, view.dtype, view.shape[0] == 1 && call.n != 1 ? 0 : view.stride[0]};
  }

  preference::OutputColumn output(const py::object& item) {
    if (item.is_none()) return {nullptr, Dtype::kFloat32, 0};
    const View& view = arrays_.emplace_back(item, kOp, "outputs", device_).view;
    check_view(view, kOp, "outputs", 1, true);
    if (view.shape[0] != call.n || view.dtype > Dtype::kBFloat16) {
      throw std::invalid_argument("[pair_loop] outputs: expected a float array of n rows.");
    }
    return {view.data, view.dtype, view.stride[0]};
  }

  std::int32_t device_;
  std::vector<Array> arrays_;
  std::array<double, preference::kMaxHeadInputs> numbers_{};
};

// Name -> (differentiable inputs, constants of the row, parameters) of every head compiled in.
inline py::dict pair_heads() {
  py::dict heads;
  const preference::HeadInfo* table = preference::head_table(preference::PairHeads{});
  for (int i = 0; i < preference::PairHeads::kSize; ++i) {
    heads[table[i].name] = py::make_tuple(table[i].grads, table[i].constants, table[i].params);
  }
  return heads;
}

}  // namespace hotloop::bind
