// SPDX-License-Identifier: Apache-2.0
// How a body runs whose unit is a thread block: it says how many blocks it wants, of how many threads, with how many
// bytes of shared memory, and runs for every thread of each; in tests on the emulated GPU.
#pragma once

#include <cstdint>

#include "core/macros.hpp"
#include "kernels/core/threads.cuh"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels/core/launch.cuh"
#endif

namespace hotloop::moe::gpu {

using cuda::kWarp;

// Arrays one after the other in shared or device memory, each from a multiple of 16 bytes on.
class Arrays {
 public:
  HOTLOOP_BOTH explicit Arrays(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  HOTLOOP_BOTH T* take(std::int64_t count) {
#if defined(__CUDA_ARCH__)
    T* const first = reinterpret_cast<T*>(memory_ + bytes_);
#else  // of no memory only the bytes are asked for
    T* const first = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
#endif
    bytes_ += (count * static_cast<std::int64_t>(sizeof(T)) + 15) / 16 * 16;
    return first;
  }
  HOTLOOP_BOTH std::int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  std::int64_t bytes_ = 0;
};

#if defined(__CUDACC__)

template <class Body>
__global__ void __launch_bounds__(Body::kMostThreads) blocks_kernel(const __grid_constant__ Body body) {
  extern __shared__ __align__(16) unsigned char shared[];
  const auto thread = static_cast<int>(cuda::thread_in_block());
  body(cuda::block_index(), thread, shared);
}

// Launches body after body on one stream.
struct Launches {
  const char* op;
  cudaStream_t stream;

  template <class Body>
  void operator()(const Body& body) const {
    const std::int64_t blocks = body.blocks();
    if (blocks <= 0) return;
    const std::int64_t shared = body.shared_bytes();
    if (shared > kUnasked) {
      check(shared, cudaFuncSetAttribute(blocks_kernel<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(shared)));
    }
    const unsigned int grid = cuda::grid_blocks(op, blocks, 1, blocks);
    blocks_kernel<<<grid, static_cast<unsigned int>(body.threads()), static_cast<std::size_t>(shared), stream>>>(body);
    cuda::check_launch(op);
  }

 private:
  static constexpr std::int64_t kUnasked = 48 << 10;  // that a launch may take without asking

  void check(std::int64_t shared, cudaError_t status) const {
    if (status == cudaSuccess) return;
    static_cast<void>(cudaGetLastError());
    throw std::runtime_error(std::string("[") + op + "] launch: expected a device with " + std::to_string(shared) +
                             " bytes of shared memory for a block, got one with less (" + cudaGetErrorString(status) +
                             "). Pass impl=\"reference\".");
  }
};

#endif

}  // namespace hotloop::moe::gpu
