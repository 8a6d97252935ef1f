// SPDX-License-Identifier: Apache-2.0
// How many buckets a table begins with, and up to how many it doubles them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/table/lookup.cuh"
#include "table/store/layout.hpp"

namespace hotloop::table::gpu {

// Rows per bucket that a table makes room for. Keys fall into buckets by chance: with 72 expected, one bucket in a
// billion has more than 128 (Poisson), and a table of 2^20 buckets holds what it was made for 999 times in 1000; with
// 80, three times in four.
inline constexpr std::int64_t kComfort = 72;
inline constexpr std::int64_t kMaxBuckets = (std::int64_t{1} << 25) - 1;  // slots are numbered in 32 bits

struct BucketPlan {
  std::int64_t first, last;
};

inline BucketPlan plan_of(const Settings& s) {
  const std::int64_t wanted = std::clamp<std::int64_t>(s.capacity, 1, s.max_rows);
  if (s.strategy == Strategy::kNone) {
    return {std::clamp<std::int64_t>(blocks_of(wanted, kComfort), 1, kMaxBuckets), kMaxBuckets};
  }
  // A table that evicts doubles from the first number until all its rows have a slot, and then no more. From eight
  // buckets on, rounding costs an eighth of the slots at most.
  const std::int64_t last = blocks_of(s.max_rows, kSlots);
  const std::int64_t least = std::min(std::max<std::int64_t>(blocks_of(wanted, kComfort), 8), last);
  BucketPlan plan{last, last};
  for (int doublings = 1; plan.first > 1 && blocks_of(last, std::int64_t{1} << doublings) >= least; ++doublings) {
    plan.first = blocks_of(last, std::int64_t{1} << doublings);
    plan.last = plan.first << doublings;
  }
  return plan;
}

}  // namespace hotloop::table::gpu
