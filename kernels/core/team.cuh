// SPDX-License-Identifier: Apache-2.0
// A team: the thread blocks that serve one request together, in step with each other. Its one collective, `reduce`,
// brings several numbers (lanes) together over all threads of the team, each by sum or maximum. Numbers are integers,
// so the result does not depend on the order.
//
// Warps leave partial results in shared memory. For each lane one warp combines those of its block and writes the
// result to the block's mailbox in device memory; then the same warp of every block reads the mailboxes of all blocks.
// So every block has the result after one trip through L2, where a counter and its release take three. A team of one
// block sends nothing.
//
// Mailboxes are not cleared: a letter carries an epoch that only grows, within a launch and from launch to launch, and
// a reader waits for the epoch it expects. Two sets of mailboxes in turn are enough: a block writes into a set again
// only after all blocks have sent the exchange in between, hence have read that set.
#pragma once

#include <cstdint>

#include "kernels/core/threads.cuh"

namespace hotloop::cuda {

// In shared memory.
template <int kThreads, int kLanes>
struct TeamMemory {
  std::uint64_t parts[kLanes][kThreads / kWarp];
  std::uint64_t total[kLanes];   // of the team
  std::uint64_t own[kLanes];     // of this block
  std::uint64_t before[kLanes];  // of the blocks before this one (sums)
  std::uint64_t scan[kThreads / kWarp];
};

// In device memory, one for a launch; zeroed once, when it is allocated.
struct Epochs {
  std::uint64_t now;   // where the next launch goes on
  std::uint64_t next;  // the largest that a block of this launch has reached
  std::uint32_t gone;  // blocks that have left
};

template <int kBlockThreads, int kMostLanes>
class Team {
 public:
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kLanes = kMostLanes;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp);
  using Memory = TeamMemory<kThreads, kLanes>;

  // Letters of one block.
  static constexpr std::int64_t kLetters = 2 * kLanes;

  // `letters`: those of the team's first block.
  HOTLOOP_BOTH Team(Memory& memory, Letter* letters, std::int64_t thread, std::int64_t rank, std::int64_t blocks,
                    std::uint64_t epoch)
      : memory_(memory),
        letters_(letters),
        epoch_(epoch),
        rank_(static_cast<int>(rank)),
        blocks_(static_cast<int>(blocks)),
        thread_(static_cast<int>(thread)) {}

  HOTLOOP_BOTH int thread() const { return thread_; }
  HOTLOOP_BOTH int warp() const { return thread_ / kWarp; }
  HOTLOOP_BOTH int in_warp() const { return thread_ % kWarp; }
  HOTLOOP_BOTH int rank() const { return rank_; }
  HOTLOOP_BOTH int blocks() const { return blocks_; }
  HOTLOOP_BOTH std::uint64_t epoch() const { return epoch_; }
  HOTLOOP_BOTH void block_sync() const { block_barrier(); }

  HOTLOOP_BOTH static std::uint64_t over_warp(std::uint64_t x, bool sum) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      const std::uint64_t y = shuffle_xor(x, distance);
      x = sum ? x + y : x < y ? y : x;
    }
    return x;
  }

  // A warp's share of a lane: each of its threads brings one number.
  HOTLOOP_BOTH void put(int lane, int part, std::uint64_t x, bool sum) {
    x = over_warp(x, sum);
    if (in_warp() == 0) memory_.parts[lane][part] = x;
  }

  // Over the team, of what was put into parts 0 to `parts` of each lane: a sum where bit `lane` of
  // `sums` is set, else the largest. `fenced`: what any thread of the team wrote before, all read
  // after.
  HOTLOOP_BOTH void reduce(int lanes, int parts, std::uint32_t sums, bool fenced = false) {
    if (fenced && blocks_ > 1) device_fence();
    block_sync();
    ++epoch_;
    for (int lane = warp(); lane < lanes; lane += kWarps) {
      const bool sum = ((sums >> lane) & 1u) != 0;
      std::uint64_t own = in_warp() < parts ? memory_.parts[lane][in_warp()] : 0;
      own = over_warp(own, sum);
      std::uint64_t total = own, before = 0;
      if (blocks_ > 1) {
        if (in_warp() == 0) {
          if (fenced) device_fence();
          send(box(rank_, lane), own, epoch_);
        }
        total = 0;
        for (int i = in_warp(); i < blocks_; i += kWarp) {
          const std::uint64_t theirs = receive(box(i, lane), epoch_);
          total = sum ? total + theirs : total < theirs ? theirs : total;
          before += i < rank_ ? theirs : 0;
        }
        if (fenced) device_fence();
        total = over_warp(total, sum);
        before = over_warp(before, true);
      }
      if (in_warp() == 0) {
        memory_.total[lane] = total;
        memory_.own[lane] = own;
        memory_.before[lane] = before;
      }
    }
    block_sync();
  }
  HOTLOOP_BOTH std::uint64_t total(int lane) const { return memory_.total[lane]; }
  HOTLOOP_BOTH std::uint64_t own(int lane) const { return memory_.own[lane]; }
  HOTLOOP_BOTH std::uint64_t before(int lane) const { return memory_.before[lane]; }
  HOTLOOP_BOTH std::uint64_t part(int lane, int i) const { return memory_.parts[lane][i]; }

  // What any thread of the team wrote before, all read after.
  HOTLOOP_BOTH void sync() {
    if (blocks_ == 1) return block_sync();
    if (thread_ < kWarp) put(0, 0, 0, true);
    reduce(1, 1, 1u, true);
  }

  // Sum of x over the threads of the block before this one.
  HOTLOOP_BOTH std::uint64_t scan(std::uint64_t x) {
    std::uint64_t sum = x;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const std::uint64_t below = shuffle_up(sum, distance);
      sum += in_warp() >= distance ? below : 0;
    }
    if (in_warp() == kWarp - 1) memory_.scan[warp()] = sum;
    block_sync();
    for (int i = 0; i < warp(); ++i) sum += memory_.scan[i];
    block_sync();
    return sum - x;
  }

 private:
  HOTLOOP_BOTH Letter* box(int rank, int lane) const {
    return letters_ + rank * kLetters + static_cast<std::int64_t>(epoch_ & 1) * kLanes + lane;
  }

  Memory& memory_;
  Letter* letters_;
  std::uint64_t epoch_;
  int rank_, blocks_, thread_;
};

// The last thing one thread of every block does, whether its team sent letters or not.
HOTLOOP_BOTH inline void leave(Epochs* epochs, std::uint64_t epoch, std::int64_t blocks) {
  max_global(&epochs->next, epoch);
  device_fence();
  if (static_cast<std::int64_t>(add_global(&epochs->gone, 1u)) + 1 < blocks) return;
  device_fence();
  epochs->now = epochs->next;
  epochs->gone = 0;
}

}  // namespace hotloop::cuda
