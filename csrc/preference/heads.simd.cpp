#include "preference/heads.hpp"

#define HOTLOOP_ROOM preference
#include "core/room_heads.hpp"
