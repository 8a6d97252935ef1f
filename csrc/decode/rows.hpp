// SPDX-License-Identifier: Apache-2.0
// One row of logits or probabilities and the law it stands for. The passes over a row are in rows.simd.cpp; a row is
// taken in chunks of 512 tokens, whose largest logit and mass are kept, so that what follows (a draw, a threshold)
// touches only the chunks that matter.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/simd.hpp"
#include "decode/heads.hpp"

namespace hotloop::decode {

// 512 logits, their weights and a second row's are 12 KiB: they stay in L1.
inline constexpr std::int64_t kChunk = 512;

inline std::int64_t chunk_count(std::int64_t vocabulary) { return (vocabulary + kChunk - 1) / kChunk; }

struct RowSource {
  const void* data = nullptr;       // (V,)
  const void* reference = nullptr;  // (V,) of a second model, or nullptr
  Dtype dtype = Dtype::kFloat32;
  std::int64_t vocabulary = 0;
  bool logits = true;
  double scale = 1.0;                      // 1 / temperature, see scale_of; 1 until the largest logit is known
  double mixture = 0.0;                    // weight of `reference`
  const std::int64_t* bias_ids = nullptr;  // ascending
  const float* bias = nullptr;
  std::int64_t biases = 0;
  std::uint8_t* refused = nullptr;  // set to 1 where a number is read that is no probability
};
// By any thread that reads the row.
HOTLOOP_INLINE void refuse(const RowSource& row) {
  if (row.refused != nullptr) __atomic_store_n(row.refused, std::uint8_t{1}, __ATOMIC_RELAXED);
}

// A token's weight is 0 unless its logit reaches `threshold` and its weight `min_weight`.
struct RowLaw {
  RowSource source;
  bool greedy = false;    // all mass on `best`
  bool as_given = false;  // probabilities without truncation: p is what was passed
  double max = 0.0;       // largest logit (or probability)
  double threshold = 0.0;
  double min_weight = 0.0;
  std::int64_t best = -1;
  std::uint64_t mass = 0;  // in units of 2^-42
  double inverse = 0.0;    // 1 / mass
};

// A token of its own standing in a residual.
struct Edit {
  std::int64_t id;
  bool spared;  // true: its draft probability counts as 0; false: nothing is left of it
};

struct ResidualCall {
  const RowLaw* p = nullptr;
  const RowLaw* q = nullptr;  // nullptr: b is 0
  double a = 1.0;
  double b = 0.0;
  const Edit* edits = nullptr;  // ascending, no id twice
  std::int64_t edit_count = 0;
};

}  // namespace hotloop::decode

// Largest value of the row and of each chunk; -inf where there is none (NaN never counts). +inf is reported.
HOTLOOP_SIMD_FUNCTION(decode, double, row_max, (const decode::RowSource& row, double* chunk_max), (row, chunk_max))
// Sum of the weights, and of each chunk's, in units of 2^-42. law.max must be set.
HOTLOOP_SIMD_FUNCTION(decode, std::uint64_t, row_mass,
                      (const decode::RowLaw& law, const double* chunk_max, std::uint64_t* chunk_mass),
                      (law, chunk_max, chunk_mass))
// Sum of weight * (max - z) over the row, in units of 2^-42: what the entropy needs beside the mass.
HOTLOOP_SIMD_FUNCTION(decode, std::uint64_t, row_entropy, (const decode::RowLaw& law, const double* chunk_max),
                      (law, chunk_max))
// `count` <= kChunk weights, probabilities or logits from token `first` on.
HOTLOOP_SIMD_FUNCTION(decode, void, row_weights,
                      (const decode::RowLaw& law, std::int64_t first, std::int64_t count, double* weights),
                      (law, first, count, weights))
HOTLOOP_SIMD_FUNCTION(decode, void, row_probs,
                      (const decode::RowLaw& law, std::int64_t first, std::int64_t count, double* probs),
                      (law, first, count, probs))
HOTLOOP_SIMD_FUNCTION(decode, void, row_logits,
                      (const decode::RowSource& row, std::int64_t first, std::int64_t count, double* z),
                      (row, first, count, z))
// max(a p - b q, 0) with the edits: one chunk of it, or its sum over the row and over each chunk in units of 2^-51.
HOTLOOP_SIMD_FUNCTION(decode, void, residual_chunk,
                      (const decode::ResidualCall& call, std::int64_t first, std::int64_t count, double* left),
                      (call, first, count, left))
HOTLOOP_SIMD_FUNCTION(decode, std::uint64_t, row_residual,
                      (const decode::ResidualCall& call, std::uint64_t* chunk_mass), (call, chunk_mass))

namespace hotloop::decode {

// One token's logit (scaled, biased) or probability, as the passes see it; NaN for a NaN logit.
double point_value(const RowSource& row, std::int64_t id);
// Its weight under the law; 0 for an id that is none.
double point_weight(const RowLaw& law, std::int64_t id);
double point_prob(const RowLaw& law, std::int64_t id);

}  // namespace hotloop::decode
