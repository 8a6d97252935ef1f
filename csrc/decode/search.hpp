// Searching on top of a model: one step of a beam search, one step of two tree searches over batches of trees in flat
// arrays, the decision of a retrospective backtrack, and the neighbours of every code of a codebook.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "core/parallel.hpp"
#include "core/view.hpp"

namespace hotloop::decode {

// Beams. `width` slots each for live and for finished beams; a live slot of score -inf is empty. All arrays contiguous.
struct BeamArrays {
  double* scores;                  // (batch, width), live, largest first
  std::int64_t* token_ids;         // (batch, width, length), live
  double* finished_scores;         // (batch, width), largest first
  std::int64_t* finished_ids;      // (batch, width, length), -1 after the end
  std::int64_t* finished_lengths;  // (batch, width), -1 for an empty slot
  std::uint8_t* done;              // (batch,)
};
struct BeamCall {
  View logits;                    // (batch, rows, vocabulary), rows <= width, unit stride inside a row
  View ref_logits;                // the same shape and dtype, or no data
  std::vector<std::int64_t> eos;  // ids that end a beam, all different, each inside the vocabulary
  std::int64_t batch, width, length;
  BeamArrays before;           // read only, `length` tokens
  BeamArrays after;            // length + 1 tokens
  std::int64_t* beam_indices;  // (batch, width): where each live beam comes from
  std::int64_t* next_ids;      // (batch, width)
};
void beam_step(const BeamCall& call);

// Trees. Node 0 is the root; parents[i] < i, and -1 marks the root and slots not in use.
struct WalkCall {
  View parents;                // (trees, nodes), int64 or int32
  const std::int64_t* leaves;  // (trees,) node to back up from, -1 for none; null for none at all
  const std::int64_t* roots;   // (trees,) or null for node 0: where backing up ends and depth is counted from
  const std::int64_t* starts;  // (trees,) or null for the roots: where to descend from, -1 for not at all
  std::int64_t max_depth;      // < 0: no limit
  std::int64_t* found;         // (trees,) node the descent ended at, -1
  std::int64_t* depths;        // (trees,)
};
// A (trees, nodes) array of any strides, integer or real, read and written in its own type.
template <class Wide, class First, class Second>
struct Grid {
  explicit Grid(const View& view)
      : data(view.data), first(view.dtype == DtypeOf<First>::value), s0(view.stride[0]), s1(view.stride[1]) {}
  Wide get(std::int64_t b, std::int64_t i) const {
    const std::int64_t at = b * s0 + i * s1;
    return first ? static_cast<Wide>(static_cast<const First*>(data)[at])
                 : static_cast<Wide>(static_cast<const Second*>(data)[at]);
  }
  void set(std::int64_t b, std::int64_t i, Wide x) const {
    const std::int64_t at = b * s0 + i * s1;
    if (first) {
      static_cast<First*>(data)[at] = static_cast<First>(x);
    } else {
      static_cast<Second*>(data)[at] = static_cast<Second>(x);
    }
  }
  void* data;
  bool first;
  std::int64_t s0, s1;
};
using IntGrid = Grid<std::int64_t, std::int64_t, std::int32_t>;
using RealGrid = Grid<double, double, float>;

// Children of every node as linked lists, in the order of their indices: one pass over the parents.
class Children {
 public:
  void build(const IntGrid& parents, std::int64_t b, std::int64_t nodes) {
    parents_ = &parents;
    b_ = b;
    first_.assign(static_cast<std::size_t>(nodes), -1);
    next_.resize(static_cast<std::size_t>(nodes));
    for (std::int64_t i = nodes - 1; i >= 0; --i) {
      const std::int64_t p = parents.get(b, i);
      if (p < -1 || p >= i) throw std::invalid_argument("[tree] parents: expected earlier nodes.");
      if (p < 0) continue;
      next_[static_cast<std::size_t>(i)] = first_[static_cast<std::size_t>(p)];
      first_[static_cast<std::size_t>(p)] = i;
    }
  }
  std::int64_t first(std::int64_t node) const { return first_[static_cast<std::size_t>(node)]; }
  std::int64_t next(std::int64_t child) const { return next_[static_cast<std::size_t>(child)]; }
  std::int64_t parent(std::int64_t node) const { return parents_->get(b_, node); }

 private:
  const IntGrid* parents_ = nullptr;
  std::int64_t b_ = 0;
  std::vector<std::int64_t> first_, next_;
};

inline std::int64_t checked_node(const std::int64_t* nodes, std::int64_t b, std::int64_t fallback, std::int64_t count) {
  const std::int64_t node = nodes == nullptr ? fallback : nodes[b];
  if (node < -1 || node >= count) throw std::invalid_argument("[tree] expected a node of the tree.");
  return node;
}

// For every tree: backup(b, children, leaf, root), then down from the start by best(b, children, node, depth).
template <class Backup, class Best>
void walk(const WalkCall& call, Backup&& backup, Best&& best) {
  const std::int64_t trees = call.parents.shape[0], nodes = call.parents.shape[1];
  const IntGrid parents(call.parents);
  parallel_for(trees, 1 + 4096 / (nodes + 1), [&](std::int64_t begin, std::int64_t end) {
    Children children;
    for (std::int64_t b = begin; b < end; ++b) {
      call.found[b] = -1;
      call.depths[b] = 0;
      if (nodes == 0) continue;
      children.build(parents, b, nodes);
      const std::int64_t leaf = call.leaves == nullptr ? -1 : checked_node(call.leaves, b, -1, nodes);
      const std::int64_t root = std::max<std::int64_t>(checked_node(call.roots, b, 0, nodes), 0);
      std::int64_t node = checked_node(call.starts, b, root, nodes);
      if (leaf >= 0) backup(b, children, leaf, root);
      if (node < 0) continue;
      std::int64_t depth = 0;
      for (std::int64_t i = node; i != root && children.parent(i) >= 0; i = children.parent(i)) ++depth;
      while ((call.max_depth < 0 || depth < call.max_depth) && children.first(node) >= 0) {
        node = best(b, children, node, depth);
        ++depth;
      }
      call.found[b] = node;
      call.depths[b] = depth;
    }
  });
}

// What a child is chosen by: unvisited children come in a class of their own where they go first. NaN ranks lowest.
struct Rank {
  int unvisited;
  double score;
  bool operator<(const Rank& o) const { return std::tie(unvisited, score) < std::tie(o.unvisited, o.score); }
  bool operator==(const Rank& o) const { return unvisited == o.unvisited && score == o.score; }
};
inline double or_lowest(double score) { return score == score ? score : -std::numeric_limits<double>::infinity(); }

struct StarCall {
  WalkCall walk;
  View values, visits;     // (trees, nodes)
  const double* rollouts;  // (trees,), NaN for none; null for none at all
  double c, alpha, unvisited_bonus, end_gate;
  bool random;
  std::uint64_t seed, offset;
  std::uint8_t* ended;  // (trees,)
};
void star_step(const StarCall& call);

struct PuctCall {
  WalkCall walk;
  View q, v, visits, values, logps, lengths;  // (trees, nodes)
  double c_puct, gamma, length_penalty;
};
void puct_step(const PuctCall& call);

// What becomes of a chunk of generated text (see hotloop.decode.retrospective_backtrack).
enum BacktrackAction : std::int64_t { kNone = -1, kAccept = 0, kContinue = 1, kResample = 2, kCut = 3, kStop = 4 };
struct BacktrackState {
  std::int64_t* local_attempts;  // (batch,) each
  std::int64_t* total_attempts;
  double* temperatures;
  std::uint8_t* correcting;
  std::uint8_t* done;
};
struct BacktrackCall {
  std::int64_t batch, phrases;
  const double* p_unconfident;    // (batch, phrases)
  const std::int64_t* span_ends;  // (batch, phrases), -1 after the last
  const std::int64_t* chunk_lengths;
  const std::int64_t* prefix_lengths;
  const std::int64_t* sentence_lengths;
  double tau, temperature, temperature_step, temperature_rise;
  std::int64_t max_local_attempts, max_total_attempts;
  BacktrackState before, after;
  std::int64_t* actions;  // (batch,) each
  std::int64_t* kept_lengths;
  std::int64_t* flagged;
};
void backtrack(const BacktrackCall& call);

// The k nearest codes of `rows` codes from `first` on. Distances come from products, whose sums a library forms in any
// order: whatever lies closer together than they can tell apart is measured again, in the order of the dimensions.
struct NeighborCall {
  View products;           // (rows, codes) float64, E[first + i] . E[j], unit stride
  const double* codebook;  // (codes, dim), contiguous
  const double* squares;   // (codes,): |E_j|^2
  std::int64_t codes, dim, first, rows, k;
  double product_error;  // |product - E_i . E_j| <= product_error * |E_i| * max |E| + tiny
  double tiny;
  std::int32_t* out;  // (rows, k), row_stride apart
  std::int64_t out_stride;
};
void nearest_codes(const NeighborCall& call);

}  // namespace hotloop::decode
