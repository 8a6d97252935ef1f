// SPDX-License-Identifier: Apache-2.0
// The CUDA device under a table: the `Machine` that basic_table.cuh is written over. It allocates memory, copies, sorts
// and selects with cub, and launches bodies whose warps stride over the work.
//
// Everything runs on one stream at a time. A verb that comes on another stream waits for the last one by an event. A
// stream that is being captured in a CUDA graph is refused, since a table reads numbers back.
#pragma once

#include <cuda_runtime.h>

#include <thrust/iterator/counting_iterator.h>
#include <cstdint>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_select.cuh>
#include <stdexcept>
#include <string>

#include "kernels/core/launch.cuh"
#include "kernels/table/buffers.cuh"
#include "kernels/table/lookup.cuh"

namespace hotloop::table::gpu {

inline constexpr int kThreads = 256;
inline constexpr int kWarpsPerBlock = kThreads / kWarp;
// Scratch of a warp lies in shared memory up to this, eight warps of it in 32 KB; wider rows get device memory.
inline constexpr std::int64_t kSharedFloats = 1024;
// Blocks at most: of launches whose scratch is in device memory, and of others.
inline constexpr std::int64_t kScratchBlocks = 264;
inline constexpr std::int64_t kMostBlocks = std::int64_t{1} << 22;

template <class Body>
__global__ void __launch_bounds__(kThreads)
    run_warps(const __grid_constant__ Body body, std::int64_t warps, std::int64_t floats, float* device_scratch) {
  extern __shared__ float shared_scratch[];
  const std::int64_t first = cuda::thread_index() / kWarp, all = cuda::thread_count() / kWarp;
  const auto lane = static_cast<int>(cuda::thread_in_block() % kWarp);
  float* const scratch = device_scratch != nullptr ? device_scratch + first * floats
                                                   : shared_scratch + cuda::thread_in_block() / kWarp * floats;
  for (std::int64_t warp = first; warp < warps; warp += all) body(warp, lane, scratch);
}

struct Iota {
  std::uint32_t* out;
  HOTLOOP_BOTH void each(std::int64_t i) const { out[i] = static_cast<std::uint32_t>(i); }
};

class CudaMachine {
 public:
  using Scratch = Buffers<CudaMachine>;

  CudaMachine(int device, cudaStream_t stream) : device_(device), stream_(stream) {}
  CudaMachine(CudaMachine&& o) noexcept : device_(o.device_), stream_(o.stream_), done_(o.done_) { o.done_ = nullptr; }
  CudaMachine& operator=(CudaMachine&&) = delete;
  ~CudaMachine() {
    if (done_ != nullptr) static_cast<void>(cudaEventDestroy(done_));
  }

  // Later calls run on this stream, behind what ran on the last one.
  void use(void* next) {
    const auto stream = static_cast<cudaStream_t>(next);
    if (stream == stream_) return;
    const cuda::DeviceScope scope("Table", device_);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check("stream", cudaStreamIsCapturing(stream, &status));
    // One that is captured cannot wait for what is not part of the graph; the verb then refuses it.
    if (status == cudaStreamCaptureStatusNone && done_ != nullptr) {
      check("stream", cudaStreamWaitEvent(stream, done_, 0));
    }
    stream_ = stream;
  }

  // A verb: the device is current, and its end is noted for another stream to wait for.
  class Entered {
   public:
    explicit Entered(CudaMachine& machine) : scope_("Table", machine.device_), machine_(machine) {
      cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
      machine_.check("stream", cudaStreamIsCapturing(machine_.stream_, &status));
      if (status != cudaStreamCaptureStatusNone) {
        throw std::runtime_error(
            "[Table] stream: expected one outside the capture of a CUDA graph, got one that is "
            "captured. What a table does depends on numbers that it reads back.");
      }
      if (machine_.done_ == nullptr) {
        machine_.check("event", cudaEventCreateWithFlags(&machine_.done_, cudaEventDisableTiming));
      }
    }
    ~Entered() { static_cast<void>(cudaEventRecord(machine_.done_, machine_.stream_)); }
    Entered(const Entered&) = delete;
    Entered& operator=(const Entered&) = delete;

   private:
    cuda::DeviceScope scope_;
    CudaMachine& machine_;
  };
  Entered enter() { return Entered(*this); }

  void* allocate(std::size_t bytes) {
    void* at = nullptr;
    const cudaError_t status = cudaMalloc(&at, bytes);
    if (status == cudaSuccess) return at;
    static_cast<void>(cudaGetLastError());
    throw std::runtime_error("[Table] memory: expected " + std::to_string(bytes) +
                             " free bytes on cuda:" + std::to_string(device_) + ", got " + cudaGetErrorName(status) +
                             " (" + cudaGetErrorString(status) + "). Nothing was written by the call.");
  }
  // Waits for running kernels, which may still read the memory.
  void release(void* at) {
    int before = 0;
    if (cudaGetDevice(&before) == cudaSuccess) static_cast<void>(cudaSetDevice(device_));
    static_cast<void>(cudaFree(at));
    static_cast<void>(cudaSetDevice(before));
    static_cast<void>(cudaGetLastError());
  }
  void fill(void* at, int byte, std::size_t bytes) { check("fill", cudaMemsetAsync(at, byte, bytes, stream_)); }
  void upload(void* to, const void* from, std::size_t bytes) {
    check("upload", cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
    check("upload", cudaStreamSynchronize(stream_));  // the caller's memory may go away
  }
  void download(void* to, const void* from, std::size_t bytes) {
    check("download", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
    check("download", cudaStreamSynchronize(stream_));
  }
  void copy(void* to, const void* from, std::size_t bytes) {
    check("copy", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_));
  }

  template <class Body>
  void run(const Body& body, std::int64_t floats, Scratch& scratch) {
    const std::int64_t warps = body.warps();
    if (warps <= 0) return;
    const bool wide = floats > kSharedFloats;
    const unsigned int blocks = cuda::grid_blocks("Table", warps, kWarpsPerBlock, wide ? kScratchBlocks : kMostBlocks);
    // A body without scratch allocates nothing, and thus cannot fail for want of memory.
    Held<CudaMachine, float> device_scratch;
    if (wide) device_scratch = scratch.template take<float>(blocks * kWarpsPerBlock * floats);
    const auto shared = wide ? 0 : static_cast<std::size_t>(kWarpsPerBlock * floats) * sizeof(float);
    run_warps<Body><<<blocks, kThreads, shared, stream_>>>(body, warps, floats, device_scratch.get());
    cuda::check_launch("Table");
  }

  // Numbers of the flags that are set, in order, and how many.
  void select(const std::uint8_t* flags, std::int64_t n, std::uint32_t* which, std::uint32_t* count, Scratch& scratch) {
    const thrust::counting_iterator<std::uint32_t> numbers(0);
    with_room(scratch, [&](void* room, std::size_t& bytes) {
      return cub::DeviceSelect::Flagged(room, bytes, numbers, flags, which, count, n, stream_);
    });
  }
  std::int64_t select_room(std::int64_t n) {
    const thrust::counting_iterator<std::uint32_t> numbers(0);
    std::size_t bytes = 0;
    std::uint8_t* const flags = nullptr;
    std::uint32_t* const out = nullptr;
    check("sort", cub::DeviceSelect::Flagged(nullptr, bytes, numbers, flags, out, out, n, stream_));
    return static_cast<std::int64_t>(bytes);
  }
  void sort_hashes(std::uint64_t* hashes, std::uint32_t* positions, std::int64_t n, Scratch& scratch) {
    const auto other_hashes = scratch.take<std::uint64_t>(n);
    const auto other_positions = scratch.take<std::uint32_t>(n);
    cub::DoubleBuffer<std::uint64_t> keys(hashes, other_hashes.get());
    cub::DoubleBuffer<std::uint32_t> values(positions, other_positions.get());
    with_room(scratch, [&](void* room, std::size_t& bytes) {
      return cub::DeviceRadixSort::SortPairs(room, bytes, keys, values, n, 0, 64, stream_);
    });
    if (keys.Current() != hashes) copy(hashes, keys.Current(), static_cast<std::size_t>(n) * 8);
    if (values.Current() != positions) copy(positions, values.Current(), static_cast<std::size_t>(n) * 4);
  }
  // Stable, by the lower `bits` bits.
  void sort_slots(const std::uint32_t* slots, std::int64_t n, int bits, std::uint32_t* sorted, std::uint32_t* positions,
                  Scratch& scratch) {
    const auto numbers = scratch.take<std::uint32_t>(n);
    run(EachLane<Iota>{{numbers.get()}, n}, 0, scratch);
    with_room(scratch, [&](void* room, std::size_t& bytes) {
      return cub::DeviceRadixSort::SortPairs(room, bytes, slots, sorted, numbers.get(), positions, n, 0, bits, stream_);
    });
  }

 private:
  // cub says how much it needs when it is given nothing.
  template <class Call>
  void with_room(Scratch& scratch, Call&& call) {
    std::size_t bytes = 0;
    check("sort", call(nullptr, bytes));
    const auto room = scratch.take<char>(static_cast<std::int64_t>(bytes));
    check("sort", call(room.get(), bytes));
  }
  void check(const char* what, cudaError_t status) const {
    if (status == cudaSuccess) return;
    static_cast<void>(cudaGetLastError());
    throw std::runtime_error(std::string("[Table] ") + what + ": expected success on cuda:" + std::to_string(device_) +
                             ", got " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ").");
  }

  int device_;
  cudaStream_t stream_;
  cudaEvent_t done_ = nullptr;
};

}  // namespace hotloop::table::gpu
