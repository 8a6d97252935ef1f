// SPDX-License-Identifier: Apache-2.0
// Pooling: rows of the keys of a bag are looked up, converted to float32 and added while they are in the cache.
//
// `visit_rows` runs the lookup pipeline of the table over all positions of a thread's bags. `Sums` collects the rows of
// one bag, twelve at a time, adds them under their sequence locks, and adds them again one by one if a row was written
// meanwhile. `pool_or_insert` first pools the rows that exist, then inserts the unknown keys and pools their bags once
// more: most batches hold known keys only.
#include "table/store/pool.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <vector>

#include "core/parallel.hpp"
#include "table/store/floats.hpp"

namespace hotloop::table {

namespace {

constexpr std::int64_t kGrain = 256;  // positions worth a thread: about 20 us

using AddRows = decltype(&simd_baseline::table_add_rows);
using MaxRow = decltype(&simd_baseline::table_max_row);
using DotRow = decltype(&simd_baseline::table_dot_row);
AddRows add_rows(){HOTLOOP_SIMD_DISPATCH(table_add_rows)} MaxRow max_row(){HOTLOOP_SIMD_DISPATCH(table_max_row)} DotRow
    dot_row() {
  HOTLOOP_SIMD_DISPATCH(table_dot_row)
}

// Calls use(values of the row) until it ran on a row that was not written meanwhile; false if the row is not the key's.
template <class Use>
bool use_row(const Table& table, std::uint64_t key, std::uint32_t row, std::vector<char>& copy, Use&& use) {
  const char* const p = table.arena().row(row);
  const RowLayout& layout = table.layout();
  for (;;) {
    const std::uint32_t v = table.locks().begin_read(row);
    if (!table.arena().holds(p, row, key)) return false;
    if constexpr (kWordByWord) {
      copy.resize(static_cast<std::size_t>(layout.value_bytes()));
      copy_out(copy.data(), p + layout.values, copy.size());
      use(copy.data());
    } else {
      use(p + layout.values);
    }
    if (table.locks().end_read(row, v)) return true;
  }
}

// What comes of one bag. Rows are noted as they are found and added a dozen at a time, from one buffer into the other;
// if one of them was written meanwhile, all are added again from what was before, one by one. A bag that is one key
// goes straight from the row to its place.
class Sums {
 public:
  Sums(const Table& table, const Bags& bags, const Pooled& pooled)
      : table_(table),
        bags_(bags),
        pooled_(pooled),
        dim_(table.layout().dim),
        one_by_one_(kWordByWord || bags.pool == Pool::kMax),
        direct_(bags.offsets == nullptr && bags.pool != Pool::kMax && bags.weights == nullptr &&
                pooled.dtype == table.settings().dtype),
        add_(add_rows()),
        max_(max_row()) {
    for (int i = 0; i < 2 && !direct_; ++i) {
      sum_[i].resize(static_cast<std::size_t>(dim_));
      if (bags.pool == Pool::kMax) from_[i].resize(static_cast<std::size_t>(dim_));
    }
  }

  void start(std::int64_t bag) {
    bag_ = bag;
    size_ = 0;
    if (direct_) return;
    started_ = false;
    if (bags_.pool == Pool::kMax) std::fill(from_[now_].begin(), from_[now_].end(), std::int64_t{-1});
  }
  // The row it was found in, or kNoRow.
  std::uint32_t add(std::int64_t at, std::uint64_t key, std::uint32_t row) {
    if (direct_) {
      while (row != kNoRow && !table_.read(key, row, pooled_.out.row(bag_))) row = table_.look_again(key);
      size_ = row != kNoRow;
      return row;
    }
    if (one_by_one_) return add_one(at, key, row);
    for (; row != kNoRow; row = table_.look_again(key)) {
      const char* const p = table_.arena().row(row);
      const std::uint32_t sequence = table_.locks().begin_read(row);
      if (!table_.arena().holds(p, row, key)) continue;
      const float weight = bags_.weights != nullptr ? bags_.weights[at] : 1.0f;
      rows_[noted_] = {p + table_.layout().values, weight * bags_.scale};
      notes_[noted_] = {key, at, row, sequence};
      ++size_;
      if (++noted_ == kNotes) flush();
      break;
    }
    return row;
  }
  void finish() {
    if (!direct_) flush();
    if (pooled_.sizes != nullptr) pooled_.sizes[bag_] = size_;
    char* const out = pooled_.out.row(bag_);
    if (size_ == 0) {
      std::memset(out, 0, static_cast<std::size_t>(dim_ * item_size(pooled_.dtype)));
    } else if (!direct_) {
      float* const sum = sum_[now_].data();
      if (bags_.pool == Pool::kMean && size_ > 1) {
        const float n = static_cast<float>(size_);
        for (std::int64_t j = 0; j < dim_; ++j) sum[j] /= n;
      }
      store_floats(pooled_.dtype, sum, out, dim_);
    }
    if (pooled_.largest != nullptr) std::copy_n(from_[now_].data(), dim_, pooled_.largest + bag_ * dim_);
  }

 private:
  const float* so_far() {
    if (!started_) std::fill(sum_[now_].begin(), sum_[now_].end(), 0.0f);
    started_ = true;
    return sum_[now_].data();
  }
  void flush() {
    if (noted_ == 0) return;
    add_(table_.settings().dtype, rows_, noted_, dim_, started_ ? sum_[now_].data() : nullptr, sum_[1 - now_].data());
    bool unchanged = true;
    for (int i = 0; i < noted_; ++i) unchanged &= table_.locks().end_read(notes_[i].row, notes_[i].sequence);
    if (unchanged) {
      now_ = 1 - now_;
      started_ = true;
    } else {
      size_ -= noted_;
      for (int i = 0; i < noted_; ++i) add_one(notes_[i].at, notes_[i].key, notes_[i].row);
    }
    noted_ = 0;
  }
  std::uint32_t add_one(std::int64_t at, std::uint64_t key, std::uint32_t row) {
    const int next = 1 - now_;
    const Dtype dtype = table_.settings().dtype;
    for (; row != kNoRow; row = table_.look_again(key)) {
      const bool used = use_row(table_, key, row, copy_, [&](const void* p) {
        if (bags_.pool == Pool::kMax) {
          max_(dtype, p, bags_.scale, at, so_far(), from_[now_].data(), dim_, sum_[next].data(), from_[next].data());
        } else {
          const float weight = bags_.weights != nullptr ? bags_.weights[at] : 1.0f;
          const WeightedRow one{p, weight * bags_.scale};
          add_(dtype, &one, 1, dim_, so_far(), sum_[next].data());
        }
      });
      if (!used) continue;
      now_ = next;
      ++size_;
      break;
    }
    return row;
  }

  static constexpr int kNotes = 12;
  struct Note {
    std::uint64_t key;
    std::int64_t at;
    std::uint32_t row, sequence;
  };
  const Table& table_;
  const Bags& bags_;
  const Pooled& pooled_;
  std::int64_t dim_;
  bool one_by_one_, direct_, started_ = false;
  AddRows add_;
  MaxRow max_;
  int now_ = 0, noted_ = 0;
  std::int64_t bag_ = 0, size_ = 0;
  WeightedRow rows_[kNotes];
  Note notes_[kNotes];
  std::vector<float> sum_[2];
  std::vector<std::int64_t> from_[2];
  std::vector<char> copy_;
};

Bags each_alone(Keys keys, const Found& out) { return {.keys = keys, .count = keys.count, .scale = out.scale}; }

// Calls body(first bag, last bag + 1) on threads with about as many positions each.
template <class Body>
void divide_bags(const Bags& bags, Body&& body) {
  const std::int64_t n = bags.count > 0 ? bags.end(bags.count - 1) - bags.begin(0) + bags.count : 0;
  const std::int64_t threads = std::clamp<std::int64_t>(n / kGrain, 1, max_threads());
  const auto bag_at = [&](std::int64_t share) {
    if (share >= threads || bags.offsets == nullptr)
      return share >= threads ? bags.count : bags.count * share / threads;
    const std::int64_t position = bags.begin(0) + (bags.end(bags.count - 1) - bags.begin(0)) * share / threads;
    return static_cast<std::int64_t>(std::lower_bound(bags.offsets, bags.offsets + bags.count, position) -
                                     bags.offsets);
  };
  if (bags.count == 0) return;
  parallel_for(threads, 1, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t first = begin == 0 ? 0 : bag_at(begin), last = bag_at(end);
    if (first < last) body(first, last);
  });
}

// Calls visit(position, key, row) in order for the positions of bags [first, last); row may be kNoRow.
template <class Visit>
void visit_rows(const Table& table, const Bags& bags, std::int64_t first, std::int64_t last, Visit&& visit) {
  const std::int64_t begin = bags.begin(first), end = bags.end(last - 1);
  const RowLayout& layout = table.layout();
  const std::int64_t bytes = layout.values + layout.value_bytes();
  const std::uint32_t* const rows = bags.rows;
  if (rows == nullptr) {
    table.look_up(
        *table.index(), end - begin, bytes, [&](std::int64_t i) { return std::pair(begin + i, bags.keys[begin + i]); },
        [&](std::int64_t at, std::uint64_t key, std::uint64_t, std::uint32_t row) { visit(at, key, row); });
    return;
  }
  constexpr std::int64_t kAhead = 16;
  for (std::int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end && rows[i + kAhead] != kNoRow) prefetch_row(table.arena().row(rows[i + kAhead]), bytes);
    visit(i, bags.keys[i], rows[i]);
  }
}

// Calls visited(position, key, row) for the positions of all bags, in order within a bag; row: kNoRow if it is nowhere.
template <class Visited>
void pool_and_visit(const Table& table, const Bags& bags, const Pooled& pooled, Visited&& visited) {
  divide_bags(bags, [&](std::int64_t first, std::int64_t last) {
    Sums sums(table, bags, pooled);
    std::int64_t bag = first;
    sums.start(bag);
    const auto next_bag = [&] {
      sums.finish();
      if (++bag < last) sums.start(bag);
    };
    visit_rows(table, bags, first, last, [&](std::int64_t at, std::uint64_t key, std::uint32_t row) {
      while (at >= bags.end(bag)) next_bag();
      visited(at, key, row != kNoRow ? sums.add(at, key, row) : row);
    });
    while (bag < last) next_bag();
  });
}

}  // namespace

void pool_bags(const Table& table, const Bags& bags, const Pooled& pooled) {
  pool_and_visit(table, bags, pooled, [](std::int64_t, std::uint64_t, std::uint32_t) {});
}

// Most batches of most tables hold known keys, so the rows are pooled as they are found. The keys that were not are
// entered then, and their bags pooled once more.
void pool_or_insert(Table& table, const Bags& bags, const Upsert& given, const Pooled& pooled) {
  Upsert call = given;
  if (call.stamp.tick == 0) call.stamp.tick = table.next_tick();
  // Where the batch may yet be refused, uses are noted when it was not.
  const Settings& settings = table.settings();
  const bool refuses = settings.strategy == Strategy::kNone && settings.max_rows < kMaxRows;
  const bool uses = table.keeps_uses() && !refuses;
  std::atomic<bool> some_missing{false};
  pool_and_visit(table, bags, pooled, [&](std::int64_t at, std::uint64_t key, std::uint32_t row) {
    call.rows[at] = row;
    if (call.found != nullptr) call.found[at] = row != kNoRow;
    if (row != kNoRow) {
      if (uses) table.use(key, row, call.stamp, at);
    } else if (!some_missing.load(std::memory_order_relaxed)) {
      some_missing.store(true, std::memory_order_relaxed);
    }
  });
  const auto note_uses = [&] {
    if (!table.keeps_uses() || !refuses) return;
    parallel_for(call.keys.count, kGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        if (call.rows[i] != kNoRow) table.use(call.keys[i], call.rows[i], call.stamp, i);
      }
    });
  };
  if (!some_missing) return note_uses();
  std::vector<std::int64_t> missing;
  for (std::int64_t i = 0; i < call.keys.count; ++i) {
    if (call.rows[i] == kNoRow) missing.push_back(i);
  }
  const std::size_t n = missing.size();
  std::vector<std::uint64_t> keys(n), scores(call.stamp.scores != nullptr ? n : 0);
  std::vector<std::uint32_t> rows(n);
  std::vector<std::uint8_t> found(n);
  for (std::size_t i = 0; i < n; ++i) {
    keys[i] = call.keys[missing[i]];
    if (!scores.empty()) scores[i] = call.stamp.scores[missing[i]];
  }
  Upsert some = call;
  some.keys = {keys.data(), static_cast<std::int64_t>(n)};
  some.rows = rows.data();
  some.found = found.data();
  if (!scores.empty()) some.stamp.scores = scores.data();
  bool evicts = false;
  some.evicts = &evicts;
  table.upsert(some);
  note_uses();
  std::vector<std::int64_t> changed;  // positions
  for (std::size_t i = 0; i < n; ++i) {
    call.rows[missing[i]] = rows[i];
    if (call.found != nullptr) call.found[missing[i]] = found[i];
    if (rows[i] != kNoRow) changed.push_back(missing[i]);
  }
  if (evicts) {  // pools the rows after the batch: a known key may have been evicted for an unknown one
    std::vector<std::uint32_t> now(static_cast<std::size_t>(call.keys.count));
    table.locate(call.keys, now.data());
    for (std::int64_t i = 0; i < call.keys.count; ++i) {
      if (call.rows[i] != now[static_cast<std::size_t>(i)]) changed.push_back(i);
      call.rows[i] = now[static_cast<std::size_t>(i)];
    }
    std::sort(changed.begin(), changed.end());
  }
  std::vector<std::int64_t> again;  // bags
  std::int64_t bag = 0;
  for (const std::int64_t at : changed) {
    if (bags.offsets == nullptr)
      bag = at;
    else
      bag = std::upper_bound(bags.offsets + bag, bags.offsets + bags.count, at) - bags.offsets - 1;
    if (again.empty() || again.back() != bag) again.push_back(bag);
  }
  parallel_for(static_cast<std::int64_t>(again.size()), kGrain / 8, [&](std::int64_t begin, std::int64_t end) {
    Sums sums(table, bags, pooled);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t b = again[static_cast<std::size_t>(i)];
      sums.start(b);
      for (std::int64_t at = bags.begin(b); at < bags.end(b); ++at) {
        if (call.rows[at] != kNoRow) sums.add(at, call.keys[at], call.rows[at]);
      }
      sums.finish();
    }
  });
}

// Rows given out in the table's type go straight from the row to their place: `find` of the table. Others are bags of
// one key, which convert while they pool.
void find(const Table& table, Keys keys, const Found& out, std::uint8_t* found) {
  if (out.dtype == table.settings().dtype) return table.find(keys, out.values, found, nullptr);
  std::vector<std::int64_t> sizes(static_cast<std::size_t>(keys.count));
  pool_bags(table, each_alone(keys, out), {out.values, out.dtype, sizes.data(), nullptr});
  for (std::int64_t i = 0; i < keys.count; ++i) found[i] = sizes[static_cast<std::size_t>(i)] != 0;
}

void find_or_insert(Table& table, const Upsert& given, const Found& out) {
  Upsert call = given;
  std::vector<std::uint32_t> rows(static_cast<std::size_t>(call.keys.count));
  call.rows = rows.data();
  pool_or_insert(table, each_alone(call.keys, out), call, {out.values, out.dtype, nullptr, nullptr});
}

void weight_gradient(const Bags& bags, const Values& kept, Dtype dtype, std::int64_t dim, const float* grad,
                     std::int64_t grad_stride, float* grad_weights) {
  divide_bags(bags, [&](std::int64_t first, std::int64_t last) {
    const DotRow dot = dot_row();
    for (std::int64_t bag = first; bag < last; ++bag) {
      for (std::int64_t at = bags.begin(bag); at < bags.end(bag); ++at) {
        grad_weights[at] = dot(dtype, kept.row(at), grad + bag * grad_stride, dim);
      }
    }
  });
}

namespace {

std::uint32_t largest_bits(const float* x, std::int64_t n) { HOTLOOP_SIMD_DISPATCH(table_largest(x, n)) }

}  // namespace

float largest(const float* x, std::int64_t n) { return std::bit_cast<float>(largest_bits(x, n)); }

}  // namespace hotloop::table
