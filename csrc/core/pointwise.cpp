// SPDX-License-Identifier: Apache-2.0
#include "core/pointwise.hpp"

// HOTLOOP_ROOM(<room>) for every room with heads, written by CMake.
#define HOTLOOP_ROOM(room) HOTLOOP_FOR_EACH_SIMD(std::span<const pointwise::Entry> room##_heads();)
#include "pointwise_rooms.inc"
#undef HOTLOOP_ROOM

namespace hotloop::pointwise {

namespace {

#define HOTLOOP_ROOM(room) \
  std::span<const Entry> room##_heads() { HOTLOOP_SIMD_DISPATCH(room##_heads()) }
#include "pointwise_rooms.inc"
#undef HOTLOOP_ROOM

const std::vector<RoomHeads<Entry>> kRooms = {
#define HOTLOOP_ROOM(room) {#room, room##_heads},
#include "pointwise_rooms.inc"
#undef HOTLOOP_ROOM
};

}  // namespace

const Entry& entry(int handle) { return find_head(kRooms, handle); }

std::vector<RoomInfo> rooms() { return infos_of(kRooms); }

}  // namespace hotloop::pointwise
