#include "core/pointwise.hpp"

#include <stdexcept>
#include <string>
#include <vector>

// HOTLOOP_ROOM(<room>) for every csrc/<room>/heads.simd.cpp, written by CMake.
#define HOTLOOP_ROOM(room) HOTLOOP_FOR_EACH_SIMD(std::span<const pointwise::Entry> room##_heads();)
#include "pointwise_rooms.inc"
#undef HOTLOOP_ROOM

namespace hotloop::pointwise {

namespace {

#define HOTLOOP_ROOM(room) \
  std::span<const Entry> room##_heads() { HOTLOOP_SIMD_DISPATCH(room##_heads()) }
#include "pointwise_rooms.inc"
#undef HOTLOOP_ROOM

using Heads = std::span<const Entry> (*)();
struct Room {
  const char* name;
  Heads heads;
};
const std::vector<Room> kRooms = {
#define HOTLOOP_ROOM(room) {#room, room##_heads},
#include "pointwise_rooms.inc"
#undef HOTLOOP_ROOM
};

}  // namespace

const Entry& entry(int handle) {
  const auto room = static_cast<std::size_t>(handle / kRoomStride);
  const auto place = static_cast<std::size_t>(handle % kRoomStride);
  if (handle < 0 || room >= kRooms.size() || place >= kRooms[room].heads().size()) {
    throw std::invalid_argument("[pointwise] head: got handle " + std::to_string(handle) +
                                ", which is not compiled in.");
  }
  return kRooms[room].heads()[place];
}

std::vector<RoomInfo> rooms() {
  std::vector<RoomInfo> all;
  for (const Room& room : kRooms) {
    all.push_back({room.name, {}});
    for (const Entry& head : room.heads()) all.back().heads.push_back(head.info);
  }
  return all;
}

}  // namespace hotloop::pointwise
