// SPDX-License-Identifier: Apache-2.0
// The error memory above its scan: which thread takes which queries and slots, the k best of each query from the
// candidates of all threads, and the readout from them; and the sketch, whose buckets are read and written here.
//
// Queries go through the slots in passes of 32 MB of candidates. Few queries: the slots are divided among threads and
// their candidates joined; many queries: the queries are divided. The result does not depend on the division, since
// candidates are compared by (similarity, slot). See error_memory.hpp.
#include "table/error_memory/error_memory.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "core/parallel.hpp"

namespace hotloop::table {

namespace {

// Multiply-adds worth a thread: about 10 us at 100 per nanosecond.
constexpr std::int64_t kGrainProducts = std::int64_t{1} << 20;
// Candidates of the queries that go through the slots together. Each further pass packs all slots again.
constexpr std::int64_t kPassBytes = 32 * 1024 * 1024;
constexpr std::int64_t kGrainBlocks = 8;

template <class R>
class Scratch {  // 64-byte aligned, not initialised
 public:
  explicit Scratch(std::int64_t count)
      : data_(static_cast<R*>(::operator new(static_cast<std::size_t>(count) * sizeof(R) + 64, std::align_val_t{64}))) {
  }
  R* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(R* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<R, Free> data_;
};

template <class Key>
bool before(const Key& a, const Key& b) {
  return a > b;
}

// Moves the k largest to the front, the k-th of them to place k - 1. Partitions without a branch on the comparison,
// which random candidates mispredict half of the time (docs/perf-notes.md).
template <class Key>
void select(Key* items, std::int64_t count, std::int64_t k) {
  while (count > 8) {
    const std::int64_t half = count / 2;
    if (items[0] > items[half]) std::swap(items[0], items[half]);
    if (items[count - 1] > items[half]) std::swap(items[count - 1], items[half]);
    if (items[0] > items[count - 1]) std::swap(items[0], items[count - 1]);
    // The median of three is now first; what is larger goes before it.
    const Key pivot = items[0];
    std::int64_t larger = 1;
    for (std::int64_t i = 1; i < count; ++i) {
      const Key x = items[i];
      items[i] = items[larger];
      items[larger] = x;
      larger += x > pivot ? 1 : 0;
    }
    std::swap(items[0], items[larger - 1]);
    if (k == larger) return;
    if (k < larger) {
      count = larger - 1;
    } else {
      items += larger;
      count -= larger;
      k -= larger;
    }
  }
  std::sort(items, items + count, before<Key>);
}

template <class R>
void keep_best(Candidates<R>& found) {
  if (found.count < found.k || found.k == 0) return;
  select(found.items, found.count, found.k);
  found.count = found.k;
  found.least = Candidate<R>::similarity(found.items[found.k - 1]);
}

// (groups, dim, kGroup) of unit vectors.
template <class R>
void pack_queries(const View& query, std::int64_t first, std::int64_t count, R* out) {
  const std::int64_t dim = query.shape[1];
  for (std::int64_t q = 0; q < (count + kGroup - 1) / kGroup * kGroup; ++q) {
    R* to = out + q / kGroup * kGroup * dim + q % kGroup;
    R inverse = R(0);
    const R* x = nullptr;
    if (q < count) {
      x = static_cast<const R*>(query.data) + (first + q) * query.stride[0];
      double sum = 0.0;
      for (std::int64_t j = 0; j < dim; ++j) sum += static_cast<double>(x[j]) * static_cast<double>(x[j]);
      const double norm = std::sqrt(sum);
      const bool nothing = norm < static_cast<double>(std::numeric_limits<float>::min());
      inverse = nothing ? R(0) : static_cast<R>(1.0 / norm);
      if (!std::isfinite(sum)) inverse = std::numeric_limits<R>::quiet_NaN();
    }
    for (std::int64_t j = 0; j < dim; ++j) to[j * kGroup] = x == nullptr ? R(0) : x[j] * inverse;
  }
}

template <class R>
class Pass {
 public:
  using Key = typename Candidate<R>::Key;

  Pass(const MemoryCall& call, std::int64_t first, std::int64_t count)
      : call_(call),
        first_(first),
        count_(count),
        slots_(call.keys.shape[0]),
        dim_(call.keys.shape[1]),
        groups_((count + kGroup - 1) / kGroup),
        queries_(groups_ * kGroup * dim_) {
    pack_queries(call.query, first, count, queries_.get());
  }

  void run() {
    const std::int64_t products = slots_ * std::max<std::int64_t>(dim_, 1);
    const std::int64_t wanted = std::min<std::int64_t>(max_threads(), 1 + count_ * products / kGrainProducts);
    if (groups_ >= wanted) {
      reserve(1);
      parallel_for(groups_, 1 + kGrainProducts / (kGroup * products + 1), [&](std::int64_t begin, std::int64_t end) {
        scan(begin * kGroup, std::min(end * kGroup, count_), 0, slots_, sets_.data() + begin * kGroup);
      });
    } else {
      // Few queries: the threads share the slots, and each query has as many sets.
      reserve(wanted);
      const std::int64_t block = block_slots<R>(dim_), blocks = (slots_ + block - 1) / block;
      std::atomic<std::int64_t> part{0};
      const std::int64_t grain = (blocks + wanted - 1) / wanted;
      parallel_for(blocks, std::max(grain, kGrainBlocks), [&](std::int64_t begin, std::int64_t end) {
        const std::int64_t mine = part.fetch_add(1);
        scan(0, count_, begin * block, std::min(end * block, slots_), sets_.data() + mine * count_);
      });
    }
    const std::int64_t grain = 1 + 4096 / (call_.k * parts_ + 1);
    parallel_for(count_, grain, [&](std::int64_t begin, std::int64_t end) {
      std::vector<Key> all;
      for (std::int64_t q = begin; q < end; ++q) finish(q, all);
    });
  }

 private:
  void reserve(std::int64_t parts) {
    parts_ = parts;
    // Half of it is thrown away at a time; 64, so that k = 1 does not select at every step.
    const std::int64_t capacity = call_.k + kWalk + std::max<std::int64_t>(call_.k, 64);
    items_ = std::make_unique<Scratch<Key>>(parts * count_ * capacity);
    sets_.resize(static_cast<std::size_t>(parts * count_));
    Key* next = items_->get();
    for (Candidates<R>& set : sets_) {
      set.items = next;
      set.capacity = capacity;
      set.k = call_.k;
      next += capacity;
    }
  }

  void scan(std::int64_t from, std::int64_t to, std::int64_t begin, std::int64_t end, Candidates<R>* found) const {
    const Scratch<R> panels(block_slots<R>(dim_) * dim_), tile(kGroup * kMostTileSlots);
    scan_slots(ScanCall<R>{queries_.get() + from * dim_, to - from, call_.keys, call_.first, begin, end, found,
                           panels.get(), tile.get()});
  }

  void finish(std::int64_t q, std::vector<Key>& all) const {
    all.clear();
    for (std::int64_t part = 0; part < parts_; ++part) {
      const Candidates<R>& set = sets_[static_cast<std::size_t>(part * count_ + q)];
      all.insert(all.end(), set.items, set.items + set.count);
    }
    Candidates<R> best;
    best.items = all.data();
    best.count = static_cast<std::int64_t>(all.size());
    best.k = call_.k;
    keep_best(best);
    // Sorted, so that the sums do not depend on the order of arrival, hence not on the number of threads.
    std::sort(best.items, best.items + best.count, before<Key>);
    read(first_ + q, best);
  }

  void read(std::int64_t row, const Candidates<R>& best) const {
    const R* labels = static_cast<const R*>(call_.labels);
    const R* stored = static_cast<const R*>(call_.base_predictions);
    const double base = static_cast<double>(static_cast<const R*>(call_.base_prediction)[row]);
    R* weights = call_.weights == nullptr ? nullptr : static_cast<R*>(call_.weights) + row * call_.k;
    std::int64_t* neighbors = call_.neighbors == nullptr ? nullptr : call_.neighbors + row * call_.k;
    const double top = best.count > 0 ? static_cast<double>(Candidate<R>::similarity(best.items[0])) : 0.0;
    double sum = 0.0, label = 0.0, stored_base = 0.0;
    for (std::int64_t i = 0; i < best.count; ++i) {
      const double below = static_cast<double>(Candidate<R>::similarity(best.items[i])) - top;
      const double weight = std::exp(below / call_.readout.temperature);
      std::int64_t slot = call_.first + Candidate<R>::index(best.items[i]);
      slot = slot < slots_ ? slot : slot - slots_;
      sum += weight;
      label += weight * static_cast<double>(labels[slot]);
      stored_base += weight * static_cast<double>(stored[slot]);
      if (weights != nullptr) weights[i] = static_cast<R>(weight);
      if (neighbors != nullptr) neighbors[i] = slot;
    }
    for (std::int64_t i = 0; i < call_.k; ++i) {
      if (i < best.count) {
        if (weights != nullptr) weights[i] = static_cast<R>(static_cast<double>(weights[i]) / sum);
      } else {
        if (weights != nullptr) weights[i] = R(0);
        if (neighbors != nullptr) neighbors[i] = -1;
      }
    }
    R& out = static_cast<R*>(call_.prediction)[row];
    if (best.count == 0) {
      out = static_cast<R>(compensated({1.0, 0.0, 0.0}, base, 0.0, 0.0));
    } else {
      out = static_cast<R>(compensated(call_.readout, base, label / sum, stored_base / sum));
    }
  }

  const MemoryCall& call_;
  std::int64_t first_, count_, slots_, dim_, groups_;
  Scratch<R> queries_;
  std::int64_t parts_ = 1;
  std::unique_ptr<Scratch<Key>> items_;
  std::vector<Candidates<R>> sets_;
};

template <class R>
void run(const MemoryCall& call) {
  const std::int64_t bytes = static_cast<std::int64_t>(sizeof(typename Candidate<R>::Key)) * (2 * call.k + 80);
  const std::int64_t most = std::max<std::int64_t>(kPassBytes / bytes / kGroup * kGroup, kGroup);
  for (std::int64_t first = 0; first < call.query.shape[0]; first += most) {
    Pass<R>(call, first, std::min(most, call.query.shape[0] - first)).run();
  }
}

}  // namespace

void compact(Candidates<float>& found) { keep_best(found); }
void compact(Candidates<double>& found) { keep_best(found); }

void error_memory(const MemoryCall& call) {
  if (call.keys.dtype == Dtype::kFloat64) return run<double>(call);
  if (call.keys.shape[0] > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("[error_memory] keys: expected fewer than 2^31 slots.");
  }
  run<float>(call);
}

void lsh_buckets(const BucketCall& call) {
  const std::int64_t columns = call.repeats * call.bits;
  if (call.rows == 0 || call.repeats == 0) return;
  const Scratch<float> panels((columns + kPanelAlign) / kPanelAlign * kPanelAlign * call.dim);
  pack_projections(call, panels.get());
  const std::int64_t groups = (call.rows + kGroup - 1) / kGroup;
  const std::int64_t grain = 1 + kGrainProducts / (kGroup * columns * call.dim + 1);
  parallel_for(groups, grain, [&](std::int64_t begin, std::int64_t end) {
    const Scratch<float> group(call.dim * kGroup), tile(kGroup * kMostTileSlots);
    bucket_rows(call, {begin, end, panels.get(), group.get(), tile.get()});
  });
}

namespace {
constexpr std::int64_t kFields = 3;
constexpr std::int64_t kAhead = 16;  // records asked for before they are needed
}  // namespace

void sketch_write(const SketchCall& call, const double* labels, const double* base_predictions) {
  std::vector<std::int64_t> units(static_cast<std::size_t>(2 * call.rows));
  for (std::int64_t b = 0; b < call.rows; ++b) {
    units[static_cast<std::size_t>(2 * b)] = std::llrint(labels[b] / kSketchUnit);
    units[static_cast<std::size_t>(2 * b + 1)] = std::llrint(base_predictions[b] / kSketchUnit);
  }
  // A thread owns whole repeats: no two write to one record, and a repeat's table stays in L2.
  parallel_for(call.repeats, 1 + 8192 / (call.rows + 1), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      std::int64_t* table = call.sketch + r * call.size * kFields;
      for (std::int64_t b = 0; b < call.rows; ++b) {
        const auto at = [&](std::int64_t i) { return table + kFields * call.buckets[i * call.repeats + r]; };
        if (b + kAhead < call.rows) __builtin_prefetch(at(b + kAhead), 1);
        std::int64_t* record = at(b);
        record[0] += 1;
        record[1] += units[static_cast<std::size_t>(2 * b)];
        record[2] += units[static_cast<std::size_t>(2 * b + 1)];
      }
    }
  });
}

void sketch_read(const SketchReadCall& call) {
  parallel_for(call.rows, 1 + 2048 / (call.repeats + 1), [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> weights(static_cast<std::size_t>(call.repeats));
    for (std::int64_t b = begin; b < end; ++b) {
      const std::int32_t* buckets = call.buckets + b * call.repeats;
      const auto record = [&](std::int64_t r) { return call.sketch + (r * call.size + buckets[r]) * kFields; };
      std::int64_t most = 0;
      for (std::int64_t r = 0; r < call.repeats; ++r) {
        if (r + kAhead < call.repeats) __builtin_prefetch(record(r + kAhead));
        most = std::max(most, *record(r));
      }
      double sum = 0.0, label = 0.0, stored_base = 0.0;
      for (std::int64_t r = 0; r < call.repeats; ++r) {
        const std::int64_t* x = record(r);
        const double below = static_cast<double>(x[0] - most) * call.share;
        const double weight = x[0] > 0 ? std::exp(below / call.readout.temperature) : 0.0;
        weights[static_cast<std::size_t>(r)] = weight;
        if (weight == 0.0) continue;
        sum += weight;
        label += weight * (static_cast<double>(x[1]) / static_cast<double>(x[0]));
        stored_base += weight * (static_cast<double>(x[2]) / static_cast<double>(x[0]));
      }
      const double base = call.base_prediction[b];
      const bool empty = !(sum > 0.0);
      call.prediction[b] =
          empty ? compensated({1.0, 0.0, 0.0}, base, 0.0, 0.0)
                : compensated(call.readout, base, label / sum * kSketchUnit, stored_base / sum * kSketchUnit);
      if (call.weights == nullptr) continue;
      for (std::int64_t r = 0; r < call.repeats; ++r) {
        call.weights[b * call.repeats + r] = empty ? 0.0 : weights[static_cast<std::size_t>(r)] / sum;
      }
    }
  });
}

}  // namespace hotloop::table
