// SPDX-License-Identifier: Apache-2.0
// Launchers of route.cuh and dispatch.cuh.
#include "kernels/moe/dispatch.cuh"
#include "kernels/moe/moe_cuda.hpp"
#include "kernels/moe/route.cuh"
#include "kernels/moe/route_backward.cuh"

namespace hotloop::moe {

namespace {

gpu::Launches launches(const char* op, const CudaPlace& place) { return {op, static_cast<cudaStream_t>(place.stream)}; }

}  // namespace

std::int64_t route_cuda_bytes(const RouteCall& call) {
  gpu::Arrays arrays(nullptr);
  static_cast<void>(gpu::parts_of(call, arrays));
  return arrays.bytes();
}

void route_cuda(const RouteCall& call, const CudaPlace& place) {
  const cuda::DeviceScope scope("route", place.device);
  gpu::route(call, place.workspace, launches("route", place));
}

void route_backward_cuda(const RouteBackwardCall& call, const CudaPlace& place) {
  const cuda::DeviceScope scope("route", place.device);
  gpu::route_backward(call, launches("route", place));
}

std::int64_t dispatch_cuda_bytes(const DispatchCall& call) {
  gpu::Arrays arrays(nullptr);
  static_cast<void>(gpu::DispatchArrays(call, arrays));
  return arrays.bytes();
}

void dispatch_cuda(const DispatchCall& call, const CudaPlace& place) {
  const cuda::DeviceScope scope("dispatch", place.device);
  gpu::dispatch(call, place.workspace, launches("dispatch", place), [&](const segments::CudaSortCall& sort) {
    segments::counting_sort_cuda(sort, {place.device, place.stream});
  });
}

}  // namespace hotloop::moe
