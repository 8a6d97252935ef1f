// SPDX-License-Identifier: Apache-2.0
// Which of the unknown keys of a batch are let in: the filters of tables live on the host.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kernels/table/calls.hpp"

namespace hotloop::table::gpu {

struct Admitted {
  std::vector<std::uint64_t> hashes;
  std::vector<std::uint32_t> positions;
};

// keys, firsts: (d,) distinct keys and where the hashes of each begin among (m,) sorted ones. What is let in stays in
// order; the filter is asked once per key, in the order in which the batch first has them.
inline Admitted admitted_of(const Ask& ask, const std::vector<std::uint64_t>& keys,
                            const std::vector<std::uint32_t>& firsts, const std::vector<std::uint64_t>& hashes,
                            const std::vector<std::uint32_t>& positions) {
  const std::size_t d = keys.size();
  const auto end = [&](std::size_t k) { return k + 1 < d ? firsts[k + 1] : hashes.size(); };
  std::vector<std::size_t> order(d);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return positions[firsts[a]] < positions[firsts[b]]; });
  std::vector<std::uint64_t> asked(d);
  std::vector<std::uint32_t> counts(d);
  for (std::size_t i = 0; i < d; ++i) {
    asked[i] = keys[order[i]];
    counts[i] = static_cast<std::uint32_t>(end(order[i]) - firsts[order[i]]);
  }
  std::vector<std::uint8_t> answer(d), in(d);
  ask(static_cast<std::int64_t>(d), asked.data(), counts.data(), answer.data());
  for (std::size_t i = 0; i < d; ++i) in[order[i]] = answer[i];
  Admitted admitted;
  for (std::size_t k = 0; k < d; ++k) {
    if (in[k] == 0) continue;
    const auto from = static_cast<std::ptrdiff_t>(firsts[k]), to = static_cast<std::ptrdiff_t>(end(k));
    admitted.hashes.insert(admitted.hashes.end(), hashes.begin() + from, hashes.begin() + to);
    admitted.positions.insert(admitted.positions.end(), positions.begin() + from, positions.begin() + to);
  }
  return admitted;
}

}  // namespace hotloop::table::gpu
