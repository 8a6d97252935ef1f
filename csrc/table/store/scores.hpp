// SPDX-License-Identifier: Apache-2.0
// What a use makes of the score of a row: one function for the tables of the CPU and of the GPU.
#pragma once

#include <cstdint>

#include "core/macros.hpp"
#include "table/store/layout.hpp"

namespace hotloop::table {

struct Use {
  std::uint64_t given = 1;  // the caller's score, or increment of LFU
  std::uint64_t epoch = 0;
  std::uint64_t tick = 0;  // number of the call
  bool stated = false;     // `given` is the caller's
  bool counts = true;      // false: an update that is no use of its own
};

// Scores are given, read and filed as int64; a sum of uses stays at the top instead of becoming the lowest score.
inline constexpr std::uint64_t kMostScore = 0x7FFFFFFFFFFFFFFFu;
HOTLOOP_INLINE std::uint64_t add_scores(std::uint64_t a, std::uint64_t b) {
  const std::uint64_t sum = a + b;
  return sum < a || sum > kMostScore ? kMostScore : sum;
}

// The number of calls that EpochLru can tell apart. A table that gets there takes half of it from all its scores and
// from its clock (Table::renumber): the order stays, but among rows that were not used in 2^31 calls.
inline constexpr std::uint64_t kMostTicks = 0xFFFFFFFFu;
inline constexpr std::uint64_t kTicksTaken = std::uint64_t{1} << 31;
HOTLOOP_INLINE std::uint64_t renumbered(std::uint64_t score) {
  const std::uint64_t ticks = score & kMostTicks;
  return (score - ticks) | (ticks > kTicksTaken ? ticks - kTicksTaken : 0);
}

HOTLOOP_INLINE std::uint64_t next_score(Strategy strategy, const Use& use, bool fresh, std::uint64_t before) {
  constexpr std::uint64_t kHalf = 0xFFFFFFFFu;
  switch (strategy) {
    case Strategy::kLru:
      return use.tick;
    case Strategy::kEpochLru: {
      const std::uint64_t epoch = use.counts ? use.epoch : before >> 32;  // an update knows no epoch
      return (epoch << 32) | (use.tick < kMostTicks ? use.tick : kMostTicks);
    }
    case Strategy::kLfu:
      if (!use.counts) return before;
      return fresh ? use.given : add_scores(before, use.given);
    case Strategy::kEpochLfu: {
      if (!use.counts) return before;
      const std::uint64_t uses = fresh ? use.given : (before & kHalf) + use.given;
      return (use.epoch << 32) | (uses < kHalf ? uses : kHalf);
    }
    case Strategy::kCustom:
      return use.stated ? use.given : before;
    default:
      return before;
  }
}

}  // namespace hotloop::table
