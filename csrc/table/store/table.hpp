// SPDX-License-Identifier: Apache-2.0
// A table from 64-bit keys to rows, made of an index (where a key is), an arena (the rows) and sequence locks.
//
// Calls take batches, run on the threads of OpenMP, and may overlap in any mixture. Lookups take no lock and never wait
// for growth: they keep the index they started with. Insertions, erasures and evictions share the lock `structure_`;
// growth takes it alone. A key is inserted and erased under the lock of its home bucket, a row is written under its
// sequence lock. One thread meets all occurrences of a key in a batch, in order, so results do not depend on threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <tuple>
#include <vector>

#include "table/store/arena.hpp"
#include "table/store/calls.hpp"
#include "table/store/erasures.hpp"
#include "table/store/index.hpp"
#include "table/store/layout.hpp"
#include "table/store/scores.hpp"
#include "table/store/seqlock.hpp"

namespace hotloop::table {

class CountFilter;

struct Admission {
  // Whether an unknown key may enter that a batch holds `count` times.
  std::function<bool(std::uint64_t key, std::uint32_t count)> admits;
  // What `admits` counts in, if anything; the table holds its lock while it asks.
  CountFilter* counter = nullptr;
};

// Rows that had to leave for new ones, and new ones that a full table refused, in the order in which it was decided.
struct Evicted {
  std::vector<std::uint64_t> keys, scores;
  std::vector<char> values;  // rows, without gaps
};

struct Upsert {
  Keys keys{};
  Values values{};  // what keys get; without it existing rows stay and new ones are initialised
  Stamp stamp{};
  const Admission* admission = nullptr;
  Evicted* evicted = nullptr;
  std::uint32_t* rows = nullptr;  // (n,) out: the row of each key, kNoRow if it was not let in
  std::uint8_t* found = nullptr;  // (n,) out, optional: the key was there before
  bool* evicts = nullptr;         // out, optional: set if a row may have been evicted
};

// What became of one key of a batch.
struct Outcome {
  std::uint32_t row;
  bool existed;
};

class Evictor;

class Table {
 public:
  explicit Table(const Settings& settings);
  ~Table();
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;

  const Settings& settings() const { return settings_; }
  const RowLayout& layout() const { return layout_; }
  const Arena& arena() const { return arena_; }
  std::int64_t size() const { return size_.load(std::memory_order_relaxed); }
  std::int64_t capacity() const { return limit_.load(std::memory_order_relaxed); }
  std::int64_t slots() const { return index()->buckets() * Bucket::kSlots; }
  std::int64_t bytes() const;

  // found: (n,) out. Rows of values that are not found become 0. scores: optional, out.
  void find(Keys keys, Values values, std::uint8_t* found, std::uint64_t* scores) const;
  // rows: (n,) out, kNoRow where absent.
  void locate(Keys keys, std::uint32_t* rows) const;
  // Copies the row of a key that `locate` or `upsert` named, if it still is the key's.
  bool read(std::uint64_t key, std::uint32_t row, void* values) const;

  // The score of a key's row, if it still is the key's.
  bool score(std::uint64_t key, std::uint32_t row, std::uint64_t& score) const;

  // Notes a use of a key's row, if it still is the key's. at: position in the batch.
  bool use(std::uint64_t key, std::uint32_t row, const Stamp& stamp, std::int64_t at);
  // Whether a use leaves anything in a row.
  bool keeps_uses() const { return layout_.score >= 0 || layout_.time >= 0; }

  // Throws TableFull, before anything is written or counted, if the table has no eviction strategy.
  void upsert(const Upsert& call);
  // Only keys that are there. accumulate: values are added.
  void assign(Keys keys, Values values, Stamp stamp, bool accumulate, std::uint8_t* found);
  void erase(Keys keys, std::uint8_t* found);
  void clear();
  void reserve(std::int64_t rows);
  // Erases rows last used before `time`; says how many.
  std::int64_t expire(std::uint32_t time);

  // Calls edit(row) under the row's lock if it still is the key's, and says so. at: position in the batch, or -1
  // (touch).
  template <class Edit>
  bool edit(std::uint64_t key, std::uint32_t row, const Stamp& stamp, std::int64_t at, Edit&& edit);

  // Rows of [begin, end) in use whose version is above `since`, from the front of the outputs on; says how many.
  std::int64_t export_rows(std::int64_t begin, std::int64_t end, std::uint64_t since, const Export& out) const;
  // Puts rows back with state, score and time as exported. beyond: for a replica, whose source decides which rows stay:
  // the bound is ignored, and rows above it stay until the next key is entered, or `trim`.
  void import_rows(Keys keys, const Export& rows, bool beyond = false);
  // Evicts the lowest rows above the bound; says how many. Throws TableFull without an eviction strategy.
  std::int64_t trim();

  // Later changes are told from earlier ones by the number that is returned.
  std::uint64_t mark();
  std::uint64_t generation() const { return generation_.load(std::memory_order_seq_cst); }
  void set_generation(std::uint64_t g) { generation_.store(g, std::memory_order_seq_cst); }
  // Keys erased after `since` that are not there now. Throws std::out_of_range if that is no longer known.
  std::vector<std::uint64_t> erased_since(std::uint64_t since) const;
  // Whether a row was written, used or erased after `since`.
  bool changed_since(std::uint64_t since) const;
  void forget_erased(std::uint64_t until) { erasures_.forget(until); }

  // The number of a call: what LRU calls time.
  std::uint64_t next_tick() {
    const std::uint64_t tick = tick_.fetch_add(1, std::memory_order_relaxed) + 1;
    return tick >= kMostTicks && settings_.strategy == Strategy::kEpochLru ? renumber() : tick;
  }
  std::uint64_t tick() const { return tick_.load(std::memory_order_relaxed); }
  void set_tick(std::uint64_t tick) { tick_.store(tick, std::memory_order_relaxed); }

  const SeqLocks& locks() const { return locks_; }
  std::shared_ptr<Index> index() const {
    const std::lock_guard lock(index_mutex_);
    return index_;
  }
  std::uint64_t hash_of(std::uint64_t key) const { return place_hash(key, settings_.hash_seed); }
  // Row of a key, or kNoRow.
  std::uint32_t row_of(const Index& index, std::uint64_t key, std::uint64_t hash) const {
    return index.search(hash, [&](std::uint32_t r) { return arena_.holds(r, key); }).row;
  }
  // Where a row that was found is no longer the key's.
  std::uint32_t look_again(std::uint64_t key) const { return row_of(*index(), key, hash_of(key)); }
  // resolve(position, key, hash, row): `row` is the key's, or kNoRow where a quick look did not find one.
  template <class At, class Resolve>
  void look_up(const Index& index, std::int64_t count, std::int64_t row_bytes, At&& at, Resolve&& resolve) const;

 private:
  friend class Evictor;

  std::uint64_t renumber();
  void grow(std::int64_t rows);
  void rebuild(std::int64_t rows);
  std::int64_t limit_of(std::int64_t buckets) const;

  // The row of a key, which is entered if it is absent and there is room; else {kNoRow, false}.
  struct Entry {
    std::uint32_t row;
    bool existed;
  };
  Entry enter(Index& index, std::uint64_t key, std::uint64_t hash, RowSource& source, std::int64_t room_at_once,
              const Upsert& call, std::int64_t at);
  Entry enter_alone(Index& index, const Bucket* end, std::uint64_t key, std::uint64_t hash, RowSource& source,
                    std::int64_t room_at_once, const Upsert& call, std::int64_t at, bool& crossed);
  void make_row(std::uint32_t row, std::uint64_t key, const Upsert& call, std::int64_t at);
  // Writes all of a new row but its key, score and stamps, and says where it is.
  char* fill(std::uint32_t row, std::uint64_t key, const Upsert& call, std::int64_t at) const;
  void fill(char* row, std::uint64_t key, const Upsert& call, std::int64_t at) const;
  void initialize(char* row, std::uint64_t key) const;
  // Time, version and score of a row that was used, under its lock. at: position in the batch; -1: an update that is
  // no use of its own. A use that leaves a score or a time is a change: replicas have to learn of it.
  void touch(std::uint32_t row, const Stamp& stamp, std::int64_t at, bool fresh);
  bool write(std::uint64_t key, std::uint32_t row, const Upsert& call, std::int64_t at);
  // Erases a key if condition(its row) holds under the row's lock.
  template <class If>
  bool remove(Index& index, std::uint64_t key, std::vector<std::uint32_t>& freed, If&& condition);
  bool take_room(RowSource& source, std::int64_t at_once);
  struct Left {
    std::vector<std::int64_t> no_room, crossed;
  };
  // end: behind the buckets that this thread has to itself, null if it has none. whole: it has all of them.
  void upsert_some(Index& index, const Bucket* end, bool whole, const Upsert& call, const std::int64_t* positions,
                   std::int64_t count, std::int64_t room_at_once, Outcome* outcomes, Left& left);
  void upsert_slice(const Upsert& call, const std::int64_t* positions, std::int64_t begin, std::int64_t count,
                    std::int64_t room_at_once, std::vector<std::int64_t>& deferred);
  // Positions that found no room in a table that evicts; others throw TableFull.
  std::vector<std::int64_t> upsert_all(const Upsert& call, const std::int64_t* positions, std::int64_t count);
  void upsert_within(const Upsert& call);
  void upsert_evicting(const Upsert& call, const std::vector<std::int64_t>& positions);
  template <class If>
  bool release(std::uint32_t row, If&& condition);
  void set_score(std::uint32_t row, std::uint64_t score);  // under the row's lock

  Settings settings_;
  RowLayout layout_;
  mutable Arena arena_;
  SeqLocks locks_;
  mutable std::mutex index_mutex_;
  std::shared_ptr<Index> index_;
  mutable std::shared_mutex structure_;
  std::atomic<int> writers_{0};  // calls of upsert under way
  std::mutex admission_mutex_;
  std::unique_ptr<Evictor> evictor_;
  std::atomic<std::int64_t> size_{0};      // rows, but for those of batches under way
  std::atomic<std::int64_t> reserved_{0};  // rows, and room that threads have put aside
  std::atomic<std::int64_t> limit_{0};
  std::atomic<std::int64_t> most_rows_;  // the bound, but while a replica takes rows beyond it
  std::atomic<std::uint64_t> tick_{0}, generation_{1};
  Erasures erasures_;
};

template <bool kWrite = false>
inline void prefetch_row(const char* row, std::int64_t bytes) {
  for (std::int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, kWrite);
  if ((reinterpret_cast<std::uintptr_t>(row) & 63) + static_cast<std::uintptr_t>(bytes & 63) > 64) {
    __builtin_prefetch(row + bytes - 1, kWrite);
  }
}

template <class At, class Resolve>
void Table::look_up(const Index& index, std::int64_t count, std::int64_t row_bytes, At&& at, Resolve&& resolve) const {
  // A software pipeline over groups of 16 keys (8 where rows span several cache lines): prefetch the buckets; read them
  // and prefetch the rows, or the next buckets of keys whose bucket was full; that again, twice; read the rows. About
  // twelve cache-line fetches can be in flight; each has one group's time to arrive.
  constexpr int kGroup = 16, kLooks = 3, kRing = 8;
  static_assert(kLooks + 2 <= kRing);
  struct Pending {
    std::int64_t position;
    std::uint64_t key, hash;
    Bucket* bucket;  // null: nowhere
    std::uint32_t row;
  } ring[kRing][kGroup];
  const std::int64_t group_size = row_bytes > 64 ? kGroup / 2 : kGroup;
  std::uint8_t past[kRing][kGroup];
  int pasts[kRing] = {};
  const auto size = [&](std::int64_t group) {
    return static_cast<int>(std::clamp<std::int64_t>(count - group * group_size, 0, group_size));
  };
  // Whether the key is past this bucket; the next one is on its way then.
  const auto look = [&](Pending& p) {
    const std::uint32_t header = p.bucket->read_header();
    std::uint32_t m = p.bucket->match(Index::tag(p.hash)) & header;
    if (m != 0) {
      // A slot that is claimed and not yet filled has no row: `row_of` looks at all of them then.
      p.row = p.bucket->row(std::countr_zero(m));
      if (p.row != kNoRow) prefetch_row(arena_.row(p.row), row_bytes);
      while ((m &= m - 1) != 0) {
        const std::uint32_t other = p.bucket->row(std::countr_zero(m));
        if (other != kNoRow) __builtin_prefetch(arena_.row(other));
      }
      return false;
    }
    p.bucket = header >= Bucket::kPassed ? index.next(p.bucket) : nullptr;
    __builtin_prefetch(p.bucket);
    return p.bucket != nullptr;
  };
  const std::int64_t groups = (count + group_size - 1) / group_size;
  const std::uint64_t seed = settings_.hash_seed;
  for (std::int64_t g = 0; g < groups + kLooks + 1; ++g) {
    Pending* const first = ring[g % kRing];
    for (int i = 0, n = size(g); i < n; ++i) {
      Pending& p = first[i];
      std::tie(p.position, p.key) = at(g * group_size + i);
      p.hash = place_hash(p.key, seed);
      p.bucket = index.home(p.hash);
      p.row = kNoRow;
      __builtin_prefetch(p.bucket);
      past[g % kRing][i] = static_cast<std::uint8_t>(i);
    }
    pasts[g % kRing] = size(g);
    for (int step = 1; step <= kLooks && step <= g; ++step) {
      const std::int64_t slot = (g - step) % kRing;
      int left = 0;
      for (int i = 0; i < pasts[slot]; ++i) {
        const std::uint8_t which = past[slot][i];
        past[slot][left] = which;
        left += look(ring[slot][which]);
      }
      pasts[slot] = left;
    }
    if (g <= kLooks) continue;
    Pending* const last = ring[(g - kLooks - 1) % kRing];
    for (int i = 0, n = size(g - kLooks - 1); i < n; ++i) {
      Pending& p = last[i];
      if (p.bucket != nullptr && (p.row == kNoRow || !arena_.holds(p.row, p.key))) p.row = row_of(index, p.key, p.hash);
      resolve(p.position, p.key, p.hash, p.row);
    }
  }
}

template <class Edit>
bool Table::edit(std::uint64_t key, std::uint32_t row, const Stamp& stamp, std::int64_t at, Edit&& edit) {
  const SeqLocks::Writing writing(locks_, row);
  char* const p = arena_.row(row);
  if (!arena_.holds(p, row, key)) return false;
  if constexpr (kWordByWord) {
    std::vector<char> copy(static_cast<std::size_t>(layout_.stride));
    std::memcpy(copy.data(), p, copy.size());
    edit(copy.data());
    copy_in(p + 8, copy.data() + 8, copy.size() - 8);
  } else {
    edit(p);
  }
  touch(row, stamp, at, false);
  return true;
}

}  // namespace hotloop::table
