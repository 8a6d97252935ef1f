// SPDX-License-Identifier: Apache-2.0
// From the Python arguments of the router to its calls, for the CPU and the CUDA module alike.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>

#include "bind/arguments.hpp"
#include "moe/route.hpp"

namespace hotloop::bind {

class RouteArguments : public Arguments {
 public:
  static constexpr std::size_t kMostArrays = 16;
  explicit RouteArguments(const char* op, std::int32_t device = dlpack::kCpu) : Arguments(op, kMostArrays, device) {}

  moe::Logits logits(const py::object& object, const py::object& mask, const py::object& offsets) {
    const View& view = tile(object, "router_logits", false);
    if (view.dtype > Dtype::kBFloat16) fail("router_logits", "expected a float dtype");
    moe::Logits x;
    x.data = view.data;
    x.dtype = view.dtype;
    x.tokens = view.shape[0];
    x.experts = view.shape[1];
    x.row_stride = view.stride[0];
    if (x.experts < 1 || x.experts > moe::kMostExperts) fail("router_logits", "expected 1 to 4096 experts");
    x.mask = array<const std::uint8_t>(mask, "mask", {x.tokens});
    if (!offsets.is_none()) {
      const View& cuts = any(offsets, "offsets");
      if (cuts.rank != 1 || cuts.shape[0] < 1) fail("offsets", "expected one dimension");
      x.sequences = cuts.shape[0] - 1;
      x.offsets = array<const std::int64_t>(offsets, "offsets", {cuts.shape[0]});
    }
    return x;
  }

  // (top_k, sigmoid, late, renormalize, groups, open_groups, group_max, scale)
  moe::Selection selection(const py::tuple& given, const moe::Logits& x) {
    if (given.size() != 8) fail("selection", "expected 8 options");
    moe::Selection s;
    s.top_k = given[0].cast<std::int64_t>();
    s.sigmoid = given[1].cast<bool>();
    s.late = given[2].cast<bool>();
    s.renormalize = given[3].cast<bool>();
    s.groups = given[4].cast<std::int64_t>();
    s.open_groups = given[5].cast<std::int64_t>();
    s.group_max = given[6].cast<bool>();
    s.scale = given[7].cast<double>();
    const bool grouped = s.groups >= 1 && x.experts % s.groups == 0 && s.open_groups >= 1 && s.open_groups <= s.groups;
    if (!grouped) fail("selection", "expected groups that divide the experts");
    const std::int64_t most = std::min(moe::kMostChoices, x.experts / s.groups * s.open_groups);
    if (s.top_k < 1 || s.top_k > most) fail("selection", "expected top_k between 1 and the open experts");
    return s;
  }

  // A contiguous array of the type that a router computes in; nullptr for None.
  void* real(const py::object& object, const char* name, const moe::Logits& x, std::vector<std::int64_t> shape,
             bool writable) {
    const Dtype dtype = x.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    return dense(object, name, dtype, std::move(shape), writable).data;
  }

  moe::RouteCall route(const py::object& object, const py::tuple& given, const py::object& bias, const py::object& mask,
                       const py::object& offsets, const py::object& ids, const py::object& weights,
                       const py::object& counts, const py::object& prob_sums, const py::object& logsumexp,
                       const py::object& num_tokens, const py::object& slot_of_row, const py::object& row_of_slot,
                       const py::object& expert_offsets) {
    moe::RouteCall call;
    moe::Logits& x = call.logits = logits(object, mask, offsets);
    call.selection = selection(given, x);
    const std::int64_t k = call.selection.top_k;
    call.bias = real(bias, "bias", x, {x.experts}, false);
    call.selection.biased = call.bias != nullptr;
    call.ids = array<std::int64_t>(ids, "ids", {x.tokens, k});
    call.weights = real(weights, "weights", x, {x.tokens, k}, true);
    call.counts = array<std::int64_t>(counts, "counts", {x.sequences, x.experts});
    call.prob_sums = real(prob_sums, "prob_sums", x, {x.sequences, x.experts}, true);
    call.logsumexp = real(logsumexp, "logsumexp", x, {x.tokens}, true);
    call.num_tokens = array<std::int64_t>(num_tokens, "num_tokens", {x.sequences});
    call.slot_of_row = array<std::int64_t>(slot_of_row, "slot_of_row", {x.tokens * k});
    call.row_of_slot = array<std::int64_t>(row_of_slot, "row_of_slot", {x.tokens * k});
    call.expert_offsets = array<std::int64_t>(expert_offsets, "expert_offsets", {x.experts + 1});
    if (!expert_offsets.is_none() && x.sequences != 1) fail("expert_offsets", "expected one sequence");
    if (slot_of_row.is_none() != expert_offsets.is_none() || row_of_slot.is_none() != expert_offsets.is_none()) {
      fail("expert_offsets", "expected all of the order or none of it");
    }
    call.ordered = !expert_offsets.is_none();
    return call;
  }

  // ids and offsets are those of a `route` that returned -1.
  moe::RouteBackwardCall backward(const py::object& object, const py::tuple& given, bool biased, const py::object& mask,
                                  const py::object& offsets, const py::object& ids, const py::object& d_weights,
                                  const py::object& d_prob_sums, const py::object& d_logsumexp,
                                  const py::object& result) {
    moe::RouteBackwardCall call;
    moe::Logits& x = call.logits = logits(object, mask, offsets);
    call.selection = selection(given, x);
    call.selection.biased = biased;
    const std::int64_t k = call.selection.top_k;
    call.ids = array<const std::int64_t>(ids, "ids", {x.tokens, k});
    call.d_weights = real(d_weights, "d_weights", x, {x.tokens, k}, false);
    call.d_prob_sums = real(d_prob_sums, "d_prob_sums", x, {x.sequences, x.experts}, false);
    call.d_logsumexp = real(d_logsumexp, "d_logsumexp", x, {x.tokens}, false);
    call.result = dense(result, "result", x.dtype, {x.tokens, x.experts}, true).data;
    return call;
  }

  moe::DispatchCall dispatch(const py::object& ids, std::int64_t experts, std::int64_t capacity,
                             const py::object& weights, std::int64_t align, const py::object& slot_of_row,
                             const py::object& row_of_slot, const py::object& expert_offsets,
                             const py::object& expert_counts) {
    moe::DispatchCall call;
    const View& view = any(ids, "ids");
    if (view.rank != 1 || (view.shape[0] > 1 && view.stride[0] != 1)) fail("ids", "expected a contiguous array");
    if (view.dtype != Dtype::kInt32 && view.dtype != Dtype::kInt64) fail("ids", "expected int32 or int64");
    call.ids = view.data;
    call.ids_dtype = view.dtype;
    call.slots = view.shape[0];
    call.experts = experts;
    call.align = align;
    call.capacity = capacity;
    if (experts < 1 || align < 1) fail("num_experts", "expected at least 1");
    if (!weights.is_none()) {
      const View& given = any(weights, "weights");
      if (given.dtype > Dtype::kBFloat16) fail("weights", "expected a float dtype");
      call.weights_dtype = given.dtype;
      call.weights = dense(weights, "weights", given.dtype, {call.slots}, false).data;
      if (capacity < 0) fail("capacity", "expected a number beside weights");
    }
    call.rows = (call.slots + experts * (align - 1) + align - 1) / align * align;
    call.slot_of_row = array<std::int64_t>(slot_of_row, "slot_of_row", {call.rows});
    call.row_of_slot = array<std::int64_t>(row_of_slot, "row_of_slot", {call.slots});
    call.expert_offsets = array<std::int64_t>(expert_offsets, "expert_offsets", {experts + 1});
    call.expert_counts = array<std::int64_t>(expert_counts, "expert_counts", {experts});
    return call;
  }
};

}  // namespace hotloop::bind
