// SPDX-License-Identifier: Apache-2.0
// The verification and sampling loops on a CUDA device. No CUDA header is needed to call them.
#pragma once

#include <cstdint>

#include "decode/loops.hpp"

namespace hotloop::decode {

// Where and with what a loop runs. The first bytes of the workspace must be zeroed when it is
// allocated and never again: what a launch leaves behind, the next one, of whatever size, starts from. One launch at a
// time may use it.
struct CudaTarget {
  void* workspace = nullptr;
  std::int64_t workspace_bytes = 0;
  int device = 0;
  void* stream = nullptr;  // cudaStream_t
};

// Bytes that are enough for every launch of that width on the device, and how many of them, from
// the first on, must be zero: what lies behind is written by every launch before it reads it.
struct WorkspaceBytes {
  std::int64_t all = 0, zeroed = 0;
};
WorkspaceBytes decode_workspace_bytes(int device, std::int64_t width, std::int64_t biases);

// All pointers of the call are to device memory. Enqueued on the stream; std::runtime_error if the
// device refuses. Chains with temperature 0 are greedy verification.
void chain_cuda(const VerifyCall& call, const CudaTarget& target);
void block_cuda(const VerifyCall& call, const CudaTarget& target);
void tree_cuda(const TreeCall& call, const CudaTarget& target);
void sample_cuda(const SampleCall& call, const CudaTarget& target);

}  // namespace hotloop::decode
