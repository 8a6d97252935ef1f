// SPDX-License-Identifier: Apache-2.0
// Around the loop over tokens: how they are cut into blocks, how blocks are merged, and the order of expert rows.
#include "moe/route.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "core/parallel.hpp"

namespace hotloop::moe {

namespace {

// A block is worth a thread; with more tokens its sums in float32 would lose digits, and with less, merging would cost
// more than it saves.
constexpr std::int64_t kLeastBlock = 64, kMostBlock = 1024, kBlocks = 64;

template <class T>
std::unique_ptr<T[]> memory(std::int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(count)]);
}

std::vector<Block> blocks_of(const Logits& logits) {
  std::int64_t size = (logits.tokens + kBlocks - 1) / kBlocks;
  size = std::clamp((size + 7) / 8 * 8, kLeastBlock, kMostBlock);
  std::vector<Block> blocks;
  for (std::int64_t s = 0; s < logits.sequences; ++s) {
    const std::int64_t begin = logits.offsets != nullptr ? logits.offsets[s] : 0;
    const std::int64_t end = logits.offsets != nullptr ? logits.offsets[s + 1] : logits.tokens;
    for (std::int64_t t = begin; t < end; t += size) blocks.push_back({t, std::min(end, t + size), s});
  }
  return blocks;
}

// Experts [first, last) of the counts and the sums of all sequences; with an order, block counts become where the rows
// of a block begin, relative to those of its expert.
template <class R>
void merge(const RouteCall& call, std::int64_t first, std::int64_t last) {
  const std::int64_t experts = call.logits.experts, width = padded(experts);
  const std::int64_t size = last - first;
  const auto sums = memory<double>(size);
  R* const out = static_cast<R*>(call.prob_sums);
  const R* const parts = static_cast<const R*>(call.block_sums);
  std::int64_t b = 0;
  for (std::int64_t s = 0; s < call.logits.sequences; ++s) {
    std::fill_n(sums.get(), size, 0.0);
    std::int64_t* const counts = call.counts + s * experts;
    std::fill(counts + first, counts + last, 0);
    for (; b < call.block_count && call.blocks[b].sequence == s; ++b) {
      std::int64_t* const mine = call.block_counts + b * experts;
      for (std::int64_t i = first; i < last; ++i) {
        sums[i - first] += static_cast<double>(parts[b * width + i]);
        const std::int64_t before = counts[i];
        counts[i] += mine[i];
        mine[i] = before;
      }
    }
    for (std::int64_t i = first; i < last; ++i) out[s * experts + i] = static_cast<R>(sums[i - first]);
  }
}

// Slots in the order of their experts: those of a block go on where the block before it ended.
void order(const RouteCall& call) {
  const std::int64_t experts = call.logits.experts, k = call.selection.top_k;
  std::int64_t* const offsets = call.expert_offsets;
  offsets[0] = 0;
  for (std::int64_t i = 0; i < experts; ++i) offsets[i + 1] = offsets[i] + call.counts[i];
  std::fill(call.slot_of_row + offsets[experts], call.slot_of_row + call.logits.tokens * k, -1);
  parallel_for(call.block_count, 1, [&](std::int64_t first, std::int64_t last) {
    const auto next = memory<std::int64_t>(experts);
    for (std::int64_t b = first; b < last; ++b) {
      const std::int64_t* const mine = call.block_counts + b * experts;
      for (std::int64_t i = 0; i < experts; ++i) next[i] = offsets[i] + mine[i];
      for (std::int64_t slot = call.blocks[b].begin * k; slot < call.blocks[b].end * k; ++slot) {
        const std::int64_t id = call.ids[slot];
        std::int64_t row = -1;
        if (id >= 0) {
          row = next[id]++;
          call.slot_of_row[row] = slot;
        }
        call.row_of_slot[slot] = row;
      }
    }
  });
}

template <class R>
bool finite(const void* numbers, std::int64_t count) {
  const R* const x = static_cast<const R*>(numbers);
  bool all = true;
  for (std::int64_t i = 0; i < count; ++i) all &= x[i] - x[i] == R(0);
  return all;
}

void run(const RouteCall& call) { HOTLOOP_SIMD_DISPATCH(route_blocks(call)) }

}  // namespace

std::int64_t route(RouteCall call) {
  const std::int64_t experts = call.logits.experts;
  const bool wide = call.logits.dtype == Dtype::kFloat64;
  // NaN is no order: fewer than k experts could be found.
  if (call.bias != nullptr && !(wide ? finite<double>(call.bias, experts) : finite<float>(call.bias, experts))) {
    return kBadBias;
  }
  const std::vector<Block> blocks = blocks_of(call.logits);
  call.blocks = blocks.data();
  call.block_count = static_cast<std::int64_t>(blocks.size());
  const auto counts = memory<std::int64_t>(call.block_count * experts);
  const auto sums = memory<double>((call.block_count * padded(experts) + 1) / (wide ? 1 : 2) + 1);
  const auto tokens = memory<std::int64_t>(call.block_count);
  const auto bad = memory<std::int64_t>(call.block_count);
  call.block_counts = counts.get();
  call.block_sums = sums.get();
  call.block_tokens = tokens.get();
  call.block_bad = bad.get();
  run(call);
  std::fill_n(call.num_tokens, call.logits.sequences, 0);
  for (std::int64_t b = 0; b < call.block_count; ++b) {
    if (bad[b] >= 0) return bad[b];
    call.num_tokens[blocks[static_cast<std::size_t>(b)].sequence] += tokens[b];
  }
  const std::int64_t work = std::max<std::int64_t>(1, call.block_count + call.logits.sequences);
  parallel_for(experts, std::max<std::int64_t>(16, 32768 / work), [&](std::int64_t first, std::int64_t last) {
    wide ? merge<double>(call, first, last) : merge<float>(call, first, last);
  });
  if (call.ordered) order(call);
  return -1;
}

void route_backward(const RouteBackwardCall& call) { HOTLOOP_SIMD_DISPATCH(route_backward(call)) }

}  // namespace hotloop::moe
