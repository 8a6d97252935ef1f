// SPDX-License-Identifier: Apache-2.0
// Row optimizers over rows in memory: one row of a table, or many rows of arrays.
//
// Rows start at any address that is aligned to their type. The result is the same at every instruction set: sums
// over a row are sixteen interleaved ones, folded in halves, and no multiplication is fused with an addition.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/philox.hpp"
#include "core/rules.hpp"
#include "core/simd.hpp"

namespace hotloop::table {

// Updates one row in place. grad: the row's summed gradient. values: float32, float16 or bfloat16.
// random: key of the draws of stochastic rounding, used only with spec.stochastic_rounding and half types.
using UpdateRow = void (*)(const RuleSpec& spec, std::int64_t dim, const float* grad, void* values, float* state,
                           std::uint64_t random);
// Resolved once per batch. Throws std::invalid_argument for values of another type.
UpdateRow update_row(const RuleSpec& spec, Dtype values);

// A column of scalars, or of vectors, of the state: one item per row, `stride` floats apart.
struct StateColumn {
  float* data = nullptr;
  std::int64_t stride = 0;
};

// Rows of arrays. Row i of grad belongs to row rows[i] of values and state, or to row i.
struct UpdateCall {
  RuleSpec spec{};
  std::int64_t n = 0, dim = 0;
  const float* grad = nullptr;  // (n, dim)
  std::int64_t grad_stride = 0;
  void* values = nullptr;
  Dtype dtype = Dtype::kFloat32;
  std::int64_t value_stride = 0;
  StateColumn scalars[kMostScalars]{};
  StateColumn vectors[kMostVectors]{};
  const std::int64_t* rows =
      nullptr;             // (n,), inside the arrays. Repeated ones are updated again, in the order of the batch.
  bool distinct = true;    // no row is repeated
  std::uint64_t seed = 0;  // row i of the batch rounds with the key `rounding_key(seed, i)`
};

// Element e = j % 64 of a row rounds by 16 bits: the lower (e < 32) or upper half of word e % 32 / 8 of
// Philox(key, 0, j / 64 * 8 + e % 8).
HOTLOOP_INLINE std::uint64_t rounding_key(std::uint64_t seed, std::int64_t item) {
  const Philox4x32 r = philox(seed, 0, static_cast<std::uint64_t>(item));
  return (std::uint64_t{r.word[1]} << 32) | r.word[0];
}

}  // namespace hotloop::table

HOTLOOP_FOR_EACH_SIMD(table::UpdateRow table_update_row(const RuleSpec& spec, Dtype values);)
HOTLOOP_SIMD_FUNCTION(table, void, update_rows, (const table::UpdateCall& call), (call))
