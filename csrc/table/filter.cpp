// SPDX-License-Identifier: Apache-2.0
// The counting filter: probes, the ring of splits that forgets, batches over threads, marks and deltas of its cells.
//
// A batch prefetches the cells of sixteen keys ahead. A key has its cell in the newest split; if it has none there, it
// takes the first free cell of its probe, with the count that the newest older split has for it. When the newest split
// holds its share of keys, the ring advances: the next split, which is empty, becomes the newest, and the oldest is
// cleared. `Trial` notes the cells and splits that change, so that the sightings of a refused batch can be taken back;
// `mark` numbers the lines that change, for deltas.
#include "table/filter.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "core/memory.hpp"
#include "core/parallel.hpp"

namespace hotloop::table {

namespace {

// Keys whose cells are on their way while others are worked on: 16 cover a memory access of 100 ns at the 7 ns that a
// key takes once its cells are there. With 8 and 16 a key of 50e6 takes 45 ns (AMD EPYC, one thread).
constexpr std::int64_t kAhead = 16;

std::uint16_t signature(std::uint64_t hash) { return static_cast<std::uint16_t>(hash & 0xFFF); }

std::uint32_t clipped(const std::int64_t* counts, std::int64_t i) {
  if (counts == nullptr) return 1;
  return static_cast<std::uint32_t>(std::clamp<std::int64_t>(counts[i], 0, UINT32_MAX));
}

}  // namespace

CountFilter::Extent CountFilter::extent(std::int64_t capacity, int splits) {
  Extent e{};
  e.steps = splits == 1 ? kMaxSteps : kMaxSteps / 2;
  // One split of the ring is kept empty to move into; a single one has half as many cells again as keys.
  e.capacity_split = splits == 1 ? capacity : (capacity + splits - 2) / (splits - 1);
  e.total = splits == 1 ? e.capacity_split + e.capacity_split / 2 : e.capacity_split + e.capacity_split / 5;
  e.positions = (e.total + e.steps + kLine - 1) / kLine * kLine;  // a probe that starts at the end has somewhere to go
  return e;
}

std::int64_t CountFilter::cells_for(std::int64_t capacity, int splits) { return extent(capacity, splits).positions; }

CountFilter::CountFilter(std::int64_t capacity, int splits) : capacity_(capacity), splits_(splits) {
  const Extent e = extent(capacity, splits);
  capacity_split_ = e.capacity_split;
  total_ = e.total;
  positions_ = e.positions;
  steps_ = e.steps;
  elements_.assign(static_cast<std::size_t>(splits), 0);
  const auto size = static_cast<std::size_t>(bytes());
  void* memory = std::aligned_alloc(64, size);
  if (memory == nullptr) throw std::bad_alloc();
  cells_.reset(static_cast<std::uint16_t*>(memory));
  advise_huge_pages(memory, size);
  std::memset(memory, 0, size);
}

std::uint16_t* CountFilter::find(int split, std::uint64_t hash) const {
  const auto start = static_cast<std::int64_t>(bucket_of(hash, static_cast<std::uint64_t>(total_)));
  std::uint16_t* cells = line(start / kLine, split);
  std::int64_t at = start % kLine;
  const std::uint16_t wanted = signature(hash);
  for (int step = 0; step < steps_; ++step) {
    if (cells[at] == 0 || (cells[at] >> kCountBits) == wanted) return cells + at;
    if (++at == kLine) {
      at = 0;
      cells += std::int64_t{kLine} * splits_;
    }
  }
  return nullptr;
}

// The newest of the splits behind the head that knows the key.
std::uint16_t* CountFilter::find_older(std::uint64_t hash) const {
  const std::int64_t depth = std::min<std::int64_t>(advances_, splits_ - 2);
  int split = head_;
  for (std::int64_t i = 0; i < depth; ++i) {
    split = before(split);
    std::uint16_t* cell = find(split, hash);
    if (cell != nullptr && *cell != 0) return cell;
  }
  return nullptr;
}

void CountFilter::write(std::uint16_t* cell, int split, std::uint64_t hash, std::uint32_t count) {
  if (trial_ != nullptr) trial_->cells_.push_back({cell, *cell});
  if (*cell == 0) ++elements_[static_cast<std::size_t>(split)];
  *cell =
      static_cast<std::uint16_t>((static_cast<unsigned>(signature(hash)) << kCountBits) | std::min(count, kMaxCount));
  stamp(cell);
}

std::uint32_t CountFilter::add(std::uint64_t key, std::uint32_t count) {
  if (count == 0) return this->count(key);
  count = std::min(count, kMaxCount);
  const std::uint64_t hash = mix64(key);
  int split = head_;
  std::uint16_t* cell = find(split, hash);
  if (cell == nullptr && splits_ > 1) {
    split = after(head_);
    cell = find(split, hash);
  }
  if (cell == nullptr) {
    ++failures_;
    return kMaxCount;
  }
  std::uint32_t old = *cell & kMaxCount;
  if (*cell == 0 && splits_ > 1) {
    if (const std::uint16_t* older = find_older(hash)) old = *older & kMaxCount;
  }
  write(cell, split, hash, old + count);
  if (splits_ > 1 && elements_[static_cast<std::size_t>(head_)] >= capacity_split_ - 1) {
    head_ = after(head_);
    ++advances_;
    clear_split(after(head_));
  }
  return old;
}

std::uint32_t CountFilter::count(std::uint64_t key) const {
  const std::uint64_t hash = mix64(key);
  const std::uint16_t* cell = find(head_, hash);
  if (cell == nullptr && splits_ > 1) cell = find(after(head_), hash);
  if (cell == nullptr) return kMaxCount;
  if (*cell == 0 && splits_ > 1) cell = find_older(hash);
  return cell == nullptr ? 0 : *cell & kMaxCount;
}

void CountFilter::prefetch(std::uint64_t key) const {
  const auto start = static_cast<std::int64_t>(bucket_of(mix64(key), static_cast<std::uint64_t>(total_)));
  const std::int64_t number = start / kLine;
  __builtin_prefetch(line(number, head_), 1);
  const std::int64_t depth = std::min<std::int64_t>(advances_, splits_ - 2);
  for (std::int64_t i = 0, split = head_; i < depth; ++i) {
    split = split == 0 ? splits_ - 1 : split - 1;
    __builtin_prefetch(line(number, static_cast<int>(split)));
  }
}

void CountFilter::add(std::int64_t n, const std::int64_t* keys, const std::int64_t* counts, std::int64_t* old) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (std::int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) prefetch(static_cast<std::uint64_t>(keys[i + kAhead]));
    old[i] = add(static_cast<std::uint64_t>(keys[i]), clipped(counts, i));
  }
}

void CountFilter::count(std::int64_t n, const std::int64_t* keys, std::int64_t* counts) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (std::int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) prefetch(static_cast<std::uint64_t>(keys[i + kAhead]));
    counts[i] = count(static_cast<std::uint64_t>(keys[i]));
  }
}

void CountFilter::admits(std::int64_t n, const std::int64_t* keys, const std::int64_t* counts, std::uint32_t threshold,
                         std::uint8_t* admitted) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (std::int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) prefetch(static_cast<std::uint64_t>(keys[i + kAhead]));
    admitted[i] = admits(static_cast<std::uint64_t>(keys[i]), clipped(counts, i), threshold) ? 1 : 0;
  }
}

void CountFilter::clear_split(int split) {
  if (trial_ != nullptr) {
    std::vector<std::uint16_t> before(static_cast<std::size_t>(positions_));
    copy_split(split, before.data());
    trial_->splits_.push_back({trial_->cells_.size(), split, std::move(before)});
  }
  for (std::int64_t number = 0; number < positions_ / kLine; ++number) {
    std::memset(line(number, split), 0, kLine * sizeof(std::uint16_t));
    stamp(line(number, split));
  }
  elements_[static_cast<std::size_t>(split)] = 0;
}

void CountFilter::copy_split(int split, std::uint16_t* out) const {
  for (std::int64_t number = 0; number < positions_ / kLine; ++number, out += kLine) {
    std::memcpy(out, line(number, split), kLine * sizeof(std::uint16_t));
  }
}

void CountFilter::put_split(int split, const std::uint16_t* cells) {
  for (std::int64_t number = 0; number < positions_ / kLine; ++number, cells += kLine) {
    std::memcpy(line(number, split), cells, kLine * sizeof(std::uint16_t));
    stamp(line(number, split));
  }
}

CountFilter::Trial::Trial(CountFilter& filter)
    : filter_(filter),
      head_(filter.head_),
      advances_(filter.advances_),
      failures_(filter.failures_),
      elements_(filter.elements_) {
  filter.trial_ = this;
}

CountFilter::Trial::~Trial() {
  filter_.trial_ = nullptr;
  if (kept_) return;
  for (std::size_t left = cells_.size();; --left) {  // newest change first
    for (; !splits_.empty() && splits_.back().writes == left; splits_.pop_back()) {
      filter_.put_split(splits_.back().split, splits_.back().before.data());
    }
    if (left == 0) break;
    *cells_[left - 1].at = cells_[left - 1].before;
  }
  filter_.head_ = head_;
  filter_.advances_ = advances_;
  filter_.failures_ = failures_;
  filter_.elements_ = std::move(elements_);
}

void CountFilter::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::memset(cells_.get(), 0, static_cast<std::size_t>(bytes()));
  std::fill(elements_.begin(), elements_.end(), 0);
  std::fill(stamps_.begin(), stamps_.end(), now_);
  head_ = 0;
  advances_ = failures_ = 0;
}

CountFilter::State CountFilter::save(std::uint16_t* cells) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (int split = 0; cells != nullptr && split < splits_; ++split, cells += positions_) copy_split(split, cells);
  return {head_, advances_, failures_, elements_};
}

void CountFilter::load(const State& state, const std::uint16_t* cells) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (int split = 0; split < splits_; ++split, cells += positions_) put_split(split, cells);
  head_ = static_cast<int>(state.head);
  advances_ = state.advances;
  failures_ = state.failures;
  elements_ = state.elements;
}

std::uint64_t CountFilter::mark() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (stamps_.empty()) stamps_.resize(static_cast<std::size_t>(positions_ / kLine * splits_));
  if (now_ == UINT32_MAX) {  // no numbers are left: from here on every line counts as changed
    std::fill(stamps_.begin(), stamps_.end(), now_);
    return now_ - 1;
  }
  return now_++;
}

bool CountFilter::has_changed_since(std::uint64_t mark) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::any_of(stamps_.begin(), stamps_.end(), [&](std::uint32_t stamp) { return stamp > mark; });
}

CountFilter::Lines CountFilter::changed_since(std::optional<std::uint64_t> mark) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Lines lines{{head_, advances_, failures_, elements_}, {}, {}};
  const std::int64_t each = positions_ / kLine;
  for (std::int64_t split = 0; split < splits_; ++split) {
    for (std::int64_t number = 0; number < each; ++number) {
      const std::uint16_t* const cells = line(number, static_cast<int>(split));
      const bool news = mark && !stamps_.empty()
                            ? stamps_[static_cast<std::size_t>(number * splits_ + split)] > *mark
                            : std::any_of(cells, cells + kLine, [](std::uint16_t cell) { return cell != 0; });
      if (!news) continue;
      lines.names.push_back(split * each + number);
      lines.cells.insert(lines.cells.end(), cells, cells + kLine);
    }
  }
  return lines;
}

void CountFilter::put(const State& state, const std::int64_t* names, const std::uint16_t* cells, std::int64_t n,
                      bool whole) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (whole) {
    std::memset(cells_.get(), 0, static_cast<std::size_t>(bytes()));
    std::fill(stamps_.begin(), stamps_.end(), now_);
  }
  const std::int64_t each = positions_ / kLine;
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint16_t* const to = line(names[i] % each, static_cast<int>(names[i] / each));
    std::memcpy(to, cells + i * kLine, kLine * sizeof(std::uint16_t));
    stamp(to);
  }
  head_ = static_cast<int>(state.head);
  advances_ = state.advances;
  failures_ = state.failures;
  elements_ = state.elements;
}

void probabilistic_admits(std::int64_t n, std::uint64_t seed, const std::int64_t* keys, std::uint64_t step,
                          const std::int64_t* counts, double threshold, bool equal, std::uint8_t* admitted) {
  // 4096 draws take about 40 us: less is not worth waking a thread.
  parallel_for(n, 4096, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const bool in =
          probabilistic_admits(seed, static_cast<std::uint64_t>(keys[i]), step, clipped(counts, i), threshold, equal);
      admitted[i] = in ? 1 : 0;
    }
  });
}

}  // namespace hotloop::table
