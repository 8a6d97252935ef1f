// SPDX-License-Identifier: Apache-2.0
// Launchers of rows_backward.cuh.
#include "kernels/moe/rows_backward.cuh"

#include "kernels/moe/moe_cuda.hpp"

namespace hotloop::moe {

std::int64_t step_backward_cuda_bytes(const BackwardCall& call) { return gpu::step_backward_bytes(call); }

void step_backward_cuda(const BackwardCall& call, const LiveNumbers& numbers, const CudaPlace& place) {
  const cuda::DeviceScope scope("moe", place.device);
  gpu::step_backward(call, gpu::Numbers(call.numbers, numbers.data, numbers.count), place.workspace,
                     gpu::Launches{"moe", static_cast<cudaStream_t>(place.stream)});
}

}  // namespace hotloop::moe
