#include "table/evict.hpp"

namespace hotloop::table {

bool Evictor::current(const Victim& v, std::uint64_t* score) const {
  const char* const p = table_.arena_.row(v.row);
  if (!table_.arena_.live(v.row) || load_relaxed<std::uint64_t>(p) != v.key) return false;
  *score = load_relaxed<std::uint64_t>(p + table_.layout_.score);
  return true;
}

void Evictor::scan() {
  // A 64th of the rows: a scan then costs an eviction as much as reading 64 scores.
  const auto most = static_cast<std::size_t>(std::max<std::int64_t>(64, table_.size() / 64));
  bound_.store(~std::uint64_t{0}, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  std::priority_queue<Victim> kept;
  const std::int64_t words = (std::int64_t{table_.arena_.end()} + 63) / 64;
  for (std::int64_t w = 0; w < words; ++w) {
    for (std::uint64_t live = table_.arena_.live_word(static_cast<std::uint32_t>(w)); live != 0; live &= live - 1) {
      const auto r = static_cast<std::uint32_t>(w * 64 + std::countr_zero(live));
      const char* const p = table_.arena_.row(r);
      const Victim v{load_relaxed<std::uint64_t>(p + table_.layout_.score), load_relaxed<std::uint64_t>(p), r};
      if (kept.size() < most) {
        kept.push(v);
      } else if (v < kept.top()) {
        kept.pop();
        kept.push(v);
      }
    }
  }
  run_.clear();
  fresh_ = {};
  active_ = !kept.empty();
  if (active_) last_ = kept.top();
  bound_.store(active_ ? last_.score : 0, std::memory_order_relaxed);
  for (; !kept.empty(); kept.pop()) run_.push_back(kept.top());
}

std::optional<Evictor::Victim> Evictor::lowest() {
  const std::lock_guard lock(mutex_);
  for (;;) {
    const bool from_heap = !fresh_.empty() && (run_.empty() || fresh_.top() < run_.back());
    if (!from_heap && run_.empty()) {
      scan();
      if (!active_) return std::nullopt;
      continue;
    }
    const Victim v = from_heap ? fresh_.top() : run_.back();
    std::uint64_t score = 0;
    const bool there = current(v, &score);
    if (there && score == v.score) return v;
    if (from_heap) fresh_.pop();
    else run_.pop_back();
    if (there && Victim{score, v.key, v.row} < last_) fresh_.push({score, v.key, v.row});
  }
}

}  // namespace hotloop::table
