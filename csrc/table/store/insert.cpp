// SPDX-License-Identifier: Apache-2.0
// Writes of a table that change which keys it holds: upsert, erase, eviction, import, clear.
//
// A batch is divided among threads by the hash of its keys, so that one thread meets all occurrences of a key in order
// and results do not depend on the number of threads. `upsert` works through slices of 65,536 keys: it looks a key up,
// writes the row if there is one, and otherwise takes a row from the arena, fills it, and names it in the key's bucket.
// A call that is alone gives each thread a range of buckets and locks nothing; calls that overlap lock the home bucket
// of each key. With a bound or a filter known keys come first (`upsert_within`); keys for which there is no room then
// evict the lowest row one at a time, in the order of the batch (`upsert_evicting`).
#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <unordered_map>

#include "core/parallel.hpp"
#include "table/filter.hpp"
#include "table/store/divide.hpp"
#include "table/store/evictor.hpp"
#include "table/store/floats.hpp"
#include "table/store/table.hpp"

namespace hotloop::table {

namespace {

constexpr auto always = [](const char*) { return true; };

// Counts one more while it lives.
struct Counted {
  explicit Counted(std::atomic<int>& count) : count_(count) { count_.fetch_add(1, std::memory_order_relaxed); }
  ~Counted() { count_.fetch_sub(1, std::memory_order_relaxed); }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

 private:
  std::atomic<int>& count_;
};

}  // namespace

// Room is taken from the shared counter for several rows at once: adding to it at every insertion would cost more than
// the insertion.
bool Table::take_room(RowSource& source, std::int64_t at_once) {
  if (source.room == 0) {
    const std::int64_t before = reserved_.fetch_add(at_once, std::memory_order_relaxed);
    source.room = std::clamp<std::int64_t>(capacity() - before, 0, at_once);
    reserved_.fetch_sub(at_once - source.room, std::memory_order_relaxed);
    if (source.room == 0) return false;
  }
  --source.room;
  return true;
}

Table::Entry Table::enter(Index& index, std::uint64_t key, std::uint64_t hash, RowSource& source,
                          std::int64_t room_at_once, const Upsert& call, std::int64_t at) {
  const std::uint32_t row = source.take();  // before the lock: it may throw
  const Bucket::Holding holding(*index.home(hash));
  const std::uint32_t there = row_of(index, key, hash);
  if (there != kNoRow || !take_room(source, room_at_once)) {
    source.give(row);
    return {there, there != kNoRow};
  }
  make_row(row, key, call, at);
  index.place(hash, row);
  ++source.entered;
  return {row, false};
}

// The same without locks, for the only writer of the buckets before `end`. `crossed`: there is no slot before it.
Table::Entry Table::enter_alone(Index& index, const Bucket* end, std::uint64_t key, std::uint64_t hash,
                                RowSource& source, std::int64_t room_at_once, const Upsert& call, std::int64_t at,
                                bool& crossed) {
  const std::uint32_t there = row_of(index, key, hash);
  if (there != kNoRow) return {there, true};
  Bucket* const bucket = index.room_before(end, hash);
  crossed = bucket == nullptr;
  if (crossed) return {kNoRow, false};
  const std::uint32_t row = source.take();  // before room is taken: it may throw
  if (!take_room(source, room_at_once)) {
    source.give(row);
    return {kNoRow, false};
  }
  if (layout_.score >= 0 || layout_.version >= 0 || key == kNobody) {
    make_row(row, key, call, at);
  } else {
    // No bucket names this row yet, so no other thread writes to it. A reader that has its number from an earlier key
    // checks the key, which is written last; a scan checks the live bits, which are set after that.
    char* const p = fill(row, key, call, at);
    if (layout_.time >= 0) store_relaxed(p + layout_.time, call.stamp.time);
    publish_key(p, key);
    source.live(row);
  }
  index.place_alone(bucket, hash, row);
  ++source.entered;
  return {row, false};
}

void Table::make_row(std::uint32_t row, std::uint64_t key, const Upsert& call, std::int64_t at) {
  const SeqLocks::Writing writing(locks_, row);
  publish_key(fill(row, key, call, at), key);
  arena_.set_live(row, true);  // first: the evictor passes over rows that are not
  touch(row, call.stamp, at, true);
}

bool Table::write(std::uint64_t key, std::uint32_t row, const Upsert& call, std::int64_t at) {
  const SeqLocks::Writing writing(locks_, row);
  char* const p = arena_.row(row);
  if (!arena_.holds(p, row, key)) return false;
  if (call.values) copy_in(p + layout_.values, call.values.row(at), static_cast<std::size_t>(layout_.value_bytes()));
  touch(row, call.stamp, at, false);
  return true;
}

bool Table::use(std::uint64_t key, std::uint32_t row, const Stamp& stamp, std::int64_t at) {
  const SeqLocks::Writing writing(locks_, row);
  if (!arena_.holds(row, key)) return false;
  touch(row, stamp, at, false);
  return true;
}

void Table::upsert_some(Index& index, const Bucket* end, bool whole, const Upsert& call, const std::int64_t* positions,
                        std::int64_t count, std::int64_t room_at_once, Outcome* outcomes, Left& left) {
  RowSource source(arena_);
  // Settles the counters however this function is left.
  struct Settle {
    Table& table;
    RowSource& source;
    ~Settle() {
      table.size_.fetch_add(source.entered, std::memory_order_relaxed);
      table.reserved_.fetch_sub(source.room, std::memory_order_relaxed);
    }
  } settle{*this, source};
  const bool touches = call.values || keeps_uses();
  // After the first key without room, insert none in this pass. A deferred key is retried later; had its second
  // occurrence got in, the retry would overwrite the newer value.
  bool full = false;
  look_up(
      index, count, touches ? layout_.stride : 8, [&](std::int64_t i) { return std::pair(i, call.keys[positions[i]]); },
      [&](std::int64_t i, std::uint64_t key, std::uint64_t hash, std::uint32_t row) {
        const std::int64_t at = positions[i];
        for (;;) {
          bool crossed = false;
          Entry e{row, true};
          if (row == kNoRow && full)
            e = {row_of(index, key, hash), true};
          else if (row == kNoRow && end == nullptr)
            e = enter(index, key, hash, source, room_at_once, call, at);
          else if (row == kNoRow)
            e = enter_alone(index, end, key, hash, source, room_at_once, call, at, crossed);
          // A thread that has all buckets enters the key behind the last bucket at once instead of deferring it: rows
          // are then numbered in the order of the batch, whatever the keys hash to.
          if (crossed && whole) {
            crossed = false;
            e = enter(index, key, hash, source, room_at_once, call, at);
          }
          if (e.row == kNoRow) {
            (crossed ? left.crossed : left.no_room).push_back(at);
            full |= !crossed;
            e.existed = false;
          }
          // A row that was erased between the two looks is entered anew.
          row = kNoRow;
          if (e.existed && touches && !write(key, e.row, call, at)) continue;
          outcomes[i] = {e.row, e.existed};
          return;
        }
      });
}

// Enters one slice of keys. If no other call is changing the table's structure, this one takes it exclusively for the
// slice and gives each thread a range of buckets, so that no bucket needs a lock. Positions without room are deferred.
void Table::upsert_slice(const Upsert& call, const std::int64_t* positions, std::int64_t begin, std::int64_t count,
                         std::int64_t room_at_once, std::vector<std::int64_t>& deferred) {
  std::unique_lock alone(structure_, std::defer_lock);
  std::shared_lock together(structure_, std::defer_lock);
  if (writers_.load(std::memory_order_relaxed) > 1 || !alone.try_lock()) together.lock();
  const std::shared_ptr<Index> index = this->index();
  const std::int64_t threads = threads_for(count);
  const auto put = [&](std::int64_t at, const Outcome& o) {
    call.rows[at] = o.row;
    if (call.found != nullptr) call.found[at] = o.existed;
  };
  std::mutex mutex;
  Left left;
  divide(
      call.keys, positions, begin, count, threads,
      [&](std::uint64_t key) {
        const std::uint64_t hash = hash_of(key);
        return alone ? index->owner(hash, threads) : owner_by_hash(hash, threads);
      },
      [&](std::int64_t thread, const std::int64_t* mine, std::int64_t n, Outcome* outcomes) {
        Left my_left;
        upsert_some(*index, alone ? index->end_of(thread, threads) : nullptr, threads == 1, call, mine, n, room_at_once,
                    outcomes, my_left);
        const std::lock_guard lock(mutex);
        left.no_room.insert(left.no_room.end(), my_left.no_room.begin(), my_left.no_room.end());
        left.crossed.insert(left.crossed.end(), my_left.crossed.begin(), my_left.crossed.end());
      },
      put);
  if (!left.crossed.empty()) {
    std::sort(left.crossed.begin(), left.crossed.end());
    std::vector<Outcome> outcomes(left.crossed.size());
    upsert_some(*index, nullptr, false, call, left.crossed.data(), static_cast<std::int64_t>(outcomes.size()),
                room_at_once, outcomes.data(), left);
    for (std::size_t i = 0; i < outcomes.size(); ++i) put(left.crossed[i], outcomes[i]);
  }
  deferred.insert(deferred.end(), left.no_room.begin(), left.no_room.end());
}

std::vector<std::int64_t> Table::upsert_all(const Upsert& call, const std::int64_t* positions, std::int64_t count) {
  std::vector<std::int64_t> all_left, left, deferred;
  for (std::int64_t begin = 0; begin < count; begin += kSlice) {
    const std::int64_t rest = count - begin;
    const std::int64_t* some = positions;
    std::int64_t first = begin, n = std::min(kSlice, rest);
    // A slice is finished before the next one begins, so that repeated keys take effect in order.
    for (std::int64_t room_at_once = 64;;) {
      deferred.clear();
      upsert_slice(call, some, first, n, room_at_once, deferred);
      if (deferred.empty()) break;
      std::sort(deferred.begin(), deferred.end());
      left.swap(deferred);
      some = left.data();
      first = 0;
      n = static_cast<std::int64_t>(left.size());
      // Another thread may have reserved room that it did not use: try again, reserving one row at a time.
      if (size() < capacity() && room_at_once > 1) {
        room_at_once = 1;
        continue;
      }
      if (capacity() >= most_rows_.load(std::memory_order_relaxed)) {
        if (evictor_ == nullptr) throw TableFull();
        all_left.insert(all_left.end(), left.begin(), left.end());
        break;
      }
      // Grow at most fourfold: the keys that are left may be one key repeated many times.
      grow(std::min(size() + rest, 4 * capacity()));
      room_at_once = 64;
    }
  }
  return all_left;
}

void Table::upsert(const Upsert& given) {
  Upsert call = given;
  if (call.stamp.tick == 0) call.stamp.tick = next_tick();
  const Counted one_more(writers_);
  if (call.admission == nullptr && most_rows_.load(std::memory_order_relaxed) >= kMaxRows) {
    upsert_all(call, nullptr, call.keys.count);
  } else {
    upsert_within(call);
  }
}

// Upsert with an admission filter or a bound on the rows: known keys first, then the unknown keys, under a lock that
// lets one batch of unknown keys in at a time.
void Table::upsert_within(const Upsert& call) {
  locate(call.keys, call.rows);
  std::vector<std::int64_t> known, unknown;
  for (std::int64_t i = 0; i < call.keys.count; ++i) (call.rows[i] != kNoRow ? known : unknown).push_back(i);
  if (unknown.empty()) {
    // Another call may evict a known key before this call gets to it.
    const std::vector<std::int64_t> left = upsert_all(call, nullptr, call.keys.count);
    if (left.empty()) return;
    const std::lock_guard one(admission_mutex_);
    upsert_evicting(call, left);
    return;
  }
  const std::lock_guard one(admission_mutex_);
  std::unordered_map<std::uint64_t, std::uint32_t, SeededHash> counts(unknown.size(), SeededHash{settings_.hash_seed});
  std::vector<std::uint64_t> order;
  for (const std::int64_t i : unknown) {
    if (counts[call.keys[i]]++ == 0) order.push_back(call.keys[i]);
  }
  const auto beyond = [&] { return size() + static_cast<std::int64_t>(counts.size()) > settings_.max_rows; };
  bool full = beyond();
  if (call.admission != nullptr) {
    CountFilter* const counter = call.admission->counter;
    std::unique_lock<std::mutex> counting;
    if (counter != nullptr) counting = std::unique_lock(counter->mutex());
    // Whether a batch fits depends on which keys the filter admits, and asking also counts the sighting. So the old
    // cell values are kept while asking, and restored if the batch is refused.
    std::optional<CountFilter::Trial> trial;
    if (full && evictor_ == nullptr && counter != nullptr) trial.emplace(*counter);
    for (const std::uint64_t key : order) {
      if (!call.admission->admits(key, counts[key])) counts.erase(key);
    }
    full = beyond();
    if (full && evictor_ == nullptr) throw TableFull();
    if (trial) trial->keep();
    std::erase_if(unknown, [&](std::int64_t i) {
      if (counts.contains(call.keys[i])) return false;
      if (call.found != nullptr) call.found[i] = 0;
      return true;
    });
  }
  if (full && evictor_ == nullptr) throw TableFull();
  std::vector<std::int64_t> left;
  if (!known.empty()) left = upsert_all(call, known.data(), static_cast<std::int64_t>(known.size()));
  if (full) {
    left.insert(left.end(), unknown.begin(), unknown.end());
  } else {
    const std::vector<std::int64_t> rest = upsert_all(call, unknown.data(), static_cast<std::int64_t>(unknown.size()));
    left.insert(left.end(), rest.begin(), rest.end());
  }
  if (!left.empty()) upsert_evicting(call, left);
}

// Enters keys one after the other, in the order of the batch, since that order decides which rows are evicted.
void Table::upsert_evicting(const Upsert& call, const std::vector<std::int64_t>& positions) {
  if (call.evicts != nullptr) *call.evicts = true;
  grow(settings_.max_rows);
  const std::shared_lock together(structure_);
  const std::shared_ptr<Index> index = this->index();
  std::vector<std::uint32_t> freed;
  for (const std::int64_t at : positions) {
    for (;;) {
      Outcome outcome{};
      Left left;
      upsert_some(*index, nullptr, false, call, &at, 1, 1, &outcome, left);
      if (left.no_room.empty()) {
        if (call.found != nullptr) call.found[at] = outcome.existed;
        break;  // the row number is found by `locate` below
      }
      const std::optional<Evictor::Victim> lowest = evictor_->lowest();
      if (!lowest) continue;  // all rows were erased meanwhile
      const Evictor::Victim v = *lowest;
      const std::uint64_t score = next_score(settings_.strategy, call.stamp, at, true, 0);
      // A new key whose score is below every row's is refused, except under LFU: its keys start with the lowest score.
      const auto width = static_cast<std::size_t>(layout_.value_bytes());
      if (settings_.strategy != Strategy::kLfu && score < v.score) {
        call.rows[at] = kNoRow;
        if (call.found != nullptr) call.found[at] = 0;
        if (call.evicted != nullptr && call.values) {
          call.evicted->keys.push_back(call.keys[at]);
          call.evicted->scores.push_back(score);
          const char* const given = call.values.row(at);
          call.evicted->values.insert(call.evicted->values.end(), given, given + width);
        }
        break;
      }
      if (call.evicted != nullptr) {  // allocate first: running out of memory must not lose an evicted row
        call.evicted->keys.push_back(v.key);
        call.evicted->scores.push_back(v.score);
        call.evicted->values.resize(call.evicted->keys.size() * width);
      }
      const bool gone = remove(*index, v.key, freed, [&](const char* row) {
        if (load_relaxed<std::uint64_t>(row + layout_.score) != v.score) return false;  // used meanwhile
        if (call.evicted != nullptr) {
          copy_out(call.evicted->values.data() + call.evicted->values.size() - width, row + layout_.values, width);
        }
        return true;
      });
      if (!gone && call.evicted != nullptr) {
        call.evicted->keys.pop_back();
        call.evicted->scores.pop_back();
        call.evicted->values.resize(call.evicted->values.size() - width);
      }
      arena_.give(freed);
    }
  }
  // A key of the batch may have been evicted for a later one: look all row numbers up again.
  locate(call.keys, call.rows);
}

std::int64_t Table::trim() {
  const std::lock_guard one(admission_mutex_);
  if (size() <= settings_.max_rows) return 0;
  if (evictor_ == nullptr) throw TableFull();
  const std::shared_lock together(structure_);
  const std::shared_ptr<Index> index = this->index();
  std::vector<std::uint32_t> freed;
  std::int64_t gone = 0;
  while (size() > settings_.max_rows) {
    const std::optional<Evictor::Victim> lowest = evictor_->lowest();
    if (!lowest) break;  // all rows were erased meanwhile
    gone += remove(*index, lowest->key, freed,
                   [&](const char* row) { return load_relaxed<std::uint64_t>(row + layout_.score) == lowest->score; });
    arena_.give(freed);
  }
  return gone;
}

void Table::import_rows(Keys keys, const Export& rows, bool beyond) {
  struct Lifted {
    Table& table;
    bool on;
    Lifted(Table& t, bool b) : table(t), on(b) { set(kMaxRows); }
    ~Lifted() { set(table.settings_.max_rows); }
    void set(std::int64_t most) {
      if (!on) return;
      const std::unique_lock alone(table.structure_);
      table.most_rows_ = most;
      table.limit_ = table.limit_of(table.index()->buckets());
    }
  } const lifted(*this, beyond && settings_.max_rows < kMaxRows);
  std::vector<std::uint32_t> at(static_cast<std::size_t>(keys.count));
  upsert({.keys = keys, .values = rows.values, .stamp = {.scores = rows.scores}, .rows = at.data()});
  const auto put_back = [&](std::int64_t, const std::int64_t* mine, std::int64_t n, Outcome*) {
    for (std::int64_t k = 0; k < n; ++k) {
      const std::int64_t i = mine[k];
      const std::uint32_t r = at[static_cast<std::size_t>(i)];
      if (r == kNoRow) continue;
      const SeqLocks::Writing writing(locks_, r);
      char* const p = arena_.row(r);
      if (!arena_.holds(p, r, keys[i])) continue;
      if (rows.state) copy_in(p + layout_.state, rows.state.row(i), static_cast<std::size_t>(layout_.states) * 4);
      if (rows.scores != nullptr && layout_.score >= 0) set_score(r, rows.scores[i]);
      if (rows.times != nullptr && layout_.time >= 0) store_relaxed(p + layout_.time, rows.times[i]);
    }
  };
  divide_all(*this, keys, put_back, [](std::int64_t, const Outcome&) {});
}

void Table::assign(Keys keys, Values values, Stamp stamp, bool accumulate, std::uint8_t* found) {
  stamp.tick = next_tick();
  const std::shared_ptr<Index> index = this->index();
  const auto write_some = [&](std::int64_t, const std::int64_t* mine, std::int64_t n, Outcome* outcomes) {
    std::vector<float> sum(accumulate ? static_cast<std::size_t>(2 * layout_.dim) : 0);
    look_up(
        *index, n, layout_.stride, [&](std::int64_t i) { return std::pair(i, keys[mine[i]]); },
        [&](std::int64_t i, std::uint64_t key, std::uint64_t hash, std::uint32_t row) {
          const std::int64_t at = mine[i];
          bool done = false;
          for (; !done && row != kNoRow; row = row_of(*index, key, hash)) {
            done = edit(key, row, stamp, at, [&](char* p) {
              if (!accumulate) {
                std::memcpy(p + layout_.values, values.row(at), static_cast<std::size_t>(layout_.value_bytes()));
                return;
              }
              load_floats(settings_.dtype, p + layout_.values, sum.data(), layout_.dim);
              load_floats(settings_.dtype, values.row(at), sum.data() + layout_.dim, layout_.dim);
              for (std::int64_t j = 0; j < layout_.dim; ++j)
                sum[static_cast<std::size_t>(j)] += sum[static_cast<std::size_t>(layout_.dim + j)];
              store_floats(settings_.dtype, sum.data(), p + layout_.values, layout_.dim);
            });
          }
          outcomes[i].existed = done;
        });
  };
  divide_all(*this, keys, write_some, [&](std::int64_t at, const Outcome& o) { found[at] = o.existed; });
}

template <class If>
bool Table::remove(Index& index, std::uint64_t key, std::vector<std::uint32_t>& freed, If&& condition) {
  const std::uint64_t hash = hash_of(key);
  {
    const Bucket::Holding holding(*index.home(hash));
    const Index::Place place = index.search(hash, [&](std::uint32_t r) { return arena_.holds(r, key); });
    if (!place) return false;
    freed.push_back(place.row);  // may throw, so before anything is changed
    if (!release(place.row, condition)) {
      freed.pop_back();
      return false;
    }
    index.remove(hash, place);
  }
  size_.fetch_sub(1, std::memory_order_relaxed);
  reserved_.fetch_sub(1, std::memory_order_relaxed);
  if (settings_.versions) erasures_.note(generation_, &key, 1);
  return true;
}

// A freed row no longer holds its key, which is what callers that still have its row number check.
template <class If>
bool Table::release(std::uint32_t row, If&& condition) {
  const SeqLocks::Writing writing(locks_, row);
  if (!condition(arena_.row(row))) return false;
  store_relaxed<std::uint64_t>(arena_.row(row), kNobody);
  arena_.set_live(row, false);
  return true;
}

void Table::erase(Keys keys, std::uint8_t* found) {
  const std::shared_lock together(structure_);
  const std::shared_ptr<Index> index = this->index();
  const auto erase_some = [&](std::int64_t, const std::int64_t* mine, std::int64_t n, Outcome* outcomes) {
    std::vector<std::uint32_t> freed;
    look_up(
        *index, n, 8, [&](std::int64_t i) { return std::pair(i, keys[mine[i]]); },
        [&](std::int64_t i, std::uint64_t key, std::uint64_t, std::uint32_t row) {
          outcomes[i].existed = row != kNoRow && remove(*index, key, freed, always);
        });
    arena_.give(freed);
  };
  divide_all(*this, keys, erase_some, [&](std::int64_t at, const Outcome& o) { found[at] = o.existed; });
}

std::int64_t Table::expire(std::uint32_t time) {
  const std::shared_lock together(structure_);
  const std::shared_ptr<Index> index = this->index();
  std::atomic<std::int64_t> expired{0};
  const auto old = [&](const char* row) { return load_relaxed<std::uint32_t>(row + layout_.time) < time; };
  parallel_for(arena_.words(), 64, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint32_t> freed;
    arena_.each_live(begin, end, [&](std::uint32_t r) {
      // Checked again under the row's lock: the row may have been used, or given to another key, since the scan.
      if (old(arena_.row(r))) remove(*index, arena_.key(r), freed, old);
    });
    expired += static_cast<std::int64_t>(freed.size());
    arena_.give(freed);
  });
  return expired;
}

void Table::clear() {
  const std::unique_lock alone(structure_);
  auto index = std::make_shared<Index>(this->index()->buckets());
  std::vector<std::uint32_t> freed;
  arena_.each_live(0, arena_.words(), [&](std::uint32_t r) {
    release(r, always);
    freed.push_back(r);
  });
  {
    const std::lock_guard lock(index_mutex_);
    index_ = std::move(index);
  }
  size_.fetch_sub(static_cast<std::int64_t>(freed.size()), std::memory_order_relaxed);
  reserved_.fetch_sub(static_cast<std::int64_t>(freed.size()), std::memory_order_relaxed);
  arena_.give(freed);
  // Noted as one entry for all keys: a replica has to start again from a snapshot.
  forget_erased(generation());
}

}  // namespace hotloop::table
