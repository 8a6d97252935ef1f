// SPDX-License-Identifier: Apache-2.0
// What every CUDA launcher and kernel needs: 64-bit thread indices (the only place that reads the
// built-in ones), the grid of a grid-stride loop, the device of a call, the check after a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace hotloop::cuda {

#if defined(__CUDACC__)
__device__ __forceinline__ std::int64_t block_index() { return static_cast<std::int64_t>(blockIdx.x); }
__device__ __forceinline__ std::int64_t thread_in_block() { return static_cast<std::int64_t>(threadIdx.x); }
__device__ __forceinline__ std::int64_t thread_index() {
  return block_index() * static_cast<std::int64_t>(blockDim.x) + thread_in_block();
}
__device__ __forceinline__ std::int64_t thread_count() {
  return static_cast<std::int64_t>(gridDim.x) * static_cast<std::int64_t>(blockDim.x);
}
#endif

inline constexpr std::int64_t kMaxGridBlocks = 2147483647;  // x extent, compute capability 3.0 on

// Blocks of a grid-stride loop over `items`, at most `most`.
inline unsigned int grid_blocks(const char* op, std::int64_t items, std::int64_t threads, std::int64_t most) {
  const std::int64_t wanted = items / threads + (items % threads != 0 ? 1 : 0);
  const std::int64_t blocks = wanted < most ? wanted : most;
  if (blocks > kMaxGridBlocks) {
    throw std::runtime_error(std::string("[") + op + "] launch: expected at most " + std::to_string(kMaxGridBlocks) +
                             " blocks, got " + std::to_string(blocks) + ". Pass fewer rows.");
  }
  return static_cast<unsigned int>(blocks);
}

// Makes a device current and puts the caller's back, since the current device is the whole
// thread's.
class DeviceScope {
 public:
  DeviceScope(const char* op, int device) {
    check(op, device, cudaGetDevice(&previous_));
    if (previous_ == device) return;
    check(op, device, cudaSetDevice(device));
    changed_ = true;
  }
  ~DeviceScope() {
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  static void check(const char* op, int device, cudaError_t status) {
    if (status == cudaSuccess) return;
    static_cast<void>(cudaGetLastError());  // the next call must not report this one's error
    throw std::runtime_error(std::string("[") + op + "] device: expected a usable CUDA device, got cuda:" +
                             std::to_string(device) + " (" + cudaGetErrorString(status) + ").");
  }

  int previous_ = 0;
  bool changed_ = false;
};

// Blocks of a kernel that the current device holds at once, `most` per multiprocessor.
inline std::int64_t resident_blocks(const char* op, const void* kernel, int threads, int most) {
  int device = 0, processors = 0, each = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0);
  }
  if (status != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    throw std::runtime_error(std::string("[") + op + "] device: " + cudaGetErrorName(status) + ": " +
                             cudaGetErrorString(status) + ".");
  }
  return static_cast<std::int64_t>(processors) * (each < most ? each : most);
}

// Throws if a launch since the last check was refused. Errors of the running kernel surface at the
// caller's next synchronisation, as for every other kernel on its stream.
inline void check_launch(const char* op) {
  const cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return;
  std::string text =
      std::string("[") + op + "] launch: " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status) + ".";
  if (status == cudaErrorNoKernelImageForDevice) {
    text += " hotloop._cuda is compiled for " HOTLOOP_CUDA_ARCH_LIST
            "; rebuild it with -C cmake.define.HOTLOOP_CUDA_ARCHS naming this device.";
  }
  throw std::runtime_error(text);
}

}  // namespace hotloop::cuda
