#include "reward/heads.hpp"

#define HOTLOOP_ROOM reward
#include "core/room_heads.hpp"
