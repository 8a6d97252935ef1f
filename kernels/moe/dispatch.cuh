// SPDX-License-Identifier: Apache-2.0
// The order of expert rows from ids alone: the stable counting sort of segments.cuh, with ids that go nowhere behind
// the last expert, and around it what a capacity and aligned runs ask for. Where the largest weights stay, slots are
// sorted by weight first; those of an expert beyond its capacity then go nowhere, and the rest is sorted as without
// weights.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.hpp"
#include "kernels/core/segments_cuda.hpp"
#include "kernels/moe/blocks.cuh"
#include "kernels/moe/route.cuh"
#include "moe/route.hpp"

namespace hotloop::moe::gpu {

// Memory of a call.
struct DispatchArrays {
  std::int32_t* keys;            // (slots,): the expert, or `experts` for nowhere
  std::int64_t *order, *other;   // (slots,)
  std::int64_t *counts, *first;  // (experts + 1,), (experts + 2,): of the sorted keys
  std::int64_t* starts;          // of the sort
  void* falling;                 // (slots,) int64, or int32: numbers that fall with the weight
  std::int64_t* by_weight;       // (slots,)

  DispatchArrays(const DispatchCall& call, Arrays& arrays) {
    const std::int64_t weighted = call.weights != nullptr ? call.slots : 0;
    keys = arrays.take<std::int32_t>(call.slots);
    order = arrays.take<std::int64_t>(call.slots);
    other = arrays.take<std::int64_t>(call.slots);
    counts = arrays.take<std::int64_t>(call.experts + 1);
    first = arrays.take<std::int64_t>(call.experts + 2);
    starts = arrays.take<std::int64_t>((std::int64_t{1} << segments::kCudaDigitBits) *
                                       (segments::cuda_tiles(call.slots, segments::kCudaSortTile) + 1));
    falling = arrays.take<std::int64_t>(weighted);
    by_weight = arrays.take<std::int64_t>(weighted);
  }
};

// A thread per element.
struct PerElement {
  static constexpr int kMostThreads = 256;
  HOTLOOP_INLINE int threads() const { return kMostThreads; }
  HOTLOOP_INLINE std::int64_t shared_bytes() const { return 0; }
  static HOTLOOP_INLINE std::int64_t blocks_of(std::int64_t n) { return (n + kMostThreads - 1) / kMostThreads; }
};

// Keys of slots; no row is taken yet.
struct ReadIds : PerElement {
  DispatchCall call;
  std::int32_t* keys;
  HOTLOOP_INLINE std::int64_t blocks() const { return blocks_of(call.rows > call.slots ? call.rows : call.slots); }
  HOTLOOP_BOTH void operator()(std::int64_t block, int thread, void*) const {
    const std::int64_t i = block * kMostThreads + thread;
    if (i < call.rows) call.slot_of_row[i] = -1;
    if (i >= call.slots) return;
    const std::int64_t id = call.ids_dtype == Dtype::kInt32 ? static_cast<const std::int32_t*>(call.ids)[i]
                                                            : static_cast<const std::int64_t*>(call.ids)[i];
    keys[i] = static_cast<std::int32_t>(id >= 0 && id < call.experts ? id : call.experts);
  }
};

template <class Weight>
struct FallingWeights : PerElement {
  using Key = std::conditional_t<std::is_same_v<Weight, double>, std::int64_t, std::int32_t>;
  DispatchCall call;
  Key* falling;
  HOTLOOP_INLINE std::int64_t blocks() const { return blocks_of(call.slots); }
  HOTLOOP_BOTH void operator()(std::int64_t block, int thread, void*) const {
    const std::int64_t i = block * kMostThreads + thread;
    if (i >= call.slots) return;
    falling[i] = static_cast<Key>(~rising(to_float(static_cast<const Weight*>(call.weights)[i])));
  }
};

// Of slots by expert and weight: those beyond the capacity go nowhere.
struct DropLast : PerElement {
  DispatchCall call;
  DispatchArrays at;
  HOTLOOP_INLINE std::int64_t blocks() const { return blocks_of(call.slots); }
  HOTLOOP_BOTH void operator()(std::int64_t block, int thread, void*) const {
    const std::int64_t i = block * kMostThreads + thread;
    if (i >= call.slots) return;
    const std::int64_t slot = at.order[i], key = at.keys[slot];
    if (key < call.experts && i - at.first[key] >= call.capacity)
      at.keys[slot] = static_cast<std::int32_t>(call.experts);
  }
};

// One block: where the rows of every expert begin.
struct ExpertOffsets {
  static constexpr int kWarps = 8;
  static constexpr int kMostThreads = kWarps * kWarp;
  DispatchCall call;
  const std::int64_t* counts;
  HOTLOOP_INLINE std::int64_t blocks() const { return 1; }
  HOTLOOP_INLINE int threads() const { return kMostThreads; }
  HOTLOOP_INLINE std::int64_t shared_bytes() const { return kWarps * 8; }
  HOTLOOP_BOTH void operator()(std::int64_t, int thread, void* memory) const {
    auto* const of_warp = static_cast<std::int64_t*>(memory);
    const int warp = thread / kWarp, lane = thread % kWarp;
    std::int64_t before = 0;
    for (std::int64_t strip = 0; strip < call.experts; strip += kMostThreads) {
      const std::int64_t e = strip + thread;
      std::int64_t kept = e < call.experts ? counts[e] : 0;
      if (call.capacity >= 0 && kept > call.capacity) kept = call.capacity;
      const std::int64_t rows = (kept + call.align - 1) / call.align * call.align;
      std::int64_t all;
      std::int64_t offset = before_in_warp(rows, lane, all);
      if (lane == 0) of_warp[warp] = all;
      cuda::block_barrier();
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) offset += of_warp[w];
        if (w == 0) offset += before;
        before += of_warp[w];
      }
      cuda::block_barrier();
      if (e >= call.experts) continue;
      call.expert_counts[e] = kept;
      call.expert_offsets[e] = offset;
    }
    if (thread == 0) call.expert_offsets[call.experts] = before;
  }
};

// Of sorted slots: their rows.
struct TakeRows : PerElement {
  DispatchCall call;
  DispatchArrays at;
  HOTLOOP_INLINE std::int64_t blocks() const { return blocks_of(call.slots); }
  HOTLOOP_BOTH void operator()(std::int64_t block, int thread, void*) const {
    const std::int64_t i = block * kMostThreads + thread;
    if (i >= call.slots) return;
    const std::int64_t slot = at.order[i], key = at.keys[slot], rank = i - at.first[key];
    const bool kept = key < call.experts && (call.capacity < 0 || rank < call.capacity);
    const std::int64_t row = kept ? call.expert_offsets[key] + rank : -1;
    call.row_of_slot[slot] = row;
    if (kept) call.slot_of_row[row] = slot;
  }
};

// Calls run(body) for each launch and sort(call) for each sort, in order.
template <class Run, class Sort>
void dispatch(const DispatchCall& call, void* workspace, Run&& run, Sort&& sort) {
  Arrays arrays(workspace);
  const DispatchArrays at(call, arrays);
  run(ReadIds{{}, call, at.keys});
  segments::CudaSortCall by_expert;
  by_expert.keys = at.keys;
  by_expert.dtype = Dtype::kInt32;
  by_expert.n = call.slots;
  by_expert.num_keys = call.experts + 1;
  by_expert.order = at.order;
  by_expert.counts = at.counts;
  by_expert.offsets = at.first;
  by_expert.other = at.other;
  by_expert.starts = at.starts;
  if (call.weights != nullptr) {
    segments::CudaSortCall by_weight;
    by_weight.keys = at.falling;
    by_weight.n = call.slots;
    by_weight.order = at.by_weight;
    by_weight.other = at.other;
    by_weight.starts = at.starts;
    with_float(call.weights_dtype, [&](auto weight) {
      using Falling = FallingWeights<decltype(weight)>;
      constexpr bool kWide = sizeof(typename Falling::Key) == 8;
      run(Falling{{}, call, static_cast<typename Falling::Key*>(at.falling)});
      by_weight.dtype = kWide ? Dtype::kInt64 : Dtype::kInt32;
      by_weight.num_keys = kWide ? INT64_MAX : std::int64_t{1} << 32;
    });
    sort(by_weight);
    segments::CudaSortCall stable = by_expert;
    stable.from = at.by_weight;
    sort(stable);
    run(DropLast{{}, call, at});
  }
  sort(by_expert);
  run(ExpertOffsets{call, at.counts});
  run(TakeRows{{}, call, at});
}

}  // namespace hotloop::moe::gpu
