// SPDX-License-Identifier: Apache-2.0
// Which row to evict: the one with the lowest (score, key) of the table, at the price of one scan in many evictions.
#pragma once

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <vector>

#include "table/store/scores.hpp"
#include "table/store/table.hpp"

namespace hotloop::table {

// The next score of a row. `at`: position in the batch, or -1 for an update, which does not count as a use.
inline std::uint64_t next_score(Strategy strategy, const Stamp& stamp, std::int64_t at, bool fresh,
                                std::uint64_t before) {
  const bool counts = at >= 0, stated = stamp.scores != nullptr && counts;
  return next_score(strategy, Use{stated ? stamp.scores[at] : 1, stamp.epoch, stamp.tick, stated, counts}, fresh,
                    before);
}

// The lowest rows of one scan, in order, beside a heap of rows that came to lie among them since. An entry taken
// from either is looked up again: a row that was used meanwhile has another score and is passed over. The heap takes
// an entry for every use that leaves a low score, so entries that are out of date, and then the highest ones, are
// removed before it holds more than a few 64ths of the rows.
class Evictor {
 public:
  explicit Evictor(Table& table) : table_(table) {}

  struct Victim {
    std::uint64_t score, key;
    std::uint32_t row;
    bool operator<(const Victim& o) const { return score != o.score ? score < o.score : key < o.key; }
    bool operator>(const Victim& o) const { return o < *this; }
  };

  // A row was given this score, which every later look sees.
  void note(const Victim& v) {
    // Most uses raise a score beyond all that is held here. The fence: either this sees that a scan has begun, and
    // waits for its end, or the scan sees the score.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (v.score > bound_.load(std::memory_order_relaxed)) return;
    const std::lock_guard lock(mutex_);
    if (active_ && v < last_) push(v);
  }
  // The lowest row, if there is any. It stays the lowest until it is removed or used.
  std::optional<Victim> lowest();
  std::int64_t bytes() const;
  // All scores have changed: the next look scans.
  void forget();

 private:
  void scan();
  std::size_t most() const;
  void push(const Victim& v);
  void compact();
  bool current(const Victim& v, std::uint64_t* score) const;

  Table& table_;
  mutable std::mutex mutex_;
  bool active_ = false;
  std::atomic<std::uint64_t> bound_{0};  // the score of `last_`; during a scan, all there are
  Victim last_{};                        // every row below this one is in `run_` or in `fresh_`
  std::vector<Victim> run_;              // lowest last
  std::vector<Victim> fresh_;            // a heap, lowest first
};

}  // namespace hotloop::table
