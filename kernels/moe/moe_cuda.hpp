// SPDX-License-Identifier: Apache-2.0
// The router, the order of expert rows and the pass over rows on a CUDA device. No CUDA header is needed to call it.
// Nothing waits for the device, and memory is the caller's: a call names the bytes that it needs.
#pragma once

#include <cstdint>

#include "moe/route.hpp"
#include "moe/row_pass.hpp"

namespace hotloop::moe {

struct CudaPlace {
  void* workspace = nullptr;  // a multiple of 256 bytes, of device memory
  int device = 0;
  void* stream = nullptr;  // cudaStream_t
};

// Logits that have no softmax give NaN, and a bias that is not finite gives weights of no meaning; ids stay experts.
// Offsets out of range are moved into it.
std::int64_t route_cuda_bytes(const RouteCall& call);
void route_cuda(const RouteCall& call, const CudaPlace& place);
void route_backward_cuda(const RouteBackwardCall& call, const CudaPlace& place);

// An id out of range goes nowhere.
std::int64_t dispatch_cuda_bytes(const DispatchCall& call);
void dispatch_cuda(const DispatchCall& call, const CudaPlace& place);

// The first numbers of a rule, in device memory, in the place of those of the call.
struct LiveNumbers {
  const double* data = nullptr;
  int count = 0;
};

// Where a slot and its row do not name each other, the slot goes nowhere.
void step_cuda(const StepCall& call, const LiveNumbers& numbers, const CudaPlace& place);
std::int64_t step_backward_cuda_bytes(const BackwardCall& call);
void step_backward_cuda(const BackwardCall& call, const LiveNumbers& numbers, const CudaPlace& place);
void permute_cuda(const Rows& x, std::int64_t tokens, std::int64_t columns, const Slots& slots, const RowsOut& out,
                  const CudaPlace& place);

}  // namespace hotloop::moe
