// SPDX-License-Identifier: Apache-2.0
// The bindings of the searches: a step of beam search, of two tree searches and of backtracking, and nearest codes.
// State comes in as tuples of arrays and is written either to arrays of the same shapes (beams, backtracking) or in
// place (trees).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/arguments.hpp"
#include "bind/register.hpp"
#include "decode/search/calls.hpp"

namespace hotloop::bind {

namespace {

using namespace hotloop::decode;

// The arrays of a batch of trees: (trees, nodes), any strides, the shape of the first one, one of two types.
class Trees {
 public:
  Trees(const char* op, const py::tuple& arrays) : op_(op), arrays_(arrays) { kept_.reserve(arrays.size()); }

  View grid(std::size_t at, const char* name, bool real, bool writable) {
    const View& view = kept_.emplace_back(py::object(arrays_[at]), op_, name).view;
    check_view(view, op_, name, 2, writable);
    if (view.shape != kept_.front().view.shape) throw_shape_mismatch(kept_.front().view, view, op_, name);
    const bool fits = real ? view.dtype == Dtype::kFloat32 || view.dtype == Dtype::kFloat64
                           : view.dtype == Dtype::kInt32 || view.dtype == Dtype::kInt64;
    if (!fits) {
      throw std::invalid_argument(std::string("[") + op_ + "] " + name + ": got " + dtype_name(view.dtype) + ".");
    }
    return view;
  }
  View integers(std::size_t at, const char* name, bool writable) { return grid(at, name, false, writable); }
  View reals(std::size_t at, const char* name, bool writable) { return grid(at, name, true, writable); }

 private:
  const char* op_;
  const py::tuple& arrays_;
  std::vector<Array> kept_;
};

BeamArrays beams(Arguments& a, const py::tuple& t, std::int64_t batch, std::int64_t width, std::int64_t length,
                 bool writable) {
  return {a.array<double>(t[0], "scores", {batch, width}, writable),
          a.array<std::int64_t>(t[1], "token_ids", {batch, width, length}, writable),
          a.array<double>(t[2], "finished_scores", {batch, width}, writable),
          a.array<std::int64_t>(t[3], "finished_token_ids", {batch, width, length}, writable),
          a.array<std::int64_t>(t[4], "finished_lengths", {batch, width}, writable),
          a.array<std::uint8_t>(t[5], "done", {batch}, writable)};
}

// before, after: (scores, token_ids, finished_scores, finished_token_ids, finished_lengths, done).
void run_beam_step(std::int64_t width, std::int64_t length, const py::object& logits, const py::object& ref_logits,
                   std::vector<std::int64_t> eos, const py::tuple& before, const py::tuple& after,
                   const py::object& beam_indices, const py::object& next_ids) {
  Arguments a("likelihood_beam_search", 16);
  BeamCall call{};
  call.logits = a.rows(logits, "logits");
  if (call.logits.rank != 3 || call.logits.shape[1] > width) {
    a.fail("logits", "wrong shape " + call.logits.shape_text());
  }
  if (!ref_logits.is_none()) {
    call.ref_logits = a.rows(ref_logits, "ref_logits");
    if (call.ref_logits.shape != call.logits.shape || call.ref_logits.dtype != call.logits.dtype) {
      a.fail("ref_logits", "expected the shape and dtype of logits");
    }
  }
  call.eos = std::move(eos);
  for (const std::int64_t id : call.eos) {
    if (id < 0 || id >= call.logits.shape[2]) a.fail("eos_token_ids", "expected ids inside the vocabulary");
  }
  call.batch = call.logits.shape[0];
  call.width = width;
  call.length = length;
  call.before = beams(a, before, call.batch, width, length, false);
  call.after = beams(a, after, call.batch, width, length + 1, true);
  call.beam_indices = a.array<std::int64_t>(beam_indices, "beam_indices", {call.batch, width});
  call.next_ids = a.array<std::int64_t>(next_ids, "next_token_ids", {call.batch, width});
  py::gil_scoped_release release;
  beam_step(call);
}

// nodes: (leaves, roots, starts), each (trees,) or None. outputs: (nodes, depths, ...).
WalkCall walk_of(Arguments& a, Trees& arrays, const py::tuple& nodes, std::int64_t max_depth,
                 const py::tuple& outputs) {
  WalkCall walk{};
  walk.parents = arrays.integers(0, "parents", false);
  const std::int64_t trees = walk.parents.shape[0];
  walk.leaves = a.array<const std::int64_t>(nodes[0], "leaves", {trees});
  walk.roots = a.array<const std::int64_t>(nodes[1], "roots", {trees});
  walk.starts = a.array<const std::int64_t>(nodes[2], "starts", {trees});
  walk.max_depth = max_depth;
  walk.found = a.array<std::int64_t>(outputs[0], "nodes", {trees});
  walk.depths = a.array<std::int64_t>(outputs[1], "depths", {trees});
  return walk;
}

// tree: (parents, values, visits). numbers: c, alpha, unvisited_bonus, end_gate. seed: None for the lowest index.
void run_star_step(const py::tuple& tree, const py::tuple& nodes, const py::object& rollouts, std::int64_t max_depth,
                   const std::array<double, 4>& numbers, const py::object& seed, std::uint64_t offset,
                   const py::tuple& outputs) {
  Arguments a("mcts_star_step", 7);
  Trees arrays("mcts_star_step", tree);
  StarCall call{};
  call.walk = walk_of(a, arrays, nodes, max_depth, outputs);
  const std::int64_t trees = call.walk.parents.shape[0];
  call.values = arrays.reals(1, "values", true);
  call.visits = arrays.integers(2, "visits", true);
  call.rollouts = a.array<const double>(rollouts, "rollout_values", {trees});
  call.c = numbers[0];
  call.alpha = numbers[1];
  call.unvisited_bonus = numbers[2];
  call.end_gate = numbers[3];
  call.random = !seed.is_none();
  call.seed = call.random ? seed.cast<std::uint64_t>() : 0;
  call.offset = offset;
  call.ended = a.array<std::uint8_t>(outputs[2], "ended", {trees});
  py::gil_scoped_release release;
  star_step(call);
}

// tree: (parents, q, v, visits, values, logps, lengths). numbers: c_puct, gamma, length_penalty.
void run_puct_step(const py::tuple& tree, const py::tuple& nodes, std::int64_t max_depth,
                   const std::array<double, 3>& numbers, const py::tuple& outputs) {
  Arguments a("puct_select_backup", 5);
  Trees arrays("puct_select_backup", tree);
  PuctCall call{};
  call.walk = walk_of(a, arrays, nodes, max_depth, outputs);
  call.q = arrays.reals(1, "q", true);
  call.v = arrays.reals(2, "v", true);
  call.visits = arrays.integers(3, "visits", true);
  call.values = arrays.reals(4, "values", false);
  call.logps = arrays.reals(5, "logps", false);
  call.lengths = arrays.integers(6, "lengths", false);
  call.c_puct = numbers[0];
  call.gamma = numbers[1];
  call.length_penalty = numbers[2];
  py::gil_scoped_release release;
  puct_step(call);
}

// before, after: (local_attempts, total_attempts, temperatures, correcting, done). lengths: (chunk, prefix, sentence).
// numbers: tau, temperature, temperature_step, temperature_rise. limits: local, total. outputs: (actions, kept,
// flagged).
void run_backtrack(std::int64_t batch, std::int64_t phrases, const py::object& p_unconfident,
                   const py::object& span_ends, const py::tuple& lengths, const py::tuple& before,
                   const std::array<double, 4>& numbers, const std::array<std::int64_t, 2>& limits,
                   const py::tuple& after, const py::tuple& outputs) {
  Arguments a("retrospective_backtrack", 20);
  BacktrackCall call{};
  call.batch = batch;
  call.phrases = phrases;
  call.p_unconfident = a.array<const double>(p_unconfident, "p_unconfident", {batch, phrases});
  call.span_ends = a.array<const std::int64_t>(span_ends, "span_ends", {batch, phrases});
  call.chunk_lengths = a.array<const std::int64_t>(lengths[0], "chunk_lengths", {batch});
  call.prefix_lengths = a.array<const std::int64_t>(lengths[1], "prefix_lengths", {batch});
  call.sentence_lengths = a.array<const std::int64_t>(lengths[2], "sentence_lengths", {batch});
  call.tau = numbers[0];
  call.temperature = numbers[1];
  call.temperature_step = numbers[2];
  call.temperature_rise = numbers[3];
  call.max_local_attempts = limits[0];
  call.max_total_attempts = limits[1];
  const auto state = [&](const py::tuple& t, bool writable) -> BacktrackState {
    return {a.array<std::int64_t>(t[0], "local_attempts", {batch}, writable),
            a.array<std::int64_t>(t[1], "total_attempts", {batch}, writable),
            a.array<double>(t[2], "temperatures", {batch}, writable),
            a.array<std::uint8_t>(t[3], "correcting", {batch}, writable),
            a.array<std::uint8_t>(t[4], "done", {batch}, writable)};
  };
  call.before = state(before, false);
  call.after = state(after, true);
  call.actions = a.array<std::int64_t>(outputs[0], "actions", {batch});
  call.kept_lengths = a.array<std::int64_t>(outputs[1], "kept_lengths", {batch});
  call.flagged = a.array<std::int64_t>(outputs[2], "flagged", {batch});
  py::gil_scoped_release release;
  backtrack(call);
}

// errors: (relative to the norms, absolute) of a product.
void run_nearest_codes(const py::object& products, const py::object& codebook, const py::object& squares,
                       std::int64_t first, const std::array<double, 2>& errors, const py::object& out) {
  Arguments a("vq_neighbor_table", 5);
  NeighborCall call{};
  call.products = a.tile(products, "products", false);
  const View& codes = a.tile(codebook, "codebook", false);
  if (call.products.dtype != Dtype::kFloat64) a.fail("products", "expected float64");
  call.rows = call.products.shape[0];
  call.codes = call.products.shape[1];
  call.dim = codes.shape[1];
  call.first = first;
  call.codebook = a.array<const double>(codebook, "codebook", {call.codes, call.dim});
  call.squares = a.array<const double>(squares, "squares", {call.codes});
  const View& table = a.tile(out, "out", true);
  call.k = table.shape[1];
  call.out = static_cast<std::int32_t*>(table.data);
  call.out_stride = table.stride[0];
  if (table.dtype != Dtype::kInt32 || table.shape[0] != call.rows || call.k < 1 || call.k >= call.codes ||
      call.codes > INT32_MAX || first < 0 || first + call.rows > call.codes) {
    a.fail("out", "wrong shape " + table.shape_text());
  }
  call.product_error = errors[0];
  call.tiny = errors[1];
  py::gil_scoped_release release;
  nearest_codes(call);
}

}  // namespace

HOTLOOP_BIND(decode) {
  def(m, "beam_step", &run_beam_step, "width length logits ref_logits eos before after beam_indices next_ids");
  def(m, "star_step", &run_star_step, "tree nodes rollouts max_depth numbers seed offset outputs");
  def(m, "puct_step", &run_puct_step, "tree nodes max_depth numbers outputs");
  def(m, "backtrack", &run_backtrack,
      "batch phrases p_unconfident span_ends lengths before numbers limits after outputs");
  def(m, "nearest_codes", &run_nearest_codes, "products codebook squares first errors out");
}

}  // namespace hotloop::bind
