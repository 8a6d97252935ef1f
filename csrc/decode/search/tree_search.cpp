// SPDX-License-Identifier: Apache-2.0
// One step of two tree searches, each over a batch of trees in flat arrays: back up what was evaluated, then select.
//
// A parent has a lower index than its children, so one pass over the parents, from the last to the first, links the
// children of every node in the order of their indices (`Children`). `walk` runs the trees in parallel; what differs
// between MCTS* and PUCT is how a leaf is backed up and which child is the best.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "core/parallel.hpp"
#include "decode/rows.hpp"
#include "decode/search/calls.hpp"

namespace hotloop::decode {

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Draws for ties come from a domain of their own, beside those of sampling and verification.
constexpr auto kTies = static_cast<Domain>(2);

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

std::int64_t checked_node(const std::int64_t* nodes, std::int64_t b, std::int64_t fallback, std::int64_t count) {
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
double or_lowest(double score) { return score == score ? score : -kInf; }

}  // namespace

void star_step(const StarCall& call) {
  const RealGrid values(call.values);
  const IntGrid visits(call.visits);
  const auto visit = [&](std::int64_t b, std::int64_t i) { visits.set(b, i, visits.get(b, i) + 1); };
  // The mean of the children, weighted by their visits; as it was where none was visited.
  const auto average = [&](std::int64_t b, const Children& children, std::int64_t node) {
    double weighted = 0.0, total = 0.0;
    for (std::int64_t c = children.first(node); c >= 0; c = children.next(c)) {
      const auto n = static_cast<double>(visits.get(b, c));
      weighted += values.get(b, c) * n;
      total += n;
    }
    if (total > 0.0) values.set(b, node, weighted / total);
  };
  const auto backup = [&](std::int64_t b, const Children& children, std::int64_t leaf, std::int64_t root) {
    const double rollout = call.rollouts == nullptr ? std::nan("") : call.rollouts[b];
    visit(b, leaf);
    if (rollout == rollout) {
      values.set(b, leaf, values.get(b, leaf) * (1.0 - call.alpha) + rollout * call.alpha);
    } else {
      average(b, children, leaf);
    }
    for (std::int64_t i = leaf; i != root && children.parent(i) >= 0;) {
      i = children.parent(i);
      visit(b, i);
      average(b, children, i);
    }
  };
  const auto best = [&](std::int64_t b, const Children& children, std::int64_t node, std::int64_t depth) {
    const double log_parent = 2.0 * std::log(std::max(static_cast<double>(visits.get(b, node)), 1.0));
    const auto rank = [&](std::int64_t c) {
      const auto n = static_cast<double>(visits.get(b, c));
      const double v = values.get(b, c);
      if (n > 0.0) return Rank{0, or_lowest(v + call.c * std::sqrt(log_parent / n))};
      if (call.unvisited_bonus == kInf) return Rank{1, or_lowest(v)};
      return Rank{0, or_lowest(v + call.unvisited_bonus)};
    };
    std::int64_t chosen = children.first(node), ties = 1;
    Rank top = rank(chosen);
    for (std::int64_t c = children.next(chosen); c >= 0; c = children.next(c)) {
      const Rank r = rank(c);
      if (top < r) {
        top = r;
        chosen = c;
        ties = 1;
      } else if (top == r) {
        ++ties;
      }
    }
    if (!call.random || ties == 1) return chosen;
    const auto tree = static_cast<std::uint64_t>(b), level = static_cast<std::uint64_t>(depth);
    const double u = draw(call.seed, tree, call.offset, level, kTies).pick;
    std::int64_t skip = std::min(static_cast<std::int64_t>(u * static_cast<double>(ties)), ties - 1);
    for (; skip > 0; --skip) {
      do chosen = children.next(chosen);
      while (!(rank(chosen) == top));
    }
    return chosen;
  };
  walk(call.walk, backup, best);
  for (std::int64_t b = 0; b < call.walk.parents.shape[0]; ++b) {
    const std::int64_t node = call.walk.found[b];
    call.ended[b] = node >= 0 && values.get(b, node) >= call.end_gate ? 1 : 0;
  }
}

void puct_step(const PuctCall& call) {
  const RealGrid q(call.q), v(call.v), values(call.values), logps(call.logps);
  const IntGrid visits(call.visits), lengths(call.lengths);
  const auto settle = [&](std::int64_t b, const Children& children, std::int64_t node) {
    const std::int64_t parent = children.parent(node);
    const double reward = parent < 0 ? values.get(b, node) : values.get(b, node) - values.get(b, parent);
    q.set(b, node, reward + call.gamma * v.get(b, node));
  };
  const auto visit = [&](std::int64_t b, std::int64_t i) { visits.set(b, i, visits.get(b, i) + 1); };
  const auto backup = [&](std::int64_t b, const Children& children, std::int64_t leaf, std::int64_t root) {
    settle(b, children, leaf);
    visit(b, leaf);
    for (std::int64_t i = leaf; i != root && children.parent(i) >= 0;) {
      i = children.parent(i);
      double weighted = 0.0, total = 0.0;
      for (std::int64_t c = children.first(i); c >= 0; c = children.next(c)) {
        const auto n = static_cast<double>(std::max<std::int64_t>(visits.get(b, c), 1));
        weighted += n * q.get(b, c);
        total += n;
      }
      v.set(b, i, weighted / total);
      visit(b, i);
      if (i != 0) settle(b, children, i);
    }
  };
  const auto best = [&](std::int64_t b, const Children& children, std::int64_t node, std::int64_t) {
    const double parent_visits = std::sqrt(static_cast<double>(visits.get(b, node)));
    std::int64_t chosen = -1;
    double top = -kInf;
    for (std::int64_t c = children.first(node); c >= 0; c = children.next(c)) {
      const double length = std::pow(static_cast<double>(lengths.get(b, c)), call.length_penalty);
      const double p = std::exp(logps.get(b, c) / length);
      const double explore = call.c_puct * p * parent_visits / (1.0 + static_cast<double>(visits.get(b, c)));
      const double score = or_lowest(q.get(b, c) + explore);
      if (chosen < 0 || score > top) {
        top = score;
        chosen = c;
      }
    }
    return chosen;
  };
  walk(call.walk, backup, best);
}

}  // namespace hotloop::decode
