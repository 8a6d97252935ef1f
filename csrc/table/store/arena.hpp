// SPDX-License-Identifier: Apache-2.0
// Where rows live: chunks that never move, a bit per row that says whether it is in use, and a list of free ones.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <mutex>
#include <vector>

#include "core/memory.hpp"
#include "table/store/layout.hpp"
#include "table/store/seqlock.hpp"

namespace hotloop::table {

class Arena {
 public:
  Arena(std::int64_t stride, std::int64_t expected_rows);

  char* row(std::uint32_t r) const {
    return __atomic_load_n(&chunks_[r >> shift_], __ATOMIC_RELAXED) + static_cast<std::int64_t>(r & mask_) * stride_;
  }
  // The key of a row, or kNobody.
  std::uint64_t key(std::uint32_t r) const { return row_key(row(r)); }
  // Whether a row is this key's. Callers keep row numbers after a lookup: pending gradients, the lookups of modules,
  // readers between two looks. A row that was given back meanwhile must not pass as its former key's.
  bool holds(const char* at, std::uint32_t r, std::uint64_t wanted) const {
    return row_key(at) == wanted && (wanted != kNobody || live(r));
  }
  bool holds(std::uint32_t r, std::uint64_t wanted) const { return holds(row(r), r, wanted); }

  bool live(std::uint32_t r) const {
    return ((live_words(r >> 6).load(std::memory_order_acquire) >> (r & 63u)) & 1u) != 0;
  }
  void set_live(std::uint32_t r, bool on) const {
    const std::uint64_t bit = std::uint64_t{1} << (r & 63u);
    if (on)
      live_words(r >> 6).fetch_or(bit, std::memory_order_release);
    else
      live_words(r >> 6).fetch_and(~bit, std::memory_order_release);
  }
  void set_live_bits(std::uint32_t word, std::uint64_t bits) const {
    live_words(word).fetch_or(bits, std::memory_order_release);
  }
  std::uint64_t live_word(std::uint32_t word) const { return live_words(word).load(std::memory_order_acquire); }
  // Words of live bits: of 64 rows each.
  std::int64_t words() const { return (std::int64_t{end()} + 63) / 64; }
  // visit(row) for the rows of words [begin, end) that are in use when their word is looked at.
  template <class Visit>
  void each_live(std::int64_t begin, std::int64_t end, Visit&& visit) const {
    for (std::int64_t w = begin; w < end; ++w) {
      for (std::uint64_t live = live_word(static_cast<std::uint32_t>(w)); live != 0; live &= live - 1) {
        visit(static_cast<std::uint32_t>(w * 64 + std::countr_zero(live)));
      }
    }
  }

  // Rows [0, end) have been handed out at some time.
  std::uint32_t end() const { return end_.load(std::memory_order_acquire); }
  std::int64_t bytes() const;
  std::int64_t rows_per_chunk() const { return std::int64_t{mask_} + 1; }

  void take(std::vector<std::uint32_t>& rows, std::size_t count);
  void give(std::vector<std::uint32_t>& rows);

 private:
  std::atomic<std::uint64_t>& live_words(std::uint32_t word) const {
    const std::uint32_t r = word << 6;
    return reinterpret_cast<std::atomic<std::uint64_t>*>(chunks_[r >> shift_] + live_offset_)[(r & mask_) >> 6];
  }
  void add_chunk();

  std::int64_t stride_;
  int shift_;
  std::uint32_t mask_;
  std::int64_t live_offset_, chunk_bytes_;
  bool large_;
  SparseArray<char*> chunks_;  // a pointer for every chunk there could be: zero pages until used
  std::vector<Pages> pages_;
  mutable std::mutex mutex_;
  std::vector<std::uint32_t> free_;
  std::atomic<std::uint32_t> end_{0};
};

// Rows for one thread of one batch, taken from the arena by the dozen.
class RowSource {
 public:
  explicit RowSource(Arena& arena) : arena_(arena) {}
  ~RowSource() {
    set_live();
    arena_.give(rows_);
  }
  RowSource(const RowSource&) = delete;
  RowSource& operator=(const RowSource&) = delete;

  std::uint32_t take() {
    if (rows_.empty()) {
      arena_.take(rows_, take_);
      take_ = take_ < 256 ? take_ * 4 : take_;
    }
    const std::uint32_t r = rows_.back();
    rows_.pop_back();
    return r;
  }
  void give(std::uint32_t r) { rows_.push_back(r); }

  // Notes a row as live; its bit is set with those of its neighbours, at the latest when the source goes.
  void live(std::uint32_t r) {
    if ((r >> 6) != word_) {
      set_live();
      word_ = r >> 6;
    }
    bits_ |= std::uint64_t{1} << (r & 63u);
  }

  // Room in the index, reserved by the dozen as well (Table::take_room), and how many rows were entered.
  std::int64_t room = 0, entered = 0;

 private:
  void set_live() {
    if (bits_ != 0) arena_.set_live_bits(word_, bits_);
    bits_ = 0;
  }

  Arena& arena_;
  std::uint32_t word_ = 0;
  std::uint64_t bits_ = 0;
  std::vector<std::uint32_t> rows_;
  std::size_t take_ = 1;
};

}  // namespace hotloop::table
