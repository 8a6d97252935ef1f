// SPDX-License-Identifier: Apache-2.0
// Chain, block and tree verification on a CUDA device: the walks of the CPU over rows that a team
// of thread blocks reads together (rows.cuh). One launch verifies the whole batch. With few
// requests a team is many blocks and the vocabulary is split over them; with more requests than
// multiprocessors it is one block, which sends no letters. What is read: for each row of the target
// that the walk visits, and for the draft's row beside it, the row once from memory and once from
// L2; for the row of a rejection both once more from L2. Nothing of the size of a row is written.
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>

#include "kernels/core/launch.cuh"
#include "kernels/decode/decode_cuda.hpp"
#include "kernels/decode/start.cuh"

namespace hotloop::decode {

namespace {

using namespace gpu;

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    verify_kernel(const __grid_constant__ VerifyLaunch launch) {
  using Memory = BlockMemory<kThreads>;
  __shared__ alignas(16) unsigned char memory[sizeof(Memory)];  // its structs have initialisers
  verify_block(*reinterpret_cast<Memory*>(memory), launch, cuda::thread_in_block(), cuda::block_index());
}

void verify(const char* op, Walk walk, const TreeCall& call, const CudaTarget& target) {
  const std::int64_t draft_bytes = call.has_draft ? item_size(call.draft.rows.dtype) : 0;
  const Work work{call.batch,
                  walk == Walk::kTree ? 1 : call.width + 1,  // a tree's next row is not known
                  call.target.vocabulary,
                  call.target.vocabulary * (item_size(call.target.rows.dtype) + draft_bytes),
                  call.width,
                  call.target.biases + (call.has_draft ? call.draft.biases : 0)};
  VerifyLaunch launch{};
  launch.call = call;
  launch.walk = walk;
  start(op, verify_kernel, launch, work, target);
}

TreeCall as_tree(const VerifyCall& call) {
  TreeCall tree;
  static_cast<VerifyCall&>(tree) = call;
  return tree;
}

}  // namespace

WorkspaceBytes decode_workspace_bytes(int device, std::int64_t width, std::int64_t biases) {
  const cuda::DeviceScope scope("decode_workspace", device);
  int processors = 0;
  if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    throw std::runtime_error("[decode_workspace] device: its multiprocessors cannot be counted.");
  }
  const Layout layout = layout_of(static_cast<std::int64_t>(processors) * kBlocksPerProcessor, width, biases);
  return {layout.bytes, layout.bins};
}

void chain_cuda(const VerifyCall& call, const CudaTarget& target) {
  verify("chain_speculative_sampling", Walk::kChain, as_tree(call), target);
}
void block_cuda(const VerifyCall& call, const CudaTarget& target) {
  verify("block_speculative_sampling", Walk::kBlock, as_tree(call), target);
}
void tree_cuda(const TreeCall& call, const CudaTarget& target) {
  verify("tree_speculative_verify", Walk::kTree, call, target);
}

}  // namespace hotloop::decode
