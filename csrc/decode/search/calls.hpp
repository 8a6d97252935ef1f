// SPDX-License-Identifier: Apache-2.0
// Searching on top of a model: one step of a beam search, one step of two tree searches over batches of trees in flat
// arrays, the decision of a retrospective backtrack, and the neighbours of every code of a codebook.
#pragma once

#include <cstdint>
#include <vector>

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
