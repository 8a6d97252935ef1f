// SPDX-License-Identifier: Apache-2.0
// The router of a sparse mixture: the k best of E experts for every token, their weights, and what balance losses need,
// in one pass over the logits; and its gradient, in one pass too.
//
// Tokens are cut into blocks whose size depends on the shape alone. A block counts its choices and adds its scores in
// type R (float32, or float64 for float64 logits); blocks are merged in order, in double, so neither the number of
// threads nor the length of a batch shows in the sums. Files of this loop are compiled without a * b + c in one
// rounding: experts that are compared by their scores are the same on every instruction set.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/simd.hpp"

namespace hotloop::moe {

constexpr std::int64_t kMostExperts = 4096, kMostChoices = 128;

// Rows of the loops are filled up to whole vectors, and so are sums of a block.
constexpr std::int64_t kLanes = 16;
HOTLOOP_INLINE std::int64_t padded(std::int64_t experts) { return (experts + kLanes - 1) / kLanes * kLanes; }

template <class R>
inline constexpr R kTiny = R(1e-20);  // beside a sum of scores that is divided by

struct Selection {
  std::int64_t top_k = 1;
  bool sigmoid = false;                      // scores are sigmoid(logits), else softmax(logits)
  bool late = false;                         // choose by logits, then take the softmax of the chosen ones
  bool renormalize = true;                   // divide by the sum of the chosen scores
  std::int64_t groups = 1, open_groups = 1;  // groups of experts side by side; those that may be chosen from
  bool group_max = false;                    // a group is worth its largest, else the sum of its two largest
  double scale = 1.0;                        // of all weights
  bool biased = false;                       // a bias is added for the choice
};

struct Logits {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  std::int64_t tokens = 0, experts = 1;
  std::int64_t row_stride = 1;            // experts lie side by side
  const std::uint8_t* mask = nullptr;     // (tokens,): 0 leaves the token out; nullptr: all count
  std::int64_t sequences = 1;             // tokens [offsets[s], offsets[s + 1]) are summed together
  const std::int64_t* offsets = nullptr;  // (sequences + 1,), rising from 0 to tokens; nullptr: one sequence
};

// Tokens of one sequence that are counted and summed together.
struct Block {
  std::int64_t begin, end, sequence;
};

// Type R is float32, or float64 for float64 logits.
struct RouteCall {
  Selection selection;
  Logits logits;
  const void* bias = nullptr;              // (experts,) of R, where selection.biased
  std::int64_t* ids = nullptr;             // (tokens, top_k), best first; -1 where the mask is 0
  void* weights = nullptr;                 // (tokens, top_k) of R
  std::int64_t* counts = nullptr;          // (sequences, experts)
  void* prob_sums = nullptr;               // (sequences, experts) of R
  void* logsumexp = nullptr;               // (tokens,) of R
  std::int64_t* num_tokens = nullptr;      // (sequences,)
  bool ordered = false;                    // the order of expert rows is wanted, of one sequence
  std::int64_t* slot_of_row = nullptr;     // (tokens * top_k,)
  std::int64_t* row_of_slot = nullptr;     // (tokens * top_k,)
  std::int64_t* expert_offsets = nullptr;  // (experts + 1,)
  // Filled in by `route`.
  const Block* blocks = nullptr;
  std::int64_t block_count = 0;
  std::int64_t* block_counts = nullptr;  // (blocks, experts)
  void* block_sums = nullptr;            // (blocks, padded(experts)) of R
  std::int64_t* block_tokens = nullptr;  // (blocks,)
  std::int64_t* block_bad = nullptr;     // (blocks,): the first token whose logits have no softmax, or -1
};

// The gradient of the logits, (tokens, experts), contiguous, in their dtype. Gradients from above are contiguous, of R;
// nullptr: zero.
struct RouteBackwardCall {
  Selection selection;
  Logits logits;
  const std::int64_t* ids = nullptr;  // of the forward pass, as logsumexp
  const void* logsumexp = nullptr;    // (tokens,)
  const void* d_weights = nullptr;    // (tokens, top_k)
  const void* d_prob_sums = nullptr;  // (sequences, experts)
  const void* d_logsumexp = nullptr;  // (tokens,)
  void* result = nullptr;
};

// Returns -1, or the first token with NaN, with inf, or without a finite logit, or kBadBias where the bias is not
// finite; the outputs then mean nothing.
constexpr std::int64_t kBadBias = -2;
std::int64_t route(RouteCall call);
void route_backward(const RouteBackwardCall& call);

struct DispatchCall {
  const void* ids = nullptr;  // (slots,), -1 to experts - 1
  Dtype ids_dtype = Dtype::kInt64;
  std::int64_t slots = 0, experts = 1, align = 1;
  std::int64_t capacity = -1;     // most rows of an expert, -1: no limit
  const void* weights = nullptr;  // (slots,): the largest stay; nullptr: the first ones
  Dtype weights_dtype = Dtype::kFloat32;
  std::int64_t rows = 0;
  std::int64_t* slot_of_row = nullptr;     // (rows,)
  std::int64_t* row_of_slot = nullptr;     // (slots,)
  std::int64_t* expert_offsets = nullptr;  // (experts + 1,)
  std::int64_t* expert_counts = nullptr;   // (experts,)
};

// Returns false where an id is out of range or a weight is NaN; the outputs then mean nothing.
bool dispatch(const DispatchCall& call);

}  // namespace hotloop::moe

HOTLOOP_FOR_EACH_SIMD(void route_blocks(const moe::RouteCall& call);
                      void route_backward(const moe::RouteBackwardCall& call);)
