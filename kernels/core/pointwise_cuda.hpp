// SPDX-License-Identifier: Apache-2.0
// The pointwise loop on a CUDA device. No CUDA header is needed to call it.
#pragma once

#include <array>
#include <vector>

#include "core/pointwise.hpp"

namespace hotloop::pointwise {

// Blocks of a launch at most, each of which leaves one partial sum. With blocks of 128 threads and
// four rows of float32 a thread, 131072 threads ask for 64 bytes of DPO inputs each: 8 MB at once,
// where 3.35 TB/s times 0.7 us of latency is 2.3 MB (derived, not measured). A head of up to 64
// registers, as nearly all have, runs as one wave on 128 multiprocessors or more. A constant, not a
// property of the device, so that the sum has the same order on every device.
inline constexpr int kPartials = 1024;

// Numbers that a block leaves where extra values are wanted: the sum, the rows that count, and three per extra value.
inline constexpr int kWidth = 2 + 3 * kMaxOuts;

struct CudaCall {
  Call rows;  // pointers to device memory; `total`, `outs` and `counted` of it are not used
  // inputs[k].data is one double in host memory, read before the launcher returns.
  std::array<bool, kMaxInputs + 1> on_host{};
  OutputColumn total{};        // one element, float32 or float64: the sum over rows, in a fixed order
  double* outs = nullptr;      // (extra values, 3): sum, least, largest
  double* counted = nullptr;   // one element; needed with `outs`
  double* partials = nullptr;  // (kPartials,) scratch, with `outs` (kPartials * kWidth,); needed for sums
  int device = 0;
  void* stream = nullptr;  // cudaStream_t
};

const HeadInfo& info_cuda(int handle);  // throws std::invalid_argument
std::vector<RoomInfo> rooms_cuda();

// Enqueues the loop on the stream; throws std::runtime_error if the device refuses it.
void loop_cuda(int handle, const CudaCall& call);

}  // namespace hotloop::pointwise
