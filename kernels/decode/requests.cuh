// SPDX-License-Identifier: Apache-2.0
// How a launch shares its requests: every team of blocks takes every teams-th request and runs its walk. `plan_of`
// chooses the number of teams and their size from the shape of the batch and the size of the device. Teams and requests
// follow from a block's number alone, so the emulator of the tests runs the same code as the kernels.
#pragma once

#include <cstdint>

#include "decode/loops.hpp"
#include "decode/walks.hpp"
#include "kernels/core/team.cuh"
#include "kernels/decode/rows.cuh"

namespace hotloop::decode::gpu {

// How a launch is cut: `teams` teams of `blocks` blocks each take every teams-th request.
struct Plan {
  std::int64_t teams = 0, blocks = 0;
  std::int64_t window = 1;  // rows opened together
};
// `resident`: blocks the device holds at once. `rows`: a request may open; `row_bytes`: of all that
// is read beside each other, the target's and the draft's. Derived, not measured, from 25 bytes a
// nanosecond and multiprocessor (3.3 TB/s over 132) and 1.2 us an exchange:
//   - below 2048 tokens a block's share of a pass is less than what the exchange after it takes;
//   - 64 letters are two for each thread of the warp that reads them;
//   - the two exchanges of an opening are worth reading 60 KB that may turn out not to be needed.
inline Plan plan_of(std::int64_t resident, std::int64_t batch, std::int64_t vocabulary, std::int64_t rows,
                    std::int64_t row_bytes) {
  constexpr std::int64_t kLeastTokens = 2048, kMostBlocks = 64, kWorthAnOpening = 60000;
  const auto between = [](std::int64_t x, std::int64_t least, std::int64_t most) {
    return x < least ? least : x < most ? x : most;
  };
  Plan plan;
  const std::int64_t useful = between((vocabulary + kLeastTokens - 1) / kLeastTokens, 1, kMostBlocks);
  plan.blocks = between(resident / batch, 1, useful < resident ? useful : resident);
  plan.teams = between(resident / plan.blocks, 1, batch);
  plan.window = between(kWorthAnOpening * plan.blocks / row_bytes, 1, rows < kMostWindow ? rows : kMostWindow);
  return plan;
}

// The plan without teams of several blocks: nothing then needs blocks that run at the same time.
inline Plan apart(Plan plan, std::int64_t resident, std::int64_t batch) {
  plan.blocks = 1;
  plan.teams = resident < batch ? resident : batch;
  return plan;
}

// Where things lie in the workspace, in bytes. What outlives a launch (epochs, letters) comes
// first, at places that depend on the number of blocks alone.
struct Layout {
  std::int64_t epochs = 0, letters = 0, bins = 0, reach = 0, taken = 0, bias_ids = 0, bias = 0;
  std::int64_t bytes = 0;
};
// blocks: that the device can hold; width: draft tokens of a request; biases: of target and draft
// together.
inline Layout layout_of(std::int64_t blocks, std::int64_t width, std::int64_t biases) {
  Layout layout;
  const auto place = [&layout](std::int64_t bytes) {
    const std::int64_t here = layout.bytes;
    layout.bytes += (bytes + 255) / 256 * 256;
    return here;
  };
  constexpr auto kWord = static_cast<std::int64_t>(sizeof(std::uint64_t));
  layout.epochs = place(static_cast<std::int64_t>(sizeof(cuda::Epochs)));
  layout.letters = place(blocks * 2 * kLanes * static_cast<std::int64_t>(sizeof(cuda::Letter)));
  layout.bins = place(blocks / 2 * kBinSets * kBins * kWord);  // of teams of two blocks or more
  layout.reach = place(blocks * (width + 1) * kWord);
  layout.taken = place(blocks * width * kWord);
  layout.bias_ids = place(blocks * biases * kWord);
  layout.bias = place(blocks * biases * static_cast<std::int64_t>(sizeof(float)));
  return layout;
}

// By value to the kernel.
template <class Call>
struct Launch {
  Call call;
  Plan plan;
  Layout places;
  char* workspace;
};
// Chains and blocks are calls without what only a tree has. One kernel walks them all: its time is
// in the rows, and so is nine tenths of its code.
enum class Walk { kChain, kBlock, kTree };
struct VerifyLaunch : Launch<TreeCall> {
  Walk walk;
};
using SampleLaunch = Launch<SampleCall>;

template <int kThreads>
struct BlockMemory {
  using BlockTeam = cuda::Team<kThreads, kLanes>;
  using Rows = GpuRows<BlockTeam>;
  typename BlockTeam::Memory team;
  typename Rows::Memory rows;
};

// One block of a launch: its team, its rows, and its part of the workspace.
template <int kThreads, class Call>
class Block {
 public:
  using Memory = BlockMemory<kThreads>;
  using Team = typename Memory::BlockTeam;
  using Rows = typename Memory::Rows;

  HOTLOOP_BOTH Block(Memory& memory, const Launch<Call>& launch, const LawTable& target, const LawTable* draft,
                     std::int64_t width, std::int64_t thread, std::int64_t block)
      : launch_(launch),
        index_(block),
        team_index_(block / launch.plan.blocks),
        team(memory.team, letters(), thread, block % launch.plan.blocks, launch.plan.blocks, epochs()->now),
        rows(team, memory.rows, target, draft, places(target, draft, width), launch.plan.window),
        reach_(at<double>(launch.places.reach) + team_index_ * (width + 1)) {}

  // f(request) for each request of this team.
  template <class F>
  HOTLOOP_BOTH void over_requests(std::int64_t count, F&& f) {
    for (std::int64_t i = team_index_; i < count; i += launch_.plan.teams) f(i);
    team.block_sync();
    if (team.thread() == 0) {
      cuda::leave(epochs(), team.epoch(), launch_.plan.teams * launch_.plan.blocks);
    }
  }
  HOTLOOP_BOTH double* reach() const { return reach_; }

 private:
  template <class T>
  HOTLOOP_BOTH T* at(std::int64_t bytes) const {
    return reinterpret_cast<T*>(launch_.workspace + bytes);
  }
  HOTLOOP_BOTH cuda::Epochs* epochs() const { return at<cuda::Epochs>(launch_.places.epochs); }
  HOTLOOP_BOTH cuda::Letter* letters() const {
    const std::int64_t first = team_index_ * launch_.plan.blocks;
    return at<cuda::Letter>(launch_.places.letters) + first * Team::kLetters;
  }
  HOTLOOP_BOTH Places places(const LawTable& target, const LawTable* draft, std::int64_t width) const {
    const std::int64_t more = draft == nullptr ? 0 : draft->biases;
    std::int64_t* ids = at<std::int64_t>(launch_.places.bias_ids) + index_ * (target.biases + more);
    float* values = at<float>(launch_.places.bias) + index_ * (target.biases + more);
    return {at<std::uint64_t>(launch_.places.bins) + team_index_ * kBinSets * kBins,
            at<std::int64_t>(launch_.places.taken) + index_ * width,
            {ids, values},
            {ids + target.biases, values + target.biases}};
  }

  const Launch<Call>& launch_;
  std::int64_t index_, team_index_;

 public:
  Team team;
  Rows rows;

 private:
  double* reach_;
};

// Each walk with registers of its own: together they would need more than there are.
template <class Rows, class Id>
HOTLOOP_OUTLINE void outlined_chain(Rows& rows, const Id* x, std::int64_t n, const Draws& draws,
                                    const Emitted<Id>& out) {
  walk_chain(rows, x, n, draws, out);
}
template <class Rows, class Id>
HOTLOOP_OUTLINE void outlined_block(Rows& rows, const Id* x, std::int64_t n, const Draws& draws, double* reach,
                                    const Emitted<Id>& out) {
  walk_block(rows, x, n, draws, reach, out);
}
template <class Rows, class Id>
HOTLOOP_OUTLINE void outlined_tree(Rows& rows, const Tree<Id>& tree, const Draws& draws, std::int64_t* nodes,
                                   const Emitted<Id>& out) {
  walk_tree(rows, tree, draws, nodes, out);
}

template <class Id, class Rows>
HOTLOOP_BOTH void verify_request(Rows& rows, const VerifyLaunch& launch, std::int64_t b, double* reach) {
  const TreeCall& call = launch.call;
  const std::int64_t n = call.length(b);
  const bool tree = launch.walk == Walk::kTree;
  const Id* x = call.tokens<Id>(b);
  const Draws draws = call.seeds.at(b);
  const Emitted<Id> out = call.emitted<Id>(b, (tree ? call.depth : call.width) + 1);
  rows.request(b, n + 1, tree ? n + 1 : n);
  if (tree) {
    outlined_tree(rows, call.tree<Id>(b), draws, call.nodes + b * call.depth, out);
  } else if (launch.walk == Walk::kBlock) {
    outlined_block(rows, x, n, draws, reach, out);
  } else {
    outlined_chain(rows, x, n, draws, out);
  }
}

template <int kThreads>
HOTLOOP_BOTH void verify_block(BlockMemory<kThreads>& memory, const VerifyLaunch& launch, std::int64_t thread,
                               std::int64_t index) {
  const TreeCall& call = launch.call;
  Block<kThreads, TreeCall> block(memory, launch, call.target, call.has_draft ? &call.draft : nullptr, call.width,
                                  thread, index);
  block.over_requests(call.batch, [&](std::int64_t b) {
    with_integer(call.ids.dtype, [&](auto id) { verify_request<decltype(id)>(block.rows, launch, b, block.reach()); });
  });
}

template <int kThreads>
HOTLOOP_BOTH void sample_block(BlockMemory<kThreads>& memory, const SampleLaunch& launch, std::int64_t thread,
                               std::int64_t index) {
  const SampleCall& call = launch.call;
  Block<kThreads, SampleCall> block(memory, launch, call.law, nullptr, 0, thread, index);
  block.over_requests(call.batch * call.rows, [&](std::int64_t i) {
    const std::int64_t b = i / call.rows, r = i % call.rows;
    block.rows.request(b, r + 1, 0);
    std::int64_t token = -1;
    if (block.rows.open(r)) token = block.rows.pick(call.seeds.at(b).at(r, 0, kSampling).pick);
    if (!block.rows.leader()) return;
    call.output[i] = token;
    call.logps[i] = token >= 0 ? static_cast<float>(block.rows.logp(token)) : 0.0f;
  });
}

}  // namespace hotloop::decode::gpu
