// SPDX-License-Identifier: Apache-2.0
// One pass over the rows of a residual stream: combine the expert rows of a token, move its states and the stream by a
// depth rule (depth_rules.hpp), and normalise the new row while it is in cache. Backward is one pass too.
//
// Storage is any float dtype, row by row; arithmetic is float32 (float64 for float64 streams). A row is taken in chunks
// that stay in L1. Rows are independent but for the gradients of the norm's weight and bias and of the numbers: these
// are added over blocks of tokens that the shape fixes, and the blocks are merged in order in double, so that no bit
// depends on the number of threads.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/simd.hpp"
#include "moe/depth_rules.hpp"

namespace hotloop::moe {

// Rows of a matrix whose columns lie side by side. No data: zeros, or nothing to write.
struct Rows {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  std::int64_t stride = 0;
};
struct RowsOut {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  std::int64_t stride = 0;
};

// Where the k expert rows of every token lie (see Dispatch in hotloop/reference/moe/results.py).
struct Slots {
  std::int64_t k = 0;                         // 0: rows are those of tokens
  std::int64_t rows = 0;                      // R
  const std::int64_t* row_of_slot = nullptr;  // (T * k,)
  const std::int64_t* slot_of_row = nullptr;  // (R,)
  // Whether slot and row name each other.
  HOTLOOP_INLINE bool agree(std::int64_t slot, std::int64_t row) const {
    return static_cast<std::uint64_t>(row) < static_cast<std::uint64_t>(rows) && slot_of_row[row] == slot;
  }
};

struct Mixture {
  Rows rows;  // (R, D), or (T, D) without slots
  Slots slots;
  Rows weights;  // (T, k); no data: 1
  Rows shared;   // (T, D)
};

enum class NormKind : int { kNone, kLayer, kRms };

struct Norm {
  NormKind kind = NormKind::kNone;
  double eps = 0.0;
  Rows weight, bias;  // one row each
};

struct StepCall {
  Depth rule = Depth::kResidual;
  double numbers[kMaxNumbers] = {};
  bool wide = false;  // arithmetic in float64
  std::int64_t tokens = 0, columns = 0;
  Rows x, state[kMaxStates];
  Mixture mixture;
  Norm norm;
  RowsOut out, out_state[kMaxStates];
  RowsOut normed;      // may be `out`, which is then normalised in place
  RowsOut statistics;  // (T, 2) of the type of the arithmetic: mean and 1 / deviation of each row
  // Filled in by step.
  const void* weight = nullptr;  // (D,) each, of the type of the arithmetic
  const void* bias = nullptr;
};

// Gradients: `grad*` are given, `slope*` are written where they have data.
struct BackwardCall {
  Depth rule = Depth::kResidual;
  double numbers[kMaxNumbers] = {};
  bool wide = false;  // arithmetic in float64
  std::int64_t tokens = 0, columns = 0;
  Rows x, state[kMaxStates];  // as forward read them: of rules that are curved, and for slope_numbers
  Mixture mixture;            // rows where their weights have a gradient, and as x
  Norm norm;
  Rows after, after_state;  // what was normalised: x, and s[0] of a rule with a lookahead
  Rows statistics;
  Rows grad, grad_state[kMaxStates], grad_normed;
  RowsOut slope_x, slope_state[kMaxStates];
  RowsOut slope_rows, slope_weights, slope_shared;  // like the mixture
  RowsOut slope_norm_weight, slope_norm_bias;       // one row each
  double* slope_numbers = nullptr;                  // (kMaxSlopes,): those of the rule, then that of the lookahead
  // Filled in by step_backward.
  const void* weight = nullptr;
  std::int64_t blocks = 0, block = 0, grain = 1;  // block: tokens of a block; grain: blocks worth a thread
  void* parts = nullptr;                          // (blocks, 2, D) of the type of the arithmetic
  double* number_parts = nullptr;                 // (blocks, kMaxSlopes)
  double* weight_parts = nullptr;                 // (blocks, k): slopes of the weights of one token
};

// False where a slot and its row do not name each other: the results are then of no use.
bool step(StepCall call);
void step_backward(BackwardCall call);

// out[r] = x[slot_of_row[r] / k], or zeros. False as above; `slots.k` is that of the tokens.
bool permute(const Rows& x, std::int64_t tokens, std::int64_t columns, const Slots& slots, const RowsOut& out);

// Tokens worth a thread.
constexpr std::int64_t grain_of(std::int64_t columns, std::int64_t k) { return 1 + 65536 / ((columns + 1) * (k + 6)); }

}  // namespace hotloop::moe

HOTLOOP_FOR_EACH_SIMD(bool moe_step(const moe::StepCall& call); void moe_step_backward(const moe::BackwardCall& call);)
