// SPDX-License-Identifier: Apache-2.0
// A table in device memory, and how a warp looks into it.
//
// Arrays run over buckets x 128 slots. `digests` has one byte of the hash per slot, 0 in a free one: a digest says
// whether a slot is used, so no key is reserved. Keys, scores, times, versions and rows are addressed by the number of
// the slot, so after the one line of digests there is no further indirection. The upper bits of a key's hash name its
// bucket; the key may lie in any slot of it.
//
// Nothing here is locked: a kernel reads what the kernel before it on the stream has written.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "kernels/core/threads.cuh"
#include "table/hash.hpp"
#include "table/store/layout.hpp"
#include "table/store/scores.hpp"

namespace hotloop::table::gpu {

using cuda::kWarp;

inline constexpr int kSlots = 128;  // of a bucket: one byte each is one line of memory
inline constexpr int kGroup = 8;    // lanes that look up one key, 16 digests each
inline constexpr int kGroups = kWarp / kGroup;

// What is the same for the life of a table.
struct Shape {
  std::int64_t dim = 1, value_bytes = 4, state = 4, states = 0, stride = 16;  // in bytes, but for dim and states
  Dtype dtype = Dtype::kFloat32;
  Strategy strategy = Strategy::kNone;
  Initializer initializer = Initializer::kConstant;
  float first = 0, second = 0;
  std::uint64_t seed = 0;
  const float* initial_state = nullptr;  // (states,)
};

inline Shape shape_of(const Settings& settings) {
  Shape s;
  s.dim = settings.dim;
  s.dtype = settings.dtype;
  s.value_bytes = settings.dim * item_size(settings.dtype);
  s.state = (s.value_bytes + 3) / 4 * 4;
  s.states = static_cast<std::int64_t>(settings.initial_state.size());
  s.stride = (s.state + 4 * s.states + 15) / 16 * 16;
  s.strategy = settings.strategy;
  s.initializer = settings.initializer;
  s.first = settings.first;
  s.second = settings.second;
  s.seed = settings.seed;
  return s;
}

struct Store {
  std::uint64_t buckets = 0;
  std::uint64_t hash_seed = kPlaceSeed;
  std::uint32_t* digests = nullptr;  // four slots a word
  std::uint64_t* keys = nullptr;
  std::uint64_t* scores = nullptr;    // null without a strategy
  std::uint32_t* times = nullptr;     // null if not tracked
  std::uint32_t* versions = nullptr;  // null if not tracked
  char* rows = nullptr;

  HOTLOOP_INLINE std::int64_t slots() const { return static_cast<std::int64_t>(buckets) * kSlots; }
};

struct alignas(16) Quad {
  std::uint32_t word[4];
};

// 1 to 255, from bits that decide no bucket.
HOTLOOP_INLINE std::uint32_t digest_of(std::uint64_t hash) {
  return 1u + ((static_cast<std::uint32_t>(hash) & 0xFFFFu) * 255u >> 16);
}

// The high bit of every byte that is the same in both.
HOTLOOP_INLINE std::uint32_t same_bytes(std::uint32_t a, std::uint32_t b) {
  constexpr std::uint32_t kLow = 0x7f7f7f7fu;
  const std::uint32_t t = a ^ b;
  return ~(((t & kLow) + kLow) | t | kLow);
}

HOTLOOP_INLINE unsigned char* digest_at(const Store& s, std::int64_t slot) {
  return reinterpret_cast<unsigned char*>(s.digests) + slot;
}
HOTLOOP_INLINE char* row_at(const Store& s, const Shape& shape, std::int64_t slot) {
  return s.rows + slot * shape.stride;
}

// Whether a slot still is the key's.
HOTLOOP_INLINE bool holds(const Store& s, std::uint32_t slot, std::uint64_t key) {
  return static_cast<std::int64_t>(slot) < s.slots() && *digest_at(s, slot) != 0 && s.keys[slot] == key;
}

// The slot of a key, or kNoRow, for all lanes of a group; groups have keys of their own. All lanes of the warp call it.
HOTLOOP_BOTH inline std::uint32_t locate(const Store& s, std::uint64_t key, bool wanted, int lane) {
  const int part = lane % kGroup;
  std::uint32_t slot = kNoRow;
  if (wanted) {
    const std::uint64_t hash = place_hash(key, s.hash_seed);
    const std::uint32_t pattern = digest_of(hash) * 0x01010101u;
    const auto first = static_cast<std::int64_t>(bucket_of(hash, s.buckets)) * kSlots + part * 16;
    const Quad digests = cuda::read_global(reinterpret_cast<const Quad*>(s.digests + first / 4));
    HOTLOOP_UNROLL
    for (int w = 0; w < 4; ++w) {
      for (std::uint32_t m = same_bytes(digests.word[w], pattern); m != 0; m &= m - 1) {
        const auto at = static_cast<std::uint32_t>(first + w * 4 + cuda::lowest_bit(m) / 8);
        if (cuda::read_global(s.keys + at) == key) slot = at;
      }
    }
  }
  for (int distance = kGroup / 2; distance > 0; distance /= 2) {
    const std::uint32_t other = cuda::shuffle_xor(slot, distance);
    slot = other < slot ? other : slot;
  }
  return slot;
}

// The slots of 32 keys, one a lane: `row` where it still is the key's, else what a search finds.
HOTLOOP_BOTH inline std::uint32_t locate_each(const Store& s, std::uint64_t key, std::uint32_t row, bool wanted,
                                              int lane) {
  const bool known = wanted && row != kNoRow && holds(s, row, key);
  std::uint32_t slot = known ? row : kNoRow;
  for (std::uint32_t left = cuda::ballot(wanted && !known); left != 0;) {
    int mine = -1;  // the lane whose key this group looks up
    for (int g = 0; g < kGroups && left != 0; ++g, left &= left - 1) {
      if (g == lane / kGroup) mine = cuda::lowest_bit(left);
    }
    const std::uint64_t theirs = cuda::shuffle(key, mine < 0 ? lane : mine);
    const std::uint32_t found = locate(s, theirs, mine >= 0, lane);
    for (int g = 0; g < kGroups; ++g) {
      const std::uint32_t at = cuda::shuffle(found, g * kGroup);
      const int to = static_cast<int>(cuda::shuffle(static_cast<std::uint32_t>(mine), g * kGroup));
      if (to == lane) slot = at;
    }
  }
  return slot;
}

// The widest access, in bytes, that rows at `at` and `stride` bytes apart allow, for a row of `bytes`.
inline int access_of(const void* at, std::int64_t stride, std::int64_t bytes) {
  const auto all =
      reinterpret_cast<std::uintptr_t>(at) | static_cast<std::uintptr_t>(stride) | static_cast<std::uintptr_t>(bytes);
  return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 2;
}

template <class T>
HOTLOOP_BOTH inline void copy_as(char* to, const char* from, std::int64_t bytes, int lane, int lanes) {
  const auto n = bytes / static_cast<std::int64_t>(sizeof(T));
  const T* in = reinterpret_cast<const T*>(from);
  T* out = reinterpret_cast<T*>(to);
  for (std::int64_t j = lane; j < n; j += lanes) out[j] = in == nullptr ? T{} : in[j];
}
// Copies a row, or writes zeros where `from` is null, by some lanes of a warp.
HOTLOOP_BOTH inline void copy_row(char* to, const char* from, std::int64_t bytes, int access, int lane, int lanes) {
  if (access == 16)
    copy_as<Quad>(to, from, bytes, lane, lanes);
  else if (access == 4)
    copy_as<std::uint32_t>(to, from, bytes, lane, lanes);
  else
    copy_as<std::uint16_t>(to, from, bytes, lane, lanes);
}

// Rows of values outside the table, `stride` bytes apart.
struct Matrix {
  char* data = nullptr;
  std::int64_t stride = 0;
  int access = 2;
  HOTLOOP_INLINE char* row(std::int64_t i) const { return data + i * stride; }
};
inline Matrix matrix_of(void* data, std::int64_t stride, std::int64_t bytes) {
  return {static_cast<char*>(data), stride, access_of(data, stride, bytes)};
}

// What a write leaves beside values: see table/store/table.hpp.
struct Stamp {
  const std::uint64_t* scores = nullptr;  // (n,)
  std::uint64_t epoch = 0, tick = 0;
  std::uint32_t time = 0;
  std::uint32_t generation = 0;
  bool exact = false;  // `scores` are what rows had when they were exported
};

// The score of a row after a use; `given` is the sum of increments, or the score of the last use.
HOTLOOP_INLINE std::uint64_t score_after(const Shape& shape, const Stamp& stamp, std::uint64_t given, bool counts,
                                         bool fresh, std::uint64_t before) {
  if (stamp.exact) return given;
  return next_score(shape.strategy, Use{given, stamp.epoch, stamp.tick, stamp.scores != nullptr && counts, counts},
                    fresh, before);
}
// Strategies that count uses, and those that keep what the caller says last.
HOTLOOP_INLINE bool counts_uses(const Shape& shape, const Stamp& stamp) {
  return !stamp.exact && (shape.strategy == Strategy::kLfu || shape.strategy == Strategy::kEpochLfu);
}
// One use as a term of a sum: of EpochLfu 32 bits are kept, so no term need be larger.
HOTLOOP_INLINE std::uint64_t uses_of(const Shape& shape, const Stamp& stamp, std::int64_t position) {
  const std::uint64_t given = stamp.scores != nullptr ? stamp.scores[position] : 1;
  return shape.strategy == Strategy::kEpochLfu && given > 0xFFFFFFFFu ? 0xFFFFFFFFu : given;
}

// Score, time and version of a row that was used; by one lane. A use that leaves a score or a time is a change.
HOTLOOP_INLINE void touch(const Store& s, const Shape& shape, const Stamp& stamp, std::uint32_t slot,
                          std::uint64_t given, bool counts) {
  if (s.times != nullptr && stamp.time > s.times[slot]) s.times[slot] = stamp.time;
  if (s.versions != nullptr) s.versions[slot] = stamp.generation;
  if (s.scores != nullptr) s.scores[slot] = score_after(shape, stamp, given, counts, false, s.scores[slot]);
}

HOTLOOP_INLINE std::uint64_t warp_sum(std::uint64_t x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += cuda::shuffle_xor(x, distance);
  return x;
}
HOTLOOP_INLINE std::uint64_t warp_add_scores(std::uint64_t x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = add_scores(x, cuda::shuffle_xor(x, distance));
  return x;
}

}  // namespace hotloop::table::gpu
