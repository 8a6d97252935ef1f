// SPDX-License-Identifier: Apache-2.0
// The table on a CUDA device: basic_table.cuh over machine.cuh.
#include "kernels/table/basic_table.cuh"
#include "kernels/table/machine.cuh"

namespace hotloop::table::gpu {

std::unique_ptr<DeviceTable> cuda_table(const Settings& settings, int device, void* stream) {
  return std::make_unique<BasicTable<CudaMachine>>(settings, CudaMachine(device, static_cast<cudaStream_t>(stream)));
}

}  // namespace hotloop::table::gpu
