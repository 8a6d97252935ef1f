// SPDX-License-Identifier: Apache-2.0
// What goes over all slots: expiry and export.
#pragma once

#include <cstdint>

#include "kernels/table/lookup.cuh"

namespace hotloop::table::gpu {

// Slots from `begin` on that are used and pass the test: a flag each.
struct FlagSlots {
  Store store;
  std::int64_t begin;
  std::uint32_t since;   // 0: all; else those whose version is above it
  std::uint32_t before;  // 0: all; else those last used before it
  std::uint8_t* flags;
  HOTLOOP_BOTH void each(std::int64_t i) const {
    const std::int64_t slot = begin + i;
    bool is = *digest_at(store, slot) != 0;
    if (is && since > 0) is = store.versions[slot] > since;
    if (is && before > 0) is = store.times[slot] < before;
    flags[i] = is ? 1 : 0;
  }
};

// See Table::renumber. What free slots hold does not matter.
struct Renumber {
  Store store;
  HOTLOOP_BOTH void each(std::int64_t slot) const { store.scores[slot] = renumbered(store.scores[slot]); }
};

struct EraseSlots {
  Store store;
  std::int64_t begin;
  const std::uint32_t* which;  // (m,) numbers from `begin` on
  std::uint64_t* keys;         // (m,) out, or null
  HOTLOOP_BOTH void each(std::int64_t i) const {
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
