// What goes over all slots: expiry and export.
#pragma once

#include <cstdint>

#include "kernels/table/lookup.cuh"

namespace hotloop::table::gpu {

// Slots of [begin, begin + n) that are used and pass the test: a flag each.
struct FlagSlots {
  static constexpr std::int64_t kScratch = 0;
  Store store;
  std::int64_t begin, n;
  std::uint32_t since;   // 0: all; else those whose version is above it
  std::uint32_t before;  // 0: all; else those last used before it
  std::uint8_t* flags;
  std::int64_t warps() const { return blocks_of(n, kWarp); }
  HOTLOOP_BOTH void operator()(std::int64_t warp, int lane, float*) const {
    const std::int64_t i = warp * kWarp + lane, slot = begin + i;
    if (i >= n) return;
    bool is = *digest_at(store, slot) != 0;
    if (is && since > 0) is = store.versions[slot] > since;
    if (is && before > 0) is = store.times[slot] < before;
    flags[i] = is ? 1 : 0;
  }
};

// See Table::renumber. What free slots hold does not matter.
struct Renumber {
  static constexpr std::int64_t kScratch = 0;
  Store store;
  std::int64_t warps() const { return blocks_of(store.slots(), kWarp); }
  HOTLOOP_BOTH void operator()(std::int64_t warp, int lane, float*) const {
    const std::int64_t slot = warp * kWarp + lane;
    if (slot < store.slots()) store.scores[slot] = renumbered(store.scores[slot]);
  }
};

struct EraseSlots {
  static constexpr std::int64_t kScratch = 0;
  Store store;
  std::int64_t begin;
  const std::uint32_t* which;  // (m,) numbers from `begin` on
  std::int64_t m;
  std::uint64_t* keys;  // (m,) out, or null
  std::int64_t warps() const { return blocks_of(m, kWarp); }
  HOTLOOP_BOTH void operator()(std::int64_t warp, int lane, float*) const {
    const std::int64_t i = warp * kWarp + lane;
    if (i >= m) return;
    const std::int64_t slot = begin + which[i];
    *digest_at(store, slot) = 0;
    if (keys != nullptr) keys[i] = store.keys[slot];
  }
};

// Rows without gaps, a warp for each.
struct Gather {
  static constexpr std::int64_t kScratch = 0;
  Store store;
  Shape shape;
  std::int64_t begin;
  const std::uint32_t* which;
  std::int64_t m;
  std::uint64_t* keys;  // (m,) out, and so on; null where not wanted
  Matrix values, state;
  std::uint64_t* scores;
  std::uint32_t* times;
  std::int64_t warps() const { return m; }
  HOTLOOP_BOTH void operator()(std::int64_t i, int lane, float*) const {
    const std::int64_t slot = begin + which[i];
    const char* row = row_at(store, shape, slot);
    if (values.data != nullptr) copy_row(values.row(i), row, shape.value_bytes, values.access, lane, kWarp);
    if (state.data != nullptr) copy_row(state.row(i), row + shape.state, shape.states * 4, 4, lane, kWarp);
    if (lane != 0) return;
    if (keys != nullptr) keys[i] = store.keys[slot];
    if (scores != nullptr) scores[i] = store.scores != nullptr ? store.scores[slot] : 0;
    if (times != nullptr) times[i] = store.times != nullptr ? store.times[slot] : 0;
  }
};

}  // namespace hotloop::table::gpu
