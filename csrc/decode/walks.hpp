// SPDX-License-Identifier: Apache-2.0
// The verification of one request as a walk over rows: which rows it looks at, in which order, and what it emits. A
// walk is written once; `Rows` says how a row is read (cpu_rows.hpp by a thread, rows.cuh by a group of blocks that
// all take the same steps). Rows of the target are opened one by one, and none after the first rejection.
//
// What a walk needs of Rows:
//   bool open(row)                 the law of a target row; false if it has none
//   bool open_softened(row)        the same for a greedy request, at temperature 1 and without truncation
//   bool has_draft(); void open_draft(row)
//   bool is_token(id); double p(id), q(id)   probabilities under the open rows; 0 for an id that is none
//   int64 best()                   most likely token of the open target row, lowest id among equals
//   void clear_edits(); void take(id); void spare(id)
//   double residual(a, b)          mass of max(a p - b q, 0); b counts only with a draft
//   int64 pick(u), pick_residual(u)  a token of the open target row, or of what `residual` left; -1 if there is none
//   double logp(id)                of the open target row
//   bool leader(); void sync()     whether this thread writes; what the leader wrote before, all read after
#pragma once

#include <cstdint>

#include "core/macros.hpp"
#include "decode/heads.hpp"

namespace hotloop::decode {

struct Draws {
  std::uint64_t seed = 0;
  std::uint64_t request = 0;
  std::int64_t offset = 0;
  HOTLOOP_INLINE Uniforms at(std::int64_t position, std::int64_t attempt = 0, Domain domain = kVerification) const {
    return draw(seed, request, static_cast<std::uint64_t>(offset) + static_cast<std::uint64_t>(position),
                static_cast<std::uint64_t>(attempt), domain);
  }
};

// A row of outputs; Id is int32 or int64. Nothing is written past what the caller allocated: `width` tokens.
template <class Id>
struct Emitted {
  Id* ids;                  // (width,), -1 where nothing was emitted
  float* logps;             // (width,), or nullptr
  std::int64_t* accepted;   // (1,)
  std::int64_t* rows_read;  // (1,)
  std::int64_t width;
};

template <class Rows, class Id>
class Writer {
 public:
  HOTLOOP_INLINE Writer(Rows& rows, const Emitted<Id>& out) : rows_(rows), out_(out) {
    if (!rows_.leader()) return;
    for (std::int64_t i = 0; i < out_.width; ++i) drop(i);
  }
  HOTLOOP_INLINE void put(std::int64_t at, std::int64_t token) {
    if (!rows_.leader() || token < 0) return;
    out_.ids[at] = static_cast<Id>(token);
    if (out_.logps != nullptr) out_.logps[at] = static_cast<float>(rows_.logp(token));
  }
  HOTLOOP_INLINE void drop(std::int64_t at) {
    if (!rows_.leader()) return;
    out_.ids[at] = static_cast<Id>(-1);
    if (out_.logps != nullptr) out_.logps[at] = 0.0f;
  }
  HOTLOOP_INLINE void finish(std::int64_t accepted, std::int64_t rows_read) {
    if (!rows_.leader()) return;
    *out_.accepted = accepted;
    *out_.rows_read = rows_read;
  }

 private:
  Rows& rows_;
  Emitted<Id> out_;
};

// What is left after `token` was rejected: max(a p - q, 0), or, if the draft was certain of the token, all but it.
template <class Rows>
HOTLOOP_INLINE double left_over(Rows& rows, double a, std::int64_t token) {
  rows.clear_edits();
  if (!rows.has_draft()) rows.take(token);
  return rows.residual(a, 1.0);
}
// p <= q everywhere, but for rounding, leaves nothing: the target's own law is then what remains.
template <class Rows>
HOTLOOP_INLINE std::int64_t pick_left_over(Rows& rows, double mass, double u) {
  return mass > 0.0 ? rows.pick_residual(u) : rows.pick(u);
}
template <class Rows>
HOTLOOP_INLINE double draft_prob(Rows& rows, std::int64_t token) {
  return rows.has_draft() ? rows.q(token) : rows.is_token(token) ? 1.0 : 0.0;
}

// Chain verification (Leviathan et al. 2023, Chen et al. 2023) of draft tokens x[0..n).
template <class Rows, class Id>
HOTLOOP_INLINE void walk_chain(Rows& rows, const Id* x, std::int64_t n, const Draws& draws, const Emitted<Id>& out) {
  Writer<Rows, Id> writer(rows, out);
  std::int64_t i = 0;
  for (; rows.open(i); ++i) {
    const Uniforms u = draws.at(i);
    if (i == n) {
      writer.put(i, rows.pick(u.pick));
      break;
    }
    const std::int64_t token = static_cast<std::int64_t>(x[i]);
    if (rows.has_draft()) rows.open_draft(i);
    if (accepts(u.accept, rows.p(token), draft_prob(rows, token))) {
      writer.put(i, token);
      continue;
    }
    writer.put(i, pick_left_over(rows, left_over(rows, 1.0, token), u.pick));
    break;
  }
  writer.finish(i, i + 1);
}

// Block verification (Sun et al. 2025): the longest prefix that passes is kept, although a shorter one failed.
// reach[i]: the share of the draft's prefix of i tokens that the target keeps, (n + 1,) scratch.
template <class Rows, class Id>
HOTLOOP_INLINE void walk_block(Rows& rows, const Id* x, std::int64_t n, const Draws& draws, double* reach,
                               const Emitted<Id>& out) {
  Writer<Rows, Id> writer(rows, out);
  std::int64_t longest = 0;
  double ahead = 1.0;
  if (rows.leader()) reach[0] = 1.0;
  bool law = rows.open(0);
  while (law && longest < n) {
    const std::int64_t token = static_cast<std::int64_t>(x[longest]);
    if (rows.has_draft()) rows.open_draft(longest);
    const double q = draft_prob(rows, token);
    ahead = ahead * rows.p(token);
    if (!(ahead > 0.0)) break;
    ahead = ahead < q ? ahead / q : 1.0;
    writer.put(longest, token);
    ++longest;
    if (rows.leader()) reach[longest] = ahead;
    law = rows.open(longest);
  }
  rows.sync();
  const std::int64_t read = longest + 1;
  for (std::int64_t i = longest; i >= 0; --i) {
    if (i < longest) law = rows.open(i);
    double mass = -1.0;  // the draw is from the target's own law
    double accept = reach[i];
    if (law && i < n) {
      if (rows.has_draft()) rows.open_draft(i);
      mass = left_over(rows, reach[i], static_cast<std::int64_t>(x[i]));
      accept = reach[i] >= 1.0 ? 1.0 : mass / (mass + (1.0 - reach[i]));
    }
    if (i > 0 && !(draws.at(i - 1).accept <= accept)) {
      writer.drop(i - 1);
      continue;
    }
    if (law) {
      const double u = draws.at(i).pick;
      writer.put(i, mass < 0.0 ? rows.pick(u) : pick_left_over(rows, mass, u));
    }
    writer.finish(i, read);
    return;
  }
}

// Tree verification. Node j of n carries token x[j] and hangs on parent[j] < j, or -1 for the root; the law after
// node j is row j + 1. Nodes whose parent does not come before them are never reached.
template <class Id>
struct Tree {
  const Id* x;
  const std::int64_t* parent;
  std::int64_t n;
  std::int64_t depth;  // nodes deeper than this are not looked at
  bool replacement;    // whether siblings were drawn independently
};

template <class Id>
HOTLOOP_INLINE std::int64_t next_child(const Tree<Id>& tree, std::int64_t row, std::int64_t after) {
  std::int64_t j = after;
  while (j < tree.n && tree.parent[j] != row - 1) ++j;
  return j;
}

// Whether an earlier sibling of j carries its token.
template <class Id>
HOTLOOP_INLINE bool tried_before(const Tree<Id>& tree, std::int64_t row, std::int64_t j) {
  for (std::int64_t i = next_child(tree, row, row); i < j; i = next_child(tree, row, i + 1)) {
    if (tree.x[i] == tree.x[j]) return true;
  }
  return false;
}

// Children the draft chose without chance: each is a draft that was certain of its token. The first accepted child,
// or -1; `mass` is then what the edits leave.
template <class Rows, class Id>
HOTLOOP_INLINE std::int64_t try_certain(Rows& rows, const Tree<Id>& tree, std::int64_t row, std::int64_t depth,
                                        const Draws& draws, double* mass) {
  rows.clear_edits();
  double rest = 1.0;
  std::int64_t likely = -1, attempt = 0;
  for (std::int64_t j = next_child(tree, row, row); j < tree.n; j = next_child(tree, row, j + 1), ++attempt) {
    const std::int64_t token = static_cast<std::int64_t>(tree.x[j]);
    const double p = rows.p(token);
    if (!(p > 0.0) || tried_before(tree, row, j)) continue;
    likely = j;
    if (draws.at(depth, attempt).accept * rest <= p) return j;
    rest -= p;
    rows.take(token);
  }
  *mass = rows.residual(1.0, 0.0);
  // All mass lay on children, yet rounding let each of them fail: the last one is certain.
  return *mass > 0.0 ? -1 : likely;
}

// Children drawn from q. After r rejections the law is max(p - a q, 0) / z: only a and z change.
template <class Rows, class Id>
HOTLOOP_INLINE std::int64_t try_drawn(Rows& rows, const Tree<Id>& tree, std::int64_t row, std::int64_t depth,
                                      const Draws& draws, double* mass) {
  rows.clear_edits();
  rows.open_draft(row);
  double a = 0.0, z = 1.0, rest = 1.0;
  std::int64_t attempt = 0;
  for (std::int64_t j = next_child(tree, row, row); j < tree.n; j = next_child(tree, row, j + 1), ++attempt) {
    if (!tree.replacement && tried_before(tree, row, j)) continue;
    const std::int64_t token = static_cast<std::int64_t>(tree.x[j]);
    const double q = rows.q(token);
    const double now = rows.p(token) - a * q;
    if (now > 0.0 && draws.at(depth, attempt).accept * (q / rest) * z <= now) return j;
    a += z / rest;
    z = rows.residual(1.0, a);
    if (!tree.replacement) rest -= q;
    if (!(z > 0.0) || !(rest > 0.0)) break;
  }
  *mass = z;
  return -1;
}

template <class Rows, class Id>
HOTLOOP_INLINE void walk_tree(Rows& rows, const Tree<Id>& tree, const Draws& draws, std::int64_t* nodes,
                              const Emitted<Id>& out) {
  Writer<Rows, Id> writer(rows, out);
  if (rows.leader()) {
    for (std::int64_t i = 0; i < tree.depth; ++i) nodes[i] = -1;
  }
  std::int64_t row = 0, depth = 0;
  for (; rows.open(row); ++depth) {
    if (depth == tree.depth || next_child(tree, row, row) >= tree.n) {
      writer.put(depth, rows.pick(draws.at(depth).pick));
      break;
    }
    double mass = 0.0;
    const std::int64_t child = rows.has_draft() ? try_drawn(rows, tree, row, depth, draws, &mass)
                                                : try_certain(rows, tree, row, depth, draws, &mass);
    if (child < 0) {
      writer.put(depth, pick_left_over(rows, mass, draws.at(depth).pick));
      break;
    }
    writer.put(depth, static_cast<std::int64_t>(tree.x[child]));
    if (rows.leader()) nodes[depth] = child;
    row = child + 1;
  }
  writer.finish(depth, depth + 1);
}

// LANTERN's relaxed acceptance (Jang et al. 2025): a draft token may borrow the mass of its nearest neighbours in the
// codebook, as far as that moves the law by no more than `delta` in total variation.
template <class Neighbor>
struct Relaxation {
  const Neighbor* neighbors;  // (V, columns), nearest first
  std::int64_t columns;
  std::int64_t row_stride;
  std::int64_t k;
  double delta;
};

template <class Rows, class Id, class Neighbor>
HOTLOOP_INLINE void walk_lantern(Rows& rows, const Id* x, std::int64_t n, const Relaxation<Neighbor>& relaxation,
                                 bool greedy, const Draws& draws, float* moved, const Emitted<Id>& out) {
  Writer<Rows, Id> writer(rows, out);
  if (rows.leader()) {
    for (std::int64_t i = 0; i + 1 < out.width; ++i) moved[i] = 0.0f;
  }
  std::int64_t i = 0;
  for (; greedy ? rows.open_softened(i) : rows.open(i); ++i) {
    const Uniforms u = draws.at(i);
    if (i == n) {
      writer.put(i, greedy ? rows.best() : rows.pick(u.pick));
      break;
    }
    const std::int64_t token = static_cast<std::int64_t>(x[i]);
    const bool known = rows.is_token(token);
    const Neighbor* near = relaxation.neighbors + (known ? token * relaxation.row_stride : 0);
    const std::int64_t k = relaxation.k < relaxation.columns ? relaxation.k : relaxation.columns;
    const double p = rows.p(token);
    const double bound = relaxation.delta <= 1.0 ? relaxation.delta : (relaxation.delta - 1.0) * p;
    double mass = 0.0;
    std::int64_t count = 0;
    for (; known && count < k; ++count) {
      const double more = mass + rows.p(static_cast<std::int64_t>(near[count]));
      if (more > bound) break;
      mass = more;
    }
    if (rows.leader()) moved[i] = static_cast<float>(mass);
    const double relaxed = p + mass;
    bool fine;
    if (greedy) {
      const double highest = rows.p(rows.best());
      fine = token == rows.best() || (p > 0.0 && (relaxed > highest || (relaxed == highest && token < rows.best())));
    } else {
      if (rows.has_draft()) rows.open_draft(i);
      fine = p > 0.0 && u.accept * draft_prob(rows, token) <= relaxed;
    }
    if (fine) {
      writer.put(i, token);
      continue;
    }
    if (greedy) {
      writer.put(i, rows.best());
      break;
    }
    rows.clear_edits();
    // As in the authors' code one neighbour more is spared here than was counted above.
    const std::int64_t most = relaxation.k < relaxation.columns ? relaxation.k + 1 : relaxation.columns;
    const std::int64_t spared = mass > 0.0 ? most : 0;
    for (std::int64_t j = 0; j < spared; ++j) {
      const std::int64_t id = static_cast<std::int64_t>(near[j]);
      if (rows.has_draft()) {
        rows.spare(id);
      } else {
        rows.take(id);
      }
    }
    if (!rows.has_draft()) rows.take(token);
    const double left = rows.residual(1.0, 1.0);
    writer.put(i, pick_left_over(rows, left, u.pick));
    break;
  }
  writer.finish(i, i + 1);
}

}  // namespace hotloop::decode
