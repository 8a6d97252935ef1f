#include "core/heads.hpp"

#define HOTLOOP_ROOM core
#include "core/room_heads.hpp"
