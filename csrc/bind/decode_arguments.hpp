// Arguments that the CPU and the CUDA bindings of the decode room both take from Python: laws, seeds, numbers per
// request, and the rows of an array.
#pragma once

#include <pybind11/pybind11.h>

#include "bind/arguments.hpp"
#include "decode/loops.hpp"

namespace hotloop::bind {

// A number, or an array (batch,) of the dtype.
template <class T>
decode::PerRequest<T> per_request(Arguments& a, const py::object& value, const char* name, std::int64_t batch) {
  if (py::isinstance<py::int_>(value) || py::isinstance<py::float_>(value)) return {nullptr, value.cast<T>()};
  return {static_cast<const T*>(a.dense(value, name, DtypeOf<T>::value, {batch}, false).data), T{}};
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
    law.bias_ids =
        static_cast<const std::int64_t*>(a.dense(bias_ids, "bias_ids", Dtype::kInt64, {batch, law.biases}, false).data);
    law.bias = static_cast<const float*>(a.dense(packed[10], "bias", Dtype::kFloat32, {batch, law.biases}, false).data);
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

template <class T>
T* output(Arguments& a, const py::object& object, const char* name, std::vector<std::int64_t> shape) {
  return static_cast<T*>(a.dense(object, name, DtypeOf<T>::value, std::move(shape), true).data);
}

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
  call.accepted = output<std::int64_t>(a, outputs[1], "num_accepted", {batch});
  call.logps = output<float>(a, outputs[2], "logprobs", {batch, out_width});
  call.rows_read = output<std::int64_t>(a, outputs[3], "rows_read", {batch});
}

inline void tree_arguments(Arguments& a, decode::TreeCall& call, std::int64_t batch, std::int64_t width,
                           std::int64_t depth, const py::object& ids, const py::object& parents,
                           const py::tuple& target, const py::object& draft, bool replacement,
                           const py::object& lengths, const py::object& seed, const py::object& offset,
                           const py::tuple& outputs, const py::object& nodes) {
  if (depth < 0 || depth > width) a.fail("max_depth", "expected 0 to the number of nodes");
  verify_arguments(a, call, ids, batch, width, depth + 1, target, draft, width + 1, lengths, seed, offset, outputs);
  call.parents =
      static_cast<const std::int64_t*>(a.dense(parents, "parents", Dtype::kInt64, {batch, width}, false).data);
  call.depth = depth;
  call.replacement = replacement;
  call.nodes = output<std::int64_t>(a, nodes, "accepted_nodes", {batch, depth});
}

inline void sample_arguments(Arguments& a, decode::SampleCall& call, std::int64_t batch, std::int64_t rows,
                             const py::tuple& law, const py::object& seed, const py::object& offset,
                             const py::object& ids, const py::object& logps) {
  call.batch = batch;
  call.rows = rows;
  call.law = law_of(a, law, "law", batch, rows);
  call.seeds = seeds_of(a, seed, offset, batch);
  call.output = output<std::int64_t>(a, ids, "token_ids", {batch, rows});
  call.logps = output<float>(a, logps, "logprobs", {batch, rows});
}

}  // namespace hotloop::bind
