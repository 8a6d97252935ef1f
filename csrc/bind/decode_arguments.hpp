// SPDX-License-Identifier: Apache-2.0
// Arguments that the CPU and the CUDA bindings of the decode room both take from Python: laws, seeds, numbers per
// request, and the rows of an array.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bind/arguments.hpp"
#include "bind/register.hpp"
#include "decode/loops.hpp"

namespace hotloop::bind {

// A number, or an array (batch,) of the dtype.
template <class T>
decode::PerRequest<T> per_request(Arguments& a, const py::object& value, const char* name, std::int64_t batch) {
  if (py::isinstance<py::int_>(value) || py::isinstance<py::float_>(value)) return {nullptr, value.cast<T>()};
  return {a.array<const T>(value, name, {batch}), T{}};
}
// Seeds use all 64 bits: as a number they come without a sign, in arrays as the same bits with one.
inline decode::PerRequest<std::int64_t> seed_of(Arguments& a, const py::object& value, std::int64_t batch) {
  if (py::isinstance<py::int_>(value)) return {nullptr, static_cast<std::int64_t>(value.cast<std::uint64_t>())};
  return per_request<std::int64_t>(a, value, "seed", batch);
}
inline decode::Seeds seeds_of(Arguments& a, const py::object& seed, const py::object& offset, std::int64_t batch) {
  return {seed_of(a, seed, batch), per_request<std::int64_t>(a, offset, "offset", batch),
          py::isinstance<py::int_>(seed)};
}

// The rows of a (B, V), (B, R, V) or (B, P, R, V) array.
inline decode::RowTable table_of(const View& view) {
  decode::RowTable table{view.data, view.dtype, view.stride[0], 0, 0, 1};
  if (view.rank >= 3) {
    table.inner = view.shape[static_cast<std::size_t>(view.rank - 2)];
    table.inner_stride = view.stride[static_cast<std::size_t>(view.rank - 2)];
    if (table.inner < 1) table.inner = 1;
  }
  if (view.rank == 4) table.outer_stride = view.stride[1];
  return table;
}

// `packed`: hotloop.decode.law.pack(law). Rows of a request: at least `least_rows`.
inline decode::LawTable law_of(Arguments& a, const py::tuple& packed, const char* name, std::int64_t batch,
                               std::int64_t least_rows) {
  const py::object values = packed[0];
  decode::LawTable law;
  const View& view = a.rows(values, name);
  const auto rank = static_cast<std::size_t>(view.rank);
  std::int64_t rows = 1;
  for (std::size_t i = 1; i + 1 < rank; ++i) rows *= view.shape[i];
  if (view.shape[0] != batch || rows < least_rows || view.shape[rank - 1] < 1 ||
      view.shape[rank - 1] > decode::kMaxVocabulary) {
    a.fail(name, "wrong shape " + view.shape_text());
  }
  dispatch_float(view.dtype, "decode", name, [](auto) {});
  law.rows = table_of(view);
  law.vocabulary = view.shape[rank - 1];
  law.logits = packed[1].cast<bool>();
  law.temperature = per_request<double>(a, packed[2], "temperature", batch);
  law.top_k = per_request<std::int64_t>(a, packed[3], "top_k", batch);
  law.top_p = per_request<double>(a, packed[4], "top_p", batch);
  law.min_p = per_request<double>(a, packed[5], "min_p", batch);
  law.joint = packed[6].cast<bool>();
  const py::object reference = packed[7];
  if (!reference.is_none()) {
    const View& second = a.rows(reference, "reference");
    if (second.dtype != view.dtype || second.shape != view.shape)
      a.fail("reference", "expected the shape and dtype of values");
    law.reference = table_of(second);
  }
  law.mixture = packed[8].cast<double>();
  const py::object bias_ids = packed[9];
  if (!bias_ids.is_none()) {
    const View& ids = a.rows(bias_ids, "bias_ids");
    if (ids.rank != 2) a.fail("bias_ids", "wrong shape " + ids.shape_text());
    law.biases = ids.shape[1];
    law.bias_ids = a.array<const std::int64_t>(bias_ids, "bias_ids", {batch, law.biases});
    law.bias = a.array<const float>(packed[10], "bias", {batch, law.biases});
  }
  return law;
}

// Token ids (batch, width), int32 or int64.
inline decode::Ids ids_of(Arguments& a, const py::object& object, const char* name, std::int64_t batch,
                          std::int64_t width) {
  const View& view = a.rows(object, name);
  if (view.rank != 2 || view.shape[0] != batch || view.shape[1] < width)
    a.fail(name, "wrong shape " + view.shape_text());
  if (view.dtype != Dtype::kInt32 && view.dtype != Dtype::kInt64) a.fail(name, "expected int32 or int64");
  return {view.data, view.dtype, view.stride[0]};
}

// Arrays of a call at most: two laws of eight, ids, lengths, seeds, outputs.
inline constexpr std::size_t kMostArrays = 32;

// What chain, block, tree and LANTERN verification have in common. outputs: (ids, accepted, logps, rows_read).
inline void verify_arguments(Arguments& a, decode::VerifyCall& call, const py::object& ids, std::int64_t batch,
                             std::int64_t width, std::int64_t out_width, const py::tuple& target,
                             const py::object& draft, std::int64_t draft_rows, const py::object& lengths,
                             const py::object& seed, const py::object& offset, const py::tuple& outputs) {
  call.batch = batch;
  call.width = width;
  call.ids = ids_of(a, ids, "draft_token_ids", batch, width);
  call.target = law_of(a, target, "target_probs", batch, width + 1);
  if (!draft.is_none()) {
    call.has_draft = true;
    call.draft = law_of(a, draft.cast<py::tuple>(), "draft_probs", batch, draft_rows);
    if (call.draft.vocabulary != call.target.vocabulary)
      a.fail("draft_probs", "expected the vocabulary of target_probs");
  }
  call.lengths = per_request<std::int64_t>(a, lengths, "num_draft_tokens", batch);
  call.seeds = seeds_of(a, seed, offset, batch);
  call.output = a.dense(outputs[0], "output_token_ids", call.ids.dtype, {batch, out_width}, true).data;
  call.accepted = a.array<std::int64_t>(outputs[1], "num_accepted", {batch});
  call.logps = a.array<float>(outputs[2], "logprobs", {batch, out_width});
  call.rows_read = a.array<std::int64_t>(outputs[3], "rows_read", {batch});
}

inline void rows_arguments(Arguments& a, decode::RowsCall& call, std::int64_t batch, std::int64_t rows,
                           const py::tuple& law, const char* name = "law") {
  call.batch = batch;
  call.rows = rows;
  call.law = law_of(a, law, name, batch, rows);
}

// The loops of both modules. `Device` says where arrays lie (kDevice) and how a call with its arrays runs, which may
// need further arguments of the caller: run(a, call, block or not), run(a, call).
template <class Device, class... More>
struct DecodeLoops {
  static auto chain(bool whole_block, std::int64_t batch, std::int64_t width, const py::object& ids,
                    const py::tuple& target, const py::object& draft, const py::object& lengths, const py::object& seed,
                    const py::object& offset, const py::tuple& outputs, More... more) {
    Arguments a(whole_block ? "block_speculative_sampling" : "chain_speculative_sampling", kMostArrays,
                Device::kDevice);
    decode::VerifyCall call;
    verify_arguments(a, call, ids, batch, width, width + 1, target, draft, width, lengths, seed, offset, outputs);
    return Device::verify(a, call, whole_block ? Device::block : Device::chain, more...);
  }

  static auto tree(std::int64_t batch, std::int64_t width, std::int64_t depth, const py::object& ids,
                   const py::object& parents, const py::tuple& target, const py::object& draft, bool replacement,
                   const py::object& lengths, const py::object& seed, const py::object& offset,
                   const py::tuple& outputs, const py::object& nodes, More... more) {
    Arguments a("tree_speculative_verify", kMostArrays, Device::kDevice);
    if (depth < 0 || depth > width) a.fail("max_depth", "expected 0 to the number of nodes");
    decode::TreeCall call;
    verify_arguments(a, call, ids, batch, width, depth + 1, target, draft, width + 1, lengths, seed, offset, outputs);
    call.parents = a.array<const std::int64_t>(parents, "parents", {batch, width});
    call.depth = depth;
    call.replacement = replacement;
    call.nodes = a.array<std::int64_t>(nodes, "accepted_nodes", {batch, depth});
    return Device::verify(a, call, Device::tree, more...);
  }

  static auto sample(std::int64_t batch, std::int64_t rows, const py::tuple& law, const py::object& seed,
                     const py::object& offset, const py::object& ids, const py::object& logps, More... more) {
    Arguments a("sample", kMostArrays, Device::kDevice);
    decode::SampleCall call;
    rows_arguments(a, call, batch, rows, law);
    call.seeds = seeds_of(a, seed, offset, batch);
    call.output = a.array<std::int64_t>(ids, "token_ids", {batch, rows});
    call.logps = a.array<float>(logps, "logprobs", {batch, rows});
    return Device::sample(a, call, more...);
  }

  static void define(py::module_& m, const std::string& more) {
    def(m, "chain", &chain, "whole_block batch width ids target draft lengths seed offset outputs " + more);
    def(m, "tree", &tree,
        "batch width depth ids parents target draft replacement lengths seed offset outputs nodes " + more);
    def(m, "sample", &sample, "batch rows law seed offset ids logps " + more);
  }
};

}  // namespace hotloop::bind
