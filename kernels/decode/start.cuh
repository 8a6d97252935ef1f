// SPDX-License-Identifier: Apache-2.0
// From a call to a launch: the plan for this device, the workspace, and a cooperative launch, which
// keeps the blocks of a team resident together. Can be captured in a CUDA graph.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/core/launch.cuh"
#include "kernels/decode/decode_cuda.hpp"
#include "kernels/decode/requests.cuh"

namespace hotloop::decode::gpu {

inline constexpr int kThreads = 512;

// The workspace is laid out for so many blocks per multiprocessor, whatever a kernel's own number
// is.
inline constexpr int kBlocksPerProcessor = 1;

struct Work {
  std::int64_t requests, rows;  // rows: that one may open
  std::int64_t vocabulary, row_bytes;
  std::int64_t width, biases;
};

// Fills in what the launch does not know yet, and enqueues it.
template <class Launch>
void start(const char* op, void (*kernel)(const Launch), Launch launch, const Work& work, const CudaTarget& target) {
  if (work.requests <= 0) return;
  const cuda::DeviceScope scope(op, target.device);
  const void* entry = reinterpret_cast<const void*>(kernel);
  const std::int64_t resident = cuda::resident_blocks(op, entry, kThreads, kBlocksPerProcessor);
  if (resident < 1) throw std::runtime_error(std::string("[") + op + "] device: no block of the kernel fits.");
  launch.plan = plan_of(resident, work.requests, work.vocabulary, work.rows, work.row_bytes);
  launch.places = layout_of(resident, work.width, work.biases);
  launch.workspace = static_cast<char*>(target.workspace);
  if (launch.places.bytes > target.workspace_bytes) {
    throw std::runtime_error(std::string("[") + op + "] workspace: expected " + std::to_string(launch.places.bytes) +
                             " bytes, got " + std::to_string(target.workspace_bytes) + ".");
  }
  const auto grid = [&] {
    const std::int64_t blocks = launch.plan.teams * launch.plan.blocks;
    return dim3(cuda::grid_blocks(op, blocks, 1, blocks));
  };
  const dim3 threads(kThreads);
  void* arguments[] = {&launch};
  const cudaStream_t stream = static_cast<cudaStream_t>(target.stream);
  if (launch.plan.blocks > 1) {
    const cudaError_t status = cudaLaunchCooperativeKernel(entry, grid(), threads, arguments, 0, stream);
    if (status != cudaErrorCooperativeLaunchTooLarge) return cuda::check_launch(op);
    // One block per multiprocessor leaves no room for what a sanitizer or another process takes.
    static_cast<void>(cudaGetLastError());
    launch.plan = apart(launch.plan, resident, work.requests);
  }
  static_cast<void>(cudaLaunchKernel(entry, grid(), threads, arguments, 0, stream));
  cuda::check_launch(op);
}

}  // namespace hotloop::decode::gpu
