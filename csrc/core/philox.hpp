// SPDX-License-Identifier: Apache-2.0
// Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a counter-based
// generator. The same (key, counter) gives the same four words on every machine, in any order.
// hotloop's counter is (item, offset), its key the seed, so a draw belongs to an item and not to a thread.
#pragma once

#include <cstdint>

#include "core/macros.hpp"

namespace hotloop {

struct Philox4x32 {
  std::uint32_t word[4];
};

HOTLOOP_INLINE Philox4x32 philox4x32_10(Philox4x32 counter, std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * counter.word[0];
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {
        {static_cast<std::uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<std::uint32_t>(product1),
         static_cast<std::uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<std::uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

HOTLOOP_INLINE Philox4x32 philox(std::uint64_t seed, std::uint64_t offset, std::uint64_t item) {
  const Philox4x32 counter = {{static_cast<std::uint32_t>(item), static_cast<std::uint32_t>(item >> 32),
                               static_cast<std::uint32_t>(offset), static_cast<std::uint32_t>(offset >> 32)}};
  return philox4x32_10(counter, static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
}

// Uniform in (0, 1]: 24 bits, never 0, so that log(u) is finite.
HOTLOOP_INLINE float uniform_open_closed(std::uint32_t word) { return static_cast<float>((word >> 8) + 1u) * 0x1p-24f; }

}  // namespace hotloop
