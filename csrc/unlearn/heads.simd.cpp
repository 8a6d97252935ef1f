#include "unlearn/heads.hpp"

#define HOTLOOP_ROOM unlearn
#include "core/room_heads.hpp"
