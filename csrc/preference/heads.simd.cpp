#include "preference/heads.hpp"

#include <atomic>

#include "core/pointwise.hpp"

#include "core/simd_begin.hpp"

#include "core/room_heads.hpp"
HOTLOOP_ROOM_HEADS(preference)

#include "core/simd_end.hpp"
