// SPDX-License-Identifier: Apache-2.0
#include "table/store/evictor.hpp"

#include <functional>
#include <utility>

namespace hotloop::table {

bool Evictor::current(const Victim& v, std::uint64_t* score) const {
  const char* const p = table_.arena_.row(v.row);
  if (!table_.arena_.live(v.row) || load_relaxed<std::uint64_t>(p) != v.key) return false;
  *score = load_relaxed<std::uint64_t>(p + table_.layout_.score);
  return true;
}

// A 64th of the rows: a scan then costs an eviction as much as reading 64 scores.
std::size_t Evictor::most() const { return static_cast<std::size_t>(std::max<std::int64_t>(64, table_.size() / 64)); }

std::int64_t Evictor::bytes() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::int64_t>((run_.capacity() + fresh_.capacity()) * sizeof(Victim));
}

void Evictor::forget() {
  const std::lock_guard lock(mutex_);
  run_.clear();
  fresh_.clear();
  active_ = false;
  bound_.store(0, std::memory_order_relaxed);
}

void Evictor::push(const Victim& v) {
  if (fresh_.size() >= 4 * most()) {
    compact();
    if (!(v < last_)) return;
  }
  fresh_.push_back(v);
  std::push_heap(fresh_.begin(), fresh_.end(), std::greater<>());
}

// Leaves the lowest rows as they are now, no more than a scan leaves, in `run_`. What a row had before its last use is
// dropped, and so are the highest: `last_` comes down to the highest that stays.
void Evictor::compact() {
  std::vector<Victim> now;
  now.reserve(run_.size() + fresh_.size());
  for (const std::vector<Victim>* some : {&run_, &fresh_}) {
    for (const Victim& v : *some) {
      std::uint64_t score = 0;
      if (!current(v, &score)) continue;
      const Victim n{score, v.key, v.row};
      if (!(last_ < n)) now.push_back(n);
    }
  }
  std::sort(now.begin(), now.end());
  const auto same = [](const Victim& a, const Victim& b) { return a.key == b.key && a.score == b.score; };
  now.erase(std::unique(now.begin(), now.end(), same), now.end());
  if (const std::size_t keep = most(); now.size() > keep) {
    now.resize(keep);
    last_ = now.back();
    bound_.store(last_.score, std::memory_order_relaxed);
  }
  fresh_.clear();
  run_.assign(now.rbegin(), now.rend());
}

void Evictor::scan() {
  const std::size_t most = this->most();
  bound_.store(~std::uint64_t{0}, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  std::vector<Victim> kept;  // a heap, highest first
  kept.reserve(most);
  table_.arena_.each_live(0, table_.arena_.words(), [&](std::uint32_t r) {
    const char* const p = table_.arena_.row(r);
    const Victim v{load_relaxed<std::uint64_t>(p + table_.layout_.score), load_relaxed<std::uint64_t>(p), r};
    if (kept.size() == most) {
      if (!(v < kept.front())) return;
      std::pop_heap(kept.begin(), kept.end());
      kept.pop_back();
    }
    kept.push_back(v);
    std::push_heap(kept.begin(), kept.end());
  });
  fresh_.clear();
  active_ = !kept.empty();
  if (active_) last_ = kept.front();
  bound_.store(active_ ? last_.score : 0, std::memory_order_relaxed);
  std::sort(kept.begin(), kept.end(), std::greater<>());
  run_ = std::move(kept);
}

std::optional<Evictor::Victim> Evictor::lowest() {
  const std::lock_guard lock(mutex_);
  for (;;) {
    const bool from_heap = !fresh_.empty() && (run_.empty() || fresh_.front() < run_.back());
    if (!from_heap && run_.empty()) {
      scan();
      if (!active_) return std::nullopt;
      continue;
    }
    const Victim v = from_heap ? fresh_.front() : run_.back();
    std::uint64_t score = 0;
    const bool there = current(v, &score);
    if (there && score == v.score) return v;
    if (from_heap) {
      std::pop_heap(fresh_.begin(), fresh_.end(), std::greater<>());
      fresh_.pop_back();
    } else {
      run_.pop_back();
    }
    if (there && Victim{score, v.key, v.row} < last_) push({score, v.key, v.row});
  }
}

}  // namespace hotloop::table
