// SPDX-License-Identifier: Apache-2.0
// The pointwise loop: one head over n rows; value, gradient and reduced extra values in one pass.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/bisect.hpp"
#include "core/head.hpp"
#include "core/simd.hpp"
#include "core/view.hpp"

namespace hotloop::pointwise {

// A column of any float dtype; stride 0 repeats one value. Group columns have one element per group.
struct InputColumn {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  std::int64_t stride = 0;
};
struct OutputColumn {
  void* data = nullptr;  // nullptr: not wanted
  Dtype dtype = Dtype::kFloat32;
  std::int64_t stride = 0;
};

// Which group a row belongs to: `rows` neighbouring rows each, or the ranges between `count` + 1 ascending offsets from
// 0 to n.
struct Groups {
  std::int64_t rows = 1;
  const void* offsets = nullptr;  // int32 or int64, contiguous
  bool wide = false;              // int64
  std::int64_t count = 0;
};

HOTLOOP_INLINE std::int64_t offset_at(const Groups& groups, std::int64_t k) {
  return groups.wide ? static_cast<const std::int64_t*>(groups.offsets)[k]
                     : static_cast<const std::int32_t*>(groups.offsets)[k];
}
// The group that holds `row`: the last one that starts at or before it. A wrong offset still gives a group that exists.
HOTLOOP_INLINE std::int64_t group_of(const Groups& groups, std::int64_t row) {
  if (groups.offsets == nullptr) return row / groups.rows;
  return first_where(groups.count - 1, [&](std::int64_t k) { return offset_at(groups, k + 1) > row; });
}

// An extra value over the rows whose weight is not 0. Over no rows: 0, infinity, -infinity. NaN stays.
struct OutTotal {
  double sum, least, largest;
};

struct Call {
  std::int64_t n = 0;
  bool double_precision = false;
  std::array<InputColumn, kMaxInputs> inputs{};  // differentiable, of the row, of the group
  Groups groups{};
  // Multiplies the loss and the gradients of its row; a weight of 0 leaves the row out, whatever its inputs are.
  InputColumn weight{};
  std::array<double, kMaxParams> params{};
  std::array<OutputColumn, kMaxInputs> grads{};
  OutputColumn loss{};        // per row
  double* total = nullptr;    // sum over rows, added in row order whatever the thread count
  OutTotal* outs = nullptr;   // one per extra value of the head, reduced in the same order
  double* counted = nullptr;  // rows whose weight is not 0
  double grad_scale = 1.0;
};

// Blocks of rows of one head, compiled for one instruction set. Columns are dense arrays of blocks * kBlock elements;
// 24 of float32 are 24 KiB a block, which stay in an L1 of 32.
inline constexpr std::int64_t kBlock = 256;
template <class R>
using Block = void (*)(const R* const* in, const R* params, std::int64_t blocks, R scale, R* loss, R* const* grad,
                       R* const* out);

struct Entry {
  HeadInfo info;
  Block<float> block_float;
  Block<double> block_double;
};

// A head is named by its place in the lists, found once: [room] * kRoomStride + place in the room's list.
inline constexpr int kRoomStride = 1024;
const Entry& entry(int handle);  // of the instruction set in force; throws std::invalid_argument

// The heads compiled in, room by room: the place of a room and of a head in its room make the handle.
struct RoomInfo {
  const char* name;
  std::vector<HeadInfo> heads;
};
std::vector<RoomInfo> rooms();

// A room's heads as a loop finds them: entries, whose `info` says what a head is.
template <class Entry>
struct RoomHeads {
  const char* name;
  std::span<const Entry> (*heads)();
};
template <class Entry>
const Entry& find_head(const std::vector<RoomHeads<Entry>>& rooms, int handle) {
  const auto room = static_cast<std::size_t>(handle / kRoomStride);
  const auto place = static_cast<std::size_t>(handle % kRoomStride);
  if (handle < 0 || room >= rooms.size() || place >= rooms[room].heads().size()) {
    throw std::invalid_argument("[pointwise] head: got handle " + std::to_string(handle) +
                                ", which is not compiled in.");
  }
  return rooms[room].heads()[place];
}
template <class Entry>
std::vector<RoomInfo> infos_of(const std::vector<RoomHeads<Entry>>& rooms) {
  std::vector<RoomInfo> all;
  for (const RoomHeads<Entry>& room : rooms) {
    all.push_back({room.name, {}});
    for (const Entry& head : room.heads()) all.back().heads.push_back(head.info);
  }
  return all;
}

}  // namespace hotloop::pointwise

HOTLOOP_FOR_EACH_SIMD(void pointwise_loop(const pointwise::Entry& head, const pointwise::Call& call);)

namespace hotloop::pointwise {
inline void loop(const Entry& head, const Call& call) { HOTLOOP_SIMD_DISPATCH(pointwise_loop(head, call)) }
}  // namespace hotloop::pointwise
