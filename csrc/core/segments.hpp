// SPDX-License-Identifier: Apache-2.0
// Reductions over ragged groups of rows, and their gradient.
//
// Values are (n, columns) at any strides. A group ("segment") is a range of rows, given by offsets, or all rows with
// one id. A mask leaves rows out.
//
// The order of every addition depends on the shape alone, not on the number of threads. Ranges are cut into tiles of
// fixed size: a segment inside a tile is finished there; one that crosses the end of a tile leaves one part per tile,
// and the parts are merged in order. Within a tile values are reduced in type R (float32, or float64 for float64) over
// blocks of a few hundred, and blocks are merged in double, so that rounding does not grow with the length. Rows with
// ids are sorted first, and are then ranges of positions in that order; with few columns, where the sort would cost
// more than the rest, they are added to their segments one by one, in double, in as many stretches as the shape allows.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/simd.hpp"

namespace hotloop::segments {

enum class Reduction : int { kSum, kMean, kMax, kMin, kLogSumExp };

struct Values {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  std::int64_t n = 0, columns = 1;
  std::int64_t row_stride = 1, column_stride = 1;
};

struct Groups {
  std::int64_t count = 0;
  const std::int64_t* offsets = nullptr;  // (count + 1,), rising from 0 to n; or else
  const void* ids = nullptr;              // (n,), int64 or int32: the segment of each row
  Dtype ids_dtype = Dtype::kInt64;
  const std::uint8_t* mask = nullptr;  // (n,): 0 leaves the row out; nullptr: all count
};

// What has been seen of one column of one segment.
struct Part {
  double value;     // the sum, or the largest so far (of the negated values for kMin)
  double weight;    // kLogSumExp: sum of exp(x - value)
  std::int64_t at;  // kMax, kMin: the first row that has `value`, -1: none
};

struct ReduceCall {
  Reduction reduction = Reduction::kSum;
  Values values;
  Groups groups;
  void* out = nullptr;             // (count, columns), float32 or, for float64 values, float64
  std::int64_t* counts = nullptr;  // (count,): rows of each segment that count; written if not nullptr
  std::int64_t* rows = nullptr;    // (count, columns): kMax and kMin, the first row that has the result, -1: none
  // Filled in by segment_reduce.
  const std::int64_t* order = nullptr;  // (n,): the row at each position; nullptr: position i is row i
  std::int64_t tile = 0, tiles = 0;     // positions of a tile
  Part* parts = nullptr;                // (2 tiles, columns): 2 t goes on from before tile t, 2 t + 1 begins in it
  std::int64_t* begun = nullptr;        // (tiles,): the segment that begins in the tile and goes on behind it, or -1
  // Rows with ids that are added one by one, in stretches; 0: in tiles. (stretches, count, columns) each.
  std::int64_t stretches = 0;
  double* value = nullptr;
  double* weight = nullptr;
  std::int64_t* at = nullptr;
};

// The gradient of the values, (n, columns), contiguous, in their dtype. `grad` and `out` are (count, columns), of the
// type of ReduceCall::out.
struct SpreadCall {
  Reduction reduction = Reduction::kSum;
  Groups groups;
  const void* grad = nullptr;
  const std::int64_t* counts = nullptr;  // kMean
  const std::int64_t* rows = nullptr;    // kMax, kMin
  Values values;                         // n, columns and dtype always; data for kLogSumExp
  const void* out = nullptr;             // kLogSumExp
  void* result = nullptr;
};

// Returns false, and does nothing, where offsets do not rise from 0 to n or an id is outside [0, count).
bool segment_reduce(ReduceCall call);
void segment_spread(const SpreadCall& call);

}  // namespace hotloop::segments

HOTLOOP_FOR_EACH_SIMD(void segment_reduce(const segments::ReduceCall& call);
                      void segment_spread(const segments::SpreadCall& call);)
