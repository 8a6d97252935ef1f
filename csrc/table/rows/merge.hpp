// SPDX-License-Identifier: Apache-2.0
// The gradients of one batch, one row per distinct id: ids in the order of their first occurrence, rows added in the
// order of the batch, in float32. The result does not depend on threads.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/simd.hpp"

namespace hotloop::table {

// Numbers the distinct ids. inverse: (n,) number of each id; unique: (n,) of which the first `return` are written;
// counts: (n,) likewise, how often each occurs.
std::int64_t number_ids(const std::int64_t* ids, std::int64_t n, std::int64_t* inverse, std::int64_t* unique,
                        std::int64_t* counts);

struct MergeCall {
  std::int64_t n = 0, dim = 0, unique = 0;
  const std::int64_t* inverse = nullptr;  // (n,), as numbered above
  const void* grads = nullptr;            // (n, dim)
  Dtype dtype = Dtype::kFloat32;
  std::int64_t grad_stride = 0;
  float* out = nullptr;  // (unique, dim), contiguous
};

}  // namespace hotloop::table

HOTLOOP_SIMD_FUNCTION(table, void, merge_rows, (const table::MergeCall& call), (call))
