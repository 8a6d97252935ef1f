// SPDX-License-Identifier: Apache-2.0
// Segments on a CUDA device. No CUDA header is needed to call it. Nothing is allocated and nothing waits; offsets, ids
// and keys are trusted.
#pragma once

#include <cstdint>

#include "core/segments.hpp"

namespace hotloop::segments {

// Positions of a tile: what one warp reads one after the other at most.
inline constexpr std::int64_t kCudaTile = 1024;
// Keys that one warp of a sort counts and moves; bits of a pass.
inline constexpr std::int64_t kCudaSortTile = 1024;
inline constexpr int kCudaDigitBits = 8;

struct CudaStream {
  int device = 0;
  void* stream = nullptr;  // cudaStream_t
};

constexpr std::int64_t cuda_tiles(std::int64_t n, std::int64_t tile) { return n / tile + (n % tile != 0 ? 1 : 0); }

// Groups by offsets, with `call.order` where ids were sorted; `call.parts` holds 2 cuda_tiles(n, kCudaTile) x columns.
void segment_reduce_cuda(const ReduceCall& call, const CudaStream& where);
void segment_spread_cuda(const SpreadCall& call, const CudaStream& where);

struct CudaSortCall {
  const void* keys = nullptr;  // (n,)
  Dtype dtype = Dtype::kInt64;
  std::int64_t n = 0, num_keys = 0;
  std::int64_t* order = nullptr;    // (n,)
  std::int64_t* counts = nullptr;   // (num_keys,) or nullptr
  std::int64_t* offsets = nullptr;  // (num_keys + 1,) or nullptr
  std::int64_t* other = nullptr;    // (n,): scratch; not needed below 257 keys
  std::int64_t* starts = nullptr;   // (256 (cuda_tiles(n, kCudaSortTile) + 1),): scratch
  // (n,): equal keys keep this order, which is that of no other array here; nullptr: as they came.
  const std::int64_t* from = nullptr;
};
void counting_sort_cuda(const CudaSortCall& call, const CudaStream& where);

}  // namespace hotloop::segments
