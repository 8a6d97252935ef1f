#include "unlearn/heads.hpp"

#include "kernels/core/pointwise.cuh"

HOTLOOP_ROOM_HEADS_CUDA(unlearn)
