// What a use makes of the score of a row: one function for the tables of the CPU and of the GPU.
#pragma once

#include <cstdint>

#include "core/macros.hpp"
#include "table/layout.hpp"

namespace hotloop::table {

struct Use {
  std::uint64_t given = 1;  // the caller's score, or increment of LFU
  std::uint64_t epoch = 0;
  std::uint64_t tick = 0;  // number of the call
  bool stated = false;     // `given` is the caller's
  bool counts = true;      // false: an update that is no use of its own
};

HOTLOOP_INLINE std::uint64_t next_score(Strategy strategy, const Use& use, bool fresh, std::uint64_t before) {
  constexpr std::uint64_t kHalf = 0xFFFFFFFFu;
  switch (strategy) {
    case Strategy::kLru:
      return use.tick;
    case Strategy::kEpochLru: {
      const std::uint64_t epoch = use.counts ? use.epoch : before >> 32;  // an update knows no epoch
      return (epoch << 32) | (use.tick & kHalf);
    }
    case Strategy::kLfu:
      if (!use.counts) return before;
      return fresh ? use.given : before + use.given;
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
