// SPDX-License-Identifier: Apache-2.0
// One pass of a stable sort by digits: every thread counts the digits of its range, the counts are summed over digits
// and then over threads, and every thread moves the items of its range to the places that the sums give.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/parallel.hpp"

namespace hotloop {

// Calls move(i, to) for each item, with `to` its place in the stable order of digit(i), which lies in [0, bins).
// grain: items worth a thread. starts: (bins + 1,), where the run of each digit begins; or nullptr.
template <class Digit, class Move>
void stable_pass(std::int64_t n, std::int64_t bins, std::int64_t grain, std::int64_t* starts, Digit&& digit,
                 Move&& move) {
  // No more counters than items, but for one thread's.
  const std::int64_t wanted = std::min({n / grain, std::int64_t{max_threads()}, n / bins});
  const std::int64_t blocks = std::max<std::int64_t>(1, wanted);
  std::vector<std::int64_t> at(static_cast<std::size_t>(blocks * bins), 0);
  const auto ranges = [&](auto&& body) {
    parallel_for(blocks, 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t b = first; b < last; ++b)
        body(&at[static_cast<std::size_t>(b * bins)], n * b / blocks, n * (b + 1) / blocks);
    });
  };
  ranges([&](std::int64_t* mine, std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) ++mine[digit(i)];
  });
  std::int64_t sum = 0;
  for (std::int64_t k = 0; k < bins; ++k) {
    if (starts != nullptr) starts[k] = sum;
    for (std::int64_t b = 0; b < blocks; ++b) {
      std::int64_t& count = at[static_cast<std::size_t>(b * bins + k)];
      const std::int64_t before = sum;
      sum += count;
      count = before;
    }
  }
  if (starts != nullptr) starts[bins] = sum;
  ranges([&](std::int64_t* mine, std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) move(i, mine[digit(i)]++);
  });
}

}  // namespace hotloop
