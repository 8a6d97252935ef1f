// SPDX-License-Identifier: Apache-2.0
// Row loops between and behind the products of experts. Rows are those of groups: each belongs to a slot of a dispatch,
// that is to token slot / choices; rows whose slot is negative hold nothing and are passed over.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/simd.hpp"

namespace hotloop::moe {

enum class Function : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

// h = f(gate) (value + shift) with a gate, else f(row); docs in hotloop/reference/moe/experts.py.
struct Activation {
  Function function = Function::kSilu;
  bool gated = true, interleaved = false;
  double limit = 0;  // infinite: none
  double alpha = 1, shift = 0;
};

struct ActivateCall {
  Activation activation;
  Dtype dtype = Dtype::kFloat32;     // of inner and out
  std::int64_t rows = 0, width = 0;  // of the result
  const std::int64_t* slots = nullptr;
  const void* inner = nullptr;  // (rows, width or 2 width), the first product
  void* out = nullptr;          // (rows, width)
};

// From the gradient of h of every row but for the weight of its slot: the gradient of the first product, h times the
// weight, and what the slot's weight has of gradient. Sums and weights are float32, float64 for float64.
struct ActivateGradientCall : ActivateCall {
  const void* above = nullptr;      // (rows, width), sums; may be `out` where that has the same type
  void* gradient = nullptr;         // (rows, width or 2 width); may be `inner`
  const void* weights = nullptr;    // of all slots; nullptr: 1
  const void* begin = nullptr;      // (rows,): what the gradient of a weight has beside; nullptr: 0
  void* weight_gradient = nullptr;  // of all slots; nullptr: not wanted
};

// out[token of row] += weight of its slot * row, rows in their order. Columns are cut among threads.
struct ScatterCall {
  bool wide = false;  // float64, else float32, of everything
  std::int64_t rows = 0, columns = 0, choices = 1;
  const std::int64_t* slots = nullptr;
  const void* from = nullptr;     // (rows, columns)
  const void* weights = nullptr;  // of all slots; nullptr: 1
  void* out = nullptr;            // (tokens, columns)
};

}  // namespace hotloop::moe

HOTLOOP_SIMD_FUNCTION(moe, void, activate, (const moe::ActivateCall& call), (call))
HOTLOOP_SIMD_FUNCTION(moe, void, activate_gradient, (const moe::ActivateGradientCall& call), (call))
HOTLOOP_SIMD_FUNCTION(moe, void, scatter_add, (const moe::ScatterCall& call), (call))
