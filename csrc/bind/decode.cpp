// SPDX-License-Identifier: Apache-2.0
// The bindings of the decode room: verification of drafts, sampling, probabilities and temperatures. Each function
// fills the call of its loop from checked arrays (decode_arguments.hpp) and runs the loop without the GIL. A loop over
// probabilities says which input held a number outside [0, 1]; Python then looks for the number and raises.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/arguments.hpp"
#include "bind/decode_arguments.hpp"
#include "bind/register.hpp"
#include "decode/loops.hpp"

namespace hotloop::bind {

namespace {

using namespace hotloop::decode;

// Runs a loop without the GIL. Returns whether it read a number that is no probability: 1 in the target, 2 in the
// draft, 0 where all were. Python then looks for it and raises.
template <class Loop>
int watched(LawTable& target, LawTable* draft, Loop&& loop) {
  std::uint8_t bad[2] = {};
  target.refused = &bad[0];
  if (draft != nullptr) draft->refused = &bad[1];
  py::gil_scoped_release release;
  loop();
  return bad[0] | bad[1] << 1;
}

struct Cpu {
  static constexpr std::int32_t kDevice = dlpack::kCpu;
  static constexpr auto chain = &decode::chain, block = &decode::block;
  static constexpr auto tree = &decode::tree;

  template <class Call>
  static int verify(Arguments&, Call& call, void (*loop)(const Call&)) {
    return watched(call.target, &call.draft, [&] { loop(call); });
  }
  static int sample(Arguments&, SampleCall& call) {
    return watched(call.law, nullptr, [&] { decode::sample(call); });
  }
};

int run_lantern(std::int64_t batch, std::int64_t width, const py::object& ids, const py::tuple& target,
                const py::object& draft, const py::object& neighbors, std::int64_t k, double delta,
                const py::object& lengths, const py::object& seed, const py::object& offset, const py::tuple& outputs,
                const py::object& moved) {
  Arguments a("lantern_relaxed_accept", kMostArrays);
  LanternCall call;
  verify_arguments(a, call, ids, batch, width, width + 1, target, draft, width, lengths, seed, offset, outputs);
  const View& table = a.rows(neighbors, "neighbors");
  if (table.rank != 2 || table.shape[0] < call.target.vocabulary || table.dtype != Dtype::kInt32) {
    a.fail("neighbors", "expected int32 of shape (V, columns), got " + table.shape_text());
  }
  call.neighbors = static_cast<const std::int32_t*>(table.data);
  call.columns = table.shape[1];
  call.neighbor_stride = table.stride[0];
  call.k = k < 0 ? 0 : k;
  call.delta = delta;
  call.moved = a.array<float>(moved, "relaxation", {batch, width});
  return watched(call.target, &call.draft, [&] { lantern(call); });
}

int run_paths(bool typical, std::int64_t batch, std::int64_t paths, std::int64_t width, const py::object& ids,
              const py::tuple& target, double epsilon, double alpha, double entropy_eps, const py::object& lengths,
              const py::object& seed, const py::object& offset, const py::tuple& outputs) {
  Arguments a(typical ? "typical_accept" : "greedy_speculative_accept", kMostArrays);
  PathsCall call;
  call.batch = batch;
  call.paths = paths;
  call.width = width;
  call.ids = a.array<const std::int64_t>(ids, "draft_token_ids", {batch, paths, width + 1});
  call.target = law_of(a, target, "target_logits", batch, paths * (width + 1));
  call.lengths = per_request<std::int64_t>(a, lengths, "num_draft_tokens", batch);
  call.seeds = seeds_of(a, seed, offset, batch);
  call.typical = typical;
  call.epsilon = epsilon;
  call.alpha = alpha;
  call.entropy_eps = entropy_eps;
  call.output = a.array<std::int64_t>(outputs[0], "output_token_ids", {batch, width + 1});
  call.best = a.array<std::int64_t>(outputs[1], "best_path", {batch});
  call.accepted = a.array<std::int64_t>(outputs[2], "num_accepted", {batch});
  call.rows_read = a.array<std::int64_t>(outputs[3], "rows_read", {batch});
  return watched(call.target, nullptr, [&] { decode::paths(call); });
}

int run_probs(std::int64_t batch, std::int64_t rows, const py::tuple& law, bool log, bool wide, const py::object& out) {
  Arguments a("law_probs", kMostArrays);
  ProbsCall call;
  rows_arguments(a, call, batch, rows, law);
  call.log = log;
  call.dtype = wide ? Dtype::kFloat64 : Dtype::kFloat32;
  call.output = a.dense(out, "out", call.dtype, {batch, rows, call.law.vocabulary}, true).data;
  return watched(call.law, nullptr, [&] { probs(call); });
}

int run_top(std::int64_t batch, std::int64_t rows, std::int64_t k, const py::tuple& law, const py::object& ids,
            const py::object& logps) {
  Arguments a("top_logprobs", kMostArrays);
  TopCall call;
  rows_arguments(a, call, batch, rows, law);
  call.k = k;
  call.output = a.array<std::int64_t>(ids, "token_ids", {batch, rows, k});
  call.logps = a.array<float>(logps, "logprobs", {batch, rows, k});
  return watched(call.law, nullptr, [&] { top(call); });
}

void run_logits(std::int64_t batch, const py::tuple& law, bool wide, const py::object& out) {
  Arguments a("value_augmented_logits", kMostArrays);
  ProbsCall call;
  rows_arguments(a, call, batch, 1, law, "logits");
  call.logits = true;
  call.dtype = wide ? Dtype::kFloat64 : Dtype::kFloat32;
  call.output = a.dense(out, "out", call.dtype, {batch, call.law.vocabulary}, true).data;
  py::gil_scoped_release release;
  probs(call);
}

void run_branch_reuse(std::int64_t batch, std::int64_t width, std::int64_t kappa, std::int64_t following,
                      const py::object& emitted, const py::object& accepted, const py::object& roots,
                      const py::object& branches, const py::object& reused, const py::object& branch,
                      const py::object& window) {
  Arguments a("mirror_sd_branch_reuse", kMostArrays);
  ReuseCall call;
  call.batch = batch;
  call.width = width;
  call.kappa = kappa;
  call.following = following;
  call.dtype = ids_of(a, emitted, "output_token_ids", batch, width).dtype;
  call.emitted = a.dense(emitted, "output_token_ids", call.dtype, {batch, width}, false).data;
  call.accepted = a.array<const std::int64_t>(accepted, "num_accepted", {batch});
  call.roots = a.dense(roots, "branch_root_ids", call.dtype, {batch, width, kappa}, false).data;
  call.branches = a.dense(branches, "branch_token_ids", call.dtype, {batch, width, kappa, following}, false).data;
  call.reused = a.array<std::uint8_t>(reused, "reused", {batch});
  call.branch = a.array<std::int64_t>(branch, "branch", {batch});
  call.window = a.dense(window, "next_token_ids", call.dtype, {batch, following}, true).data;
  py::gil_scoped_release release;
  branch_reuse(call);
}

// statistics: (median, std, maximum, minimum) of the log-entropy.
void run_temperatures(std::int64_t batch, std::int64_t rows, const py::tuple& law, const py::tuple& statistics,
                      double temperature, double tau, const py::object& out) {
  Arguments a("entropy_adaptive_temperature", kMostArrays);
  TemperatureCall call;
  rows_arguments(a, call, batch, rows, law, "logits");
  call.median = statistics[0].cast<double>();
  call.std = statistics[1].cast<double>();
  call.maximum = statistics[2].cast<double>();
  call.minimum = statistics[3].cast<double>();
  call.temperature = temperature;
  call.tau = tau;
  call.output = a.array<float>(out, "out", {batch, rows});
  py::gil_scoped_release release;
  temperatures(call);
}

}  // namespace

HOTLOOP_BIND(decode) {
  DecodeLoops<Cpu>::define(m, "");
  def(m, "lantern", &run_lantern, "batch width ids target draft neighbors k delta lengths seed offset outputs moved");
  def(m, "paths", &run_paths,
      "typical batch paths width ids target epsilon alpha entropy_eps lengths seed offset outputs");
  def(m, "probs", &run_probs, "batch rows law log wide out");
  def(m, "top", &run_top, "batch rows k law ids logps");
  def(m, "logits", &run_logits, "batch law wide out");
  def(m, "branch_reuse", &run_branch_reuse,
      "batch width kappa following emitted accepted roots branches reused branch window");
  def(m, "temperatures", &run_temperatures, "batch rows law statistics temperature tau out");
}

}  // namespace hotloop::bind
