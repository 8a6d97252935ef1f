// SPDX-License-Identifier: Apache-2.0
#include "table/rows/merge.hpp"

#include <bit>
#include <vector>

#include "table/hash.hpp"

namespace hotloop::table {

std::int64_t number_ids(const std::int64_t* ids, std::int64_t n, std::int64_t* inverse, std::int64_t* unique,
                        std::int64_t* counts) {
  if (n <= 0) return 0;
  // Linear probing at a load of at most a half. A slot holds the number of an id plus one; the id itself is compared in
  // `unique`, which the first occurrences have just written.
  const int bits = static_cast<int>(std::bit_width(static_cast<std::uint64_t>(n))) + 1;
  const std::uint64_t mask = (std::uint64_t{1} << bits) - 1;
  std::vector<std::int64_t> slots(mask + 1, 0);
  // The multiplier spreads any pattern of ids over the upper bits (Fibonacci hashing); the fold keeps ids that differ
  // only in their upper bits apart.
  const std::uint64_t seed = process_seed();
  const auto home = [&](std::int64_t id) {
    auto x = static_cast<std::uint64_t>(id) ^ seed;
    x = (x ^ (x >> 32)) * 0x9E3779B97F4A7C15u;
    return (x ^ (x >> 29)) * 0xBF58476D1CE4E5B9u >> (64 - bits);
  };
  std::int64_t found = 0;
  constexpr std::int64_t kAhead = 8;
  for (std::int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) __builtin_prefetch(&slots[home(ids[i + kAhead])], 1);
    std::uint64_t at = home(ids[i]);
    while (slots[at] != 0 && unique[slots[at] - 1] != ids[i]) at = (at + 1) & mask;
    if (slots[at] == 0) {
      unique[found] = ids[i];
      counts[found] = 0;
      slots[at] = ++found;
    }
    const std::int64_t number = slots[at] - 1;
    inverse[i] = number;
    ++counts[number];
  }
  return found;
}

}  // namespace hotloop::table
