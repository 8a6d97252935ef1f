// SPDX-License-Identifier: Apache-2.0
// A table as a whole: construction, growth, lookups that change nothing, and writes to one row (first values, score,
// time, version). insert.cpp changes the keys of a table; scan.cpp exports rows and the changes since a mark.
//
// Growth builds a new index beside the old one, under the exclusive lock of the structure, and swaps the pointer.
// Lookups keep the index that they started with, and no row moves.
#include "table/store/table.hpp"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "core/parallel.hpp"
#include "table/store/evictor.hpp"
#include "table/store/floats.hpp"
#include "table/store/initialize.hpp"

namespace hotloop::table {

InitializeRow initialize_row() { HOTLOOP_SIMD_DISPATCH(table_initialize_row) }

namespace {

// A key costs about 50 ns; a second thread is worth it from a few microseconds on.
constexpr std::int64_t kGrain = 512;

std::int64_t buckets_for(std::int64_t rows, double load) {
  const double slots = static_cast<double>(rows) / load;
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(std::ceil(slots / Bucket::kSlots)));
}

}  // namespace

Table::Table(const Settings& settings)
    : settings_(settings),
      layout_(settings),
      arena_(layout_.stride, settings.capacity),
      most_rows_(settings.max_rows),
      erasures_(settings.hash_seed) {
  const std::int64_t rows = std::clamp<std::int64_t>(settings.capacity, 1, settings.max_rows);
  index_ = std::make_shared<Index>(buckets_for(rows, settings.max_load_factor));
  limit_ = limit_of(index_->buckets());
  if (settings.strategy != Strategy::kNone) evictor_ = std::make_unique<Evictor>(*this);
}

Table::~Table() = default;

std::int64_t Table::limit_of(std::int64_t buckets) const {
  // One slot stays free, so that every search for one ends.
  const std::int64_t slots = buckets * Bucket::kSlots;
  const auto rows = static_cast<std::int64_t>(static_cast<double>(slots) * settings_.max_load_factor + 1e-6);
  return std::min(most_rows_.load(std::memory_order_relaxed), std::clamp<std::int64_t>(rows, 1, slots - 1));
}

std::int64_t Table::bytes() const {
  const std::int64_t candidates = evictor_ == nullptr ? 0 : evictor_->bytes();
  return arena_.bytes() + static_cast<std::int64_t>(index()->bytes()) + erasures_.bytes() + candidates;
}

void Table::reserve(std::int64_t rows) {
  if (std::min(rows, settings_.max_rows) > capacity()) grow(rows);
}

void Table::grow(std::int64_t rows) {
  const std::unique_lock alone(structure_);
  // Another call may have grown the table while this one waited.
  const std::int64_t least = std::max(rows, size() + 1), most = most_rows_.load(std::memory_order_relaxed);
  if (capacity() >= std::min(least, most)) return;
  rebuild(std::min(std::max(least, 2 * capacity()), most));
}

void Table::rebuild(std::int64_t rows) {
  auto index = std::make_shared<Index>(buckets_for(rows, settings_.max_load_factor));
  parallel_for(arena_.words(), 64, [&](std::int64_t begin, std::int64_t end) {
    constexpr int kAhead = 16;
    std::uint64_t hashes[kAhead];
    std::uint32_t rows_of[kAhead];
    int n = 0;
    const auto flush = [&] {
      for (int i = 0; i < n; ++i) index->place(hashes[i], rows_of[i]);
      n = 0;
    };
    arena_.each_live(begin, end, [&](std::uint32_t r) {
      hashes[n] = hash_of(arena_.key(r));
      __builtin_prefetch(index->home(hashes[n]), 1);
      rows_of[n] = r;
      if (++n == kAhead) flush();
    });
    flush();
  });
  const std::lock_guard lock(index_mutex_);
  index_ = std::move(index);
  limit_ = limit_of(index_->buckets());
}

// Updates that are under way keep the number they have, and their rows count as used last for as long as it was ahead.
std::uint64_t Table::renumber() {
  const std::unique_lock alone(structure_);
  if (tick_.load(std::memory_order_relaxed) >= kMostTicks) {  // else another call has renumbered already
    arena_.each_live(0, arena_.words(), [&](std::uint32_t r) {
      const SeqLocks::Writing writing(locks_, r);
      char* const score = arena_.row(r) + layout_.score;
      store_relaxed(score, renumbered(load_relaxed<std::uint64_t>(score)));
    });
    evictor_->forget();
    tick_.store(kMostTicks - kTicksTaken, std::memory_order_relaxed);
  }
  return tick_.fetch_add(1, std::memory_order_relaxed) + 1;
}

bool Table::read(std::uint64_t key, std::uint32_t row, void* values) const {
  const char* const p = arena_.row(row);
  for (;;) {
    const std::uint32_t v = locks_.begin_read(row);
    if (!arena_.holds(p, row, key)) return false;
    copy_out(values, p + layout_.values, static_cast<std::size_t>(layout_.value_bytes()));
    if (locks_.end_read(row, v)) return true;
  }
}

bool Table::score(std::uint64_t key, std::uint32_t row, std::uint64_t& score) const {
  for (;;) {
    const std::uint32_t v = locks_.begin_read(row);
    if (!arena_.holds(row, key)) return false;
    score = load_relaxed<std::uint64_t>(arena_.row(row) + layout_.score);
    if (locks_.end_read(row, v)) return true;
  }
}

void Table::find(Keys keys, Values values, std::uint8_t* found, std::uint64_t* scores) const {
  const std::shared_ptr<Index> index = this->index();
  parallel_for(keys.count, kGrain, [&](std::int64_t begin, std::int64_t end) {
    look_up(
        *index, end - begin, values ? layout_.values + layout_.value_bytes() : 8,
        [&](std::int64_t i) { return std::pair(begin + i, keys[begin + i]); },
        [&](std::int64_t i, std::uint64_t key, std::uint64_t hash, std::uint32_t row) {
          bool is_there = row != kNoRow;
          while (is_there && values && !read(key, row, values.row(i))) {
            row = row_of(*index, key, hash);  // moved to another row between the two looks
            is_there = row != kNoRow;
          }
          found[i] = is_there;
          if (!is_there && values) std::memset(values.row(i), 0, static_cast<std::size_t>(layout_.value_bytes()));
          if (scores == nullptr) return;
          scores[i] = 0;
          if (layout_.score < 0) return;
          while (is_there && !score(key, row, scores[i])) {
            row = row_of(*index, key, hash);
            is_there = row != kNoRow;
          }
          found[i] = is_there;
        });
  });
}

void Table::locate(Keys keys, std::uint32_t* rows) const {
  const std::shared_ptr<Index> index = this->index();
  parallel_for(keys.count, kGrain, [&](std::int64_t begin, std::int64_t end) {
    look_up(
        *index, end - begin, 8, [&](std::int64_t i) { return std::pair(begin + i, keys[begin + i]); },
        [&](std::int64_t i, std::uint64_t, std::uint64_t, std::uint32_t row) { rows[i] = row; });
  });
}

void Table::initialize(char* row, std::uint64_t key) const {
  const InitializeRow draw = initialize_row();
  char* const values = row + layout_.values;
  if (settings_.dtype == Dtype::kUInt8) {
    std::memset(values, 0, static_cast<std::size_t>(layout_.value_bytes()));
    return;
  }
  float few[256];
  std::vector<float> many(layout_.dim > 256 ? static_cast<std::size_t>(layout_.dim) : 0);
  float* const drawn = many.empty() ? few : many.data();
  draw(settings_.initializer, settings_.first, settings_.second, settings_.seed, key, layout_.dim, drawn);
  store_floats(settings_.dtype, drawn, values, layout_.dim);
}

char* Table::fill(std::uint32_t row, std::uint64_t key, const Upsert& call, std::int64_t at) const {
  char* const p = arena_.row(row);
  if constexpr (kWordByWord) {
    std::vector<char> copy(static_cast<std::size_t>(layout_.stride));
    fill(copy.data(), key, call, at);
    copy_in(p + 8, copy.data() + 8, copy.size() - 8);
  } else {
    fill(p, key, call, at);
  }
  return p;
}

void Table::fill(char* row, std::uint64_t key, const Upsert& call, std::int64_t at) const {
  for (std::int64_t at_head = 8; at_head < layout_.values; at_head += 4) std::memset(row + at_head, 0, 4);
  if (call.values)
    copy_bytes(row + layout_.values, call.values.row(at), static_cast<std::size_t>(layout_.value_bytes()));
  else
    initialize(row, key);
  if (layout_.states > 0) {
    std::memcpy(row + layout_.state, settings_.initial_state.data(), static_cast<std::size_t>(layout_.states) * 4);
  }
}

void Table::touch(std::uint32_t row, const Stamp& stamp, std::int64_t at, bool fresh) {
  char* const p = arena_.row(row);
  if (layout_.time >= 0 && stamp.time > load_relaxed<std::uint32_t>(p + layout_.time)) {
    store_relaxed<std::uint32_t>(p + layout_.time, stamp.time);
  }
  if (layout_.version >= 0) {
    // The generation is read under the row's lock: see mark().
    store_relaxed(p + layout_.version, static_cast<std::uint32_t>(generation_.load(std::memory_order_seq_cst)));
  }
  if (layout_.score < 0) return;
  const std::uint64_t before = load_relaxed<std::uint64_t>(p + layout_.score);
  const std::uint64_t score = next_score(settings_.strategy, stamp, at, fresh, before);
  if (score != before || fresh) set_score(row, score);
}

void Table::set_score(std::uint32_t row, std::uint64_t score) {
  char* const p = arena_.row(row);
  store_relaxed(p + layout_.score, score);
  evictor_->note({score, load_relaxed<std::uint64_t>(p), row});
}

}  // namespace hotloop::table
