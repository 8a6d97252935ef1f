// The pair loop on a CUDA device. No CUDA header is needed to call it.
#pragma once

#include <array>

#include "preference/pair.hpp"

namespace hotloop::preference {

// Blocks of a launch at most, each of which leaves one partial sum. With blocks of 128 threads and
// four rows of float32 a thread, 131072 threads ask for 64 bytes of DPO inputs each: 8 MB at once,
// where 3.35 TB/s times 0.7 us of latency is 2.3 MB (derived, not measured). A head of up to 64
// registers, as nearly all have, runs as one wave on 128 multiprocessors or more. A constant, not a
// property of the device, so that the sum has the same order on every device.
inline constexpr int kPairPartials = 1024;

struct PairCudaCall {
  PairCall pairs;  // pointers to device memory; `pairs.total` is not used
  // inputs[k].data is one double in host memory, read before the launcher returns.
  std::array<bool, kMaxHeadInputs> on_host{};
  OutputColumn total{};        // one element, float32 or float64: the sum over rows, in a fixed order
  double* partials = nullptr;  // (kPairPartials,) scratch; needed if `total` is wanted
  int device = 0;
  void* stream = nullptr;  // cudaStream_t
};

// Enqueues the loop on the stream; throws std::runtime_error if the device refuses it.
void pair_loop_cuda(const PairCudaCall& call);

}  // namespace hotloop::preference
