// SPDX-License-Identifier: Apache-2.0
// Launchers of segments.cuh.
#include "kernels/core/segments.cuh"

#include <cuda_runtime.h>

#include "kernels/core/launch.cuh"

namespace hotloop::segments {

namespace {

constexpr int kThreads = 128;
constexpr std::int64_t kMostBlocks = 8192;  // more warps than any device holds

template <class Body>
__global__ void __launch_bounds__(kThreads) warps_kernel(const __grid_constant__ Body body) {
  constexpr int kWarps = kThreads / cuda::kWarp;
  __shared__ std::uint64_t scratch[kWarps][Body::kScratch > 0 ? Body::kScratch : 1];
  const auto warp = static_cast<int>(cuda::thread_in_block() / cuda::kWarp);
  const auto lane = static_cast<int>(cuda::thread_in_block() % cuda::kWarp);
  const std::int64_t step = cuda::thread_count() / cuda::kWarp;
  for (std::int64_t w = cuda::thread_index() / cuda::kWarp; w < body.warps(); w += step) body(w, lane, scratch[warp]);
}

// Launches body after body on one stream.
struct Launches {
  const char* op;
  cudaStream_t stream;
  template <class Body>
  void operator()(const Body& body) const {
    if (body.warps() == 0) return;
    const unsigned int blocks = cuda::grid_blocks(op, body.warps(), kThreads / cuda::kWarp, kMostBlocks);
    warps_kernel<<<blocks, kThreads, 0, stream>>>(body);
    cuda::check_launch(op);
  }
};

}  // namespace

void segment_reduce_cuda(const ReduceCall& call, const CudaStream& where) {
  const cuda::DeviceScope scope("segment_reduce", where.device);
  gpu::reduce(call, Launches{"segment_reduce", static_cast<cudaStream_t>(where.stream)});
}

void segment_spread_cuda(const SpreadCall& call, const CudaStream& where) {
  const cuda::DeviceScope scope("segment_reduce", where.device);
  gpu::spread(call, Launches{"segment_reduce", static_cast<cudaStream_t>(where.stream)});
}

void counting_sort_cuda(const CudaSortCall& call, const CudaStream& where) {
  const cuda::DeviceScope scope("counting_sort", where.device);
  gpu::sort(call, Launches{"counting_sort", static_cast<cudaStream_t>(where.stream)});
}

}  // namespace hotloop::segments
