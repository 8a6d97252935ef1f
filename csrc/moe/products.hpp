// SPDX-License-Identifier: Apache-2.0
// Products of experts: for every group of rows, out = a b^T, with the matrices of the expert that the rows belong to.
//
// Both operands have lanes and a depth: out(i, j) = sum over d of a(i, d) b(j, d). In a product of rows the lanes of
// `a` are rows and those of `b` the outputs of a weight, the depth its inputs. In an outer product, the gradient of a
// weight, the depth of both are rows. Rows may be those of tokens, found through the slots of a dispatch, so that
// nothing is gathered beforehand; whatever the strides and dtypes are, operands are packed into panels of the type of
// sums, block by block, which is where half types are widened, once per weight.
//
// Blocks are cut by shape alone and every element of the result is the work of one thread, which adds in the order of
// the depth: the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/simd.hpp"

namespace hotloop::moe {

// Rows [first, first + count) belong to one expert.
struct Group {
  std::int64_t expert, first, count;
};

struct Operand {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  std::int64_t expert_stride = 0;  // of a weight
  std::int64_t lane_stride = 1, depth_stride = 1;
  const std::int64_t* slots = nullptr;  // row r stands at row slots[r] / choices of data; nullptr: at row r
  std::int64_t choices = 1;
  std::int64_t first_row = 0;  // without slots, the row that data begins with
};

struct ProductCall {
  bool outer = false;
  Operand a, b;
  std::int64_t a_lanes = 0;  // of an outer product; else a group's rows
  std::int64_t b_lanes = 0;
  std::int64_t depth = 0;      // of a product of rows; else a group's rows
  const void* bias = nullptr;  // (experts, b_lanes) in the dtype of b: what sums of rows begin with
  const Group* groups = nullptr;
  std::int64_t group_count = 0;
  void* out = nullptr;  // columns side by side
  Dtype out_dtype = Dtype::kFloat32;
  std::int64_t out_expert_stride = 0;  // of an outer product
  std::int64_t out_row_stride = 0;
  std::int64_t out_first_row = 0;  // of a product of rows: the row that out begins with
};

}  // namespace hotloop::moe

HOTLOOP_SIMD_FUNCTION(moe, void, grouped_product, (const moe::ProductCall& call), (call))
