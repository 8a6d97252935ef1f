// SPDX-License-Identifier: Apache-2.0
// What forward and backward of the router share on a device: pieces of the tokens, and where choices are.
#pragma once

#include <cstdint>
#include <limits>

#include "core/bisect.hpp"
#include "kernels/moe/blocks.cuh"
#include "moe/route.hpp"

namespace hotloop::moe::gpu {

template <class R>
constexpr R kInf = std::numeric_limits<R>::infinity();

// Choices of a token: lane i has those with numbers i, i + 32, ...
constexpr int kRounds = static_cast<int>(kMostChoices) / kWarp;

// Pieces of the tokens: the first of every sequence, up to the next multiple of `size`; then those from each multiple
// of `size` on, of which one at the beginning of a sequence is empty.
struct Pieces {
  std::int64_t tokens, size, sequences;
  const std::int64_t* offsets;

  HOTLOOP_INLINE std::int64_t count() const {
    return sequences == 0 ? 0 : sequences + (tokens > 0 ? (tokens - 1) / size : 0);
  }
  HOTLOOP_INLINE std::int64_t offset(std::int64_t s) const {
    if (offsets == nullptr) return s == 0 ? 0 : tokens;
    const std::int64_t at = offsets[s];
    return at < 0 ? 0 : at > tokens ? tokens : at;
  }
  // The sequence of a token.
  HOTLOOP_INLINE std::int64_t sequence_of(std::int64_t token) const {
    if (sequences == 1) return 0;
    const std::int64_t s = first_where(sequences, [&](std::int64_t i) { return offset(i) > token; }) - 1;
    return s < 0 ? 0 : s;
  }
  // Tokens [begin, end) of piece p.
  HOTLOOP_INLINE void at(std::int64_t p, std::int64_t& begin, std::int64_t& end) const {
    std::int64_t limit;
    if (p < sequences) {
      begin = offset(p);
      end = offset(p + 1);
      limit = (begin / size + 1) * size;
    } else {
      begin = (p - sequences + 1) * size;
      limit = begin + size;
      const std::int64_t s = sequence_of(begin);
      end = offset(s) < begin ? offset(s + 1) : begin;
    }
    end = end < limit ? end : limit;
  }
  // The i-th piece of sequence s, and how many it has.
  HOTLOOP_INLINE std::int64_t of_sequence(std::int64_t s, std::int64_t i) const {
    return i == 0 ? s : sequences + offset(s) / size + i - 1;
  }
  HOTLOOP_INLINE std::int64_t count_of(std::int64_t s) const {
    const std::int64_t begin = offset(s), end = offset(s + 1);
    return end <= begin ? 0 : (end - 1) / size - begin / size + 1;
  }
};

// About 512 pieces, few enough to merge in no time, enough for every multiprocessor; sums in float32 stay short.
HOTLOOP_INLINE std::int64_t piece_of(std::int64_t tokens) {
  const std::int64_t size = (tokens / 512 + 8) / 8 * 8;
  return size < 256 ? size : 256;
}

HOTLOOP_INLINE Pieces pieces_of(const Logits& logits) {
  return {logits.tokens, piece_of(logits.tokens), logits.sequences, logits.offsets};
}

}  // namespace hotloop::moe::gpu
