// SPDX-License-Identifier: Apache-2.0
// Launchers of rows.cuh.
#include "kernels/moe/rows.cuh"

#include "kernels/moe/moe_cuda.hpp"

namespace hotloop::moe {

void step_cuda(const StepCall& call, const LiveNumbers& numbers, const CudaPlace& place) {
  const cuda::DeviceScope scope("moe", place.device);
  gpu::step(call, gpu::Numbers(call.numbers, numbers.data, numbers.count),
            gpu::Launches{"moe", static_cast<cudaStream_t>(place.stream)});
}

void permute_cuda(const Rows& x, std::int64_t tokens, std::int64_t columns, const Slots& slots, const RowsOut& out,
                  const CudaPlace& place) {
  const cuda::DeviceScope scope("permute", place.device);
  gpu::permute(x, tokens, columns, slots, out, gpu::Launches{"permute", static_cast<cudaStream_t>(place.stream)});
}

}  // namespace hotloop::moe
