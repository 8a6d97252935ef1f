// SPDX-License-Identifier: Apache-2.0
// The bisection that every search in offsets and sorted ids is.
#pragma once

#include <cstdint>

#include "core/macros.hpp"

namespace hotloop {

// The first i of [0, count) for which holds(i), or `count`: `holds` is false up to there and true from there on.
template <class Holds>
HOTLOOP_INLINE std::int64_t first_where(std::int64_t count, Holds&& holds) {
  std::int64_t low = 0, high = count;
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (holds(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace hotloop
