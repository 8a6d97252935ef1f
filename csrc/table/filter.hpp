// SPDX-License-Identifier: Apache-2.0
// Admission: which unknown keys may enter a table. CountFilter counts the sightings of a key in two bytes and admits it
// after a number of them; probabilistic_admits draws a number and keeps nothing.
//
// CountFilter is one open-addressed array, or a ring of them that forgets by clearing the oldest; filter.cpp says how a
// batch goes through it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "core/memory.hpp"
#include "core/philox.hpp"
#include "table/hash.hpp"

namespace hotloop::table {

// Counts how often a key was added, up to 15, over a sliding window of about `capacity` distinct keys.
//
// A cell is 16 bits: 12 of signature, 4 of a saturating counter; 0 is empty. A split is an open-addressed array of
// cells; a ring of S splits forgets by clearing the oldest one when the newest is full. A key has the same position
// in every split, and the splits lie interleaved, line by line of 32 cells: what a key reads are one or two cache
// lines of each split it looks into, side by side in memory, so one page of the address translation serves all.
//
// Two keys with the same signature within the probe length share a counter: at most kMaxSteps / 4096 per split.
class CountFilter {
 public:
  static constexpr std::uint32_t kMaxCount = 15;
  static constexpr int kCountBits = 4;
  static constexpr int kLine = 32;      // cells per cache line
  static constexpr int kMaxSteps = 32;  // of a single split, two thirds full; a ring, five sixths full, probes 16

  // splits: 1 for a filter that never forgets, else at least 3.
  CountFilter(std::int64_t capacity, int splits);
  // What `cells_per_split` of such a filter is.
  static std::int64_t cells_for(std::int64_t capacity, int splits);

  // Adds `count` and returns what the key had before. 15 where no cell is free (and a failure is counted).
  std::uint32_t add(std::uint64_t key, std::uint32_t count);
  // What the key has; nothing changes.
  std::uint32_t count(std::uint64_t key) const;
  // Whether the key was seen `threshold` times before, at most 15, which this call adds to. Threshold 0 lets
  // everything pass and counts nothing.
  bool admits(std::uint64_t key, std::uint32_t count, std::uint32_t threshold) {
    return threshold == 0 || add(key, count) >= threshold;
  }
  void prefetch(std::uint64_t key) const;

  // The same over n keys, in order, behind the filter's lock. counts may be null: 1 each. Negative counts add 0.
  void add(std::int64_t n, const std::int64_t* keys, const std::int64_t* counts, std::int64_t* old);
  void count(std::int64_t n, const std::int64_t* keys, std::int64_t* counts) const;
  void admits(std::int64_t n, const std::int64_t* keys, const std::int64_t* counts, std::uint32_t threshold,
              std::uint8_t* admitted);

  // The calls per key do not lock: hold this mutex to make them from several threads.
  std::mutex& mutex() const { return mutex_; }

  std::int64_t capacity() const { return capacity_; }
  int splits() const { return splits_; }
  std::int64_t cells_per_split() const { return positions_; }
  std::int64_t bytes() const { return positions_ * splits_ * 2; }

  // Everything but the cells.
  struct State {
    std::int64_t head = 0;
    std::int64_t advances = 0;
    std::int64_t failures = 0;
    std::vector<std::int64_t> elements;  // occupied cells, (splits,)
  };
  State save(std::uint16_t* cells) const;                     // (splits, cells_per_split), or null: the state alone
  void load(const State& state, const std::uint16_t* cells);  // the same
  void clear();

  // Lines of cells as they are; the line `number` of `split` is called split * (cells_per_split / kLine) + number.
  struct Lines {
    State state;
    std::vector<std::int64_t> names;
    std::vector<std::uint16_t> cells;  // (names, kLine)
  };
  // From the first call on, lines that change later are told from those that did before by the number returned.
  std::uint64_t mark();
  bool has_changed_since(std::uint64_t mark) const;
  // Those that changed since; without a mark all that hold anything.
  Lines changed_since(std::optional<std::uint64_t> mark) const;
  // Takes over what another filter of the same capacity and splits gave; `whole`: its other lines are empty.
  void put(const State& state, const std::int64_t* names, const std::uint16_t* cells, std::int64_t n, bool whole);

  // Notes the cells that `add` changes while it lives, and restores them when it is destroyed, unless `keep` was
  // called. The caller holds the mutex for as long.
  class Trial {
   public:
    explicit Trial(CountFilter& filter);
    ~Trial();
    Trial(const Trial&) = delete;
    Trial& operator=(const Trial&) = delete;
    void keep() { kept_ = true; }

   private:
    friend class CountFilter;
    struct Cell {
      std::uint16_t* at;
      std::uint16_t before;
    };
    struct Split {  // cleared when so many cells had been written
      std::size_t writes;
      int split;
      std::vector<std::uint16_t> before;
    };
    CountFilter& filter_;
    bool kept_ = false;
    int head_;
    std::int64_t advances_, failures_;
    std::vector<std::int64_t> elements_;
    std::vector<Cell> cells_;
    std::vector<Split> splits_;
  };

 private:
  std::uint16_t* find(int split, std::uint64_t hash) const;
  std::uint16_t* find_older(std::uint64_t hash) const;
  std::uint16_t* line(std::int64_t number, int split) const {
    return cells_.get() + (number * splits_ + split) * kLine;
  }
  int after(int split) const { return split + 1 == splits_ ? 0 : split + 1; }
  int before(int split) const { return split == 0 ? splits_ - 1 : split - 1; }
  void write(std::uint16_t* cell, int split, std::uint64_t hash, std::uint32_t count);
  void stamp(const std::uint16_t* cell) {
    if (!stamps_.empty()) stamps_[static_cast<std::size_t>(cell - cells_.get()) / kLine] = now_;
  }
  struct Extent {
    std::int64_t capacity_split, total, positions;
    int steps;
  };
  static Extent extent(std::int64_t capacity, int splits);
  void clear_split(int split);
  void copy_split(int split, std::uint16_t* out) const;
  void put_split(int split, const std::uint16_t* cells);

  std::int64_t capacity_, capacity_split_, total_, positions_;
  int splits_, steps_, head_ = 0;
  std::int64_t advances_ = 0, failures_ = 0;
  std::vector<std::int64_t> elements_;
  std::unique_ptr<std::uint16_t, Free> cells_;
  std::vector<std::uint32_t>
      stamps_;  // of each line in memory: the mark before its last change; empty until one is set
  std::uint32_t now_ = 1;
  Trial* trial_ = nullptr;
  mutable std::mutex mutex_;
};

// P[not admitted after `threshold` sightings], however they are batched, in the equal mode.
inline constexpr double kMissedShare = 0.05;

// Whether a key seen `count` times in this step is let in: with probability min(1, count / threshold), or in the
// equal mode 1 - 0.05^(count / threshold). The draw belongs to (seed, key, step): the same call, the same answer.
HOTLOOP_INLINE bool probabilistic_admits(std::uint64_t seed, std::uint64_t key, std::uint64_t step, std::uint32_t count,
                                         double threshold, bool equal) {
  if (threshold <= 0) return true;
  const Philox4x32 r = philox(seed, step, key);
  const std::uint64_t bits = ((std::uint64_t{r.word[0]} << 32) | r.word[1]) >> 11;
  const double u = static_cast<double>(bits) * 0x1p-53;  // in [0, 1)
  if (!equal) return u * threshold < count;
  return u < 1.0 - std::pow(kMissedShare, count / threshold);
}

void probabilistic_admits(std::int64_t n, std::uint64_t seed, const std::int64_t* keys, std::uint64_t step,
                          const std::int64_t* counts, double threshold, bool equal, std::uint8_t* admitted);

}  // namespace hotloop::table
