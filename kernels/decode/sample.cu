// SPDX-License-Identifier: Apache-2.0
// Sampling on a CUDA device: a row is a request of its own, opened, truncated and drawn from by a
// team of thread blocks (rows.cuh). The row is read once from memory and once from L2; drawing a
// token from it looks at one warp's stretch again, and truncation at the whole row for each digit
// of a threshold.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/core/launch.cuh"
#include "kernels/decode/decode_cuda.hpp"
#include "kernels/decode/start.cuh"

namespace hotloop::decode {

namespace {

using namespace gpu;

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    sample_kernel(const __grid_constant__ SampleLaunch launch) {
  using Memory = BlockMemory<kThreads>;
  __shared__ alignas(16) unsigned char memory[sizeof(Memory)];  // its structs have initialisers
  sample_block(*reinterpret_cast<Memory*>(memory), launch, cuda::thread_in_block(), cuda::block_index());
}

}  // namespace

void sample_cuda(const SampleCall& call, const CudaTarget& target) {
  const Work work{
      call.batch * call.rows, 1, call.law.vocabulary, call.law.vocabulary * item_size(call.law.rows.dtype), 0,
      call.law.biases};
  SampleLaunch launch{};
  launch.call = call;
  start("sample", sample_kernel, launch, work, target);
}

}  // namespace hotloop::decode
