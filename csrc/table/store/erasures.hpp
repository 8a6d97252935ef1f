// SPDX-License-Identifier: Apache-2.0
// Which keys have left a table, for deltas: in host memory, as long as it lasts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <unordered_set>
#include <utility>
#include <vector>

#include "table/hash.hpp"

namespace hotloop::table {

class Erasures {
 public:
  explicit Erasures(std::uint64_t seed) : hash_{seed} {}

  // `generation`, a number or an atomic one, is read under the lock, so that entries are in its order.
  template <class Generation>
  void note(const Generation& generation, const std::uint64_t* keys, std::size_t n) {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < n; ++i) {
      if (kept_.size() >= kMost) {
        const std::size_t half = kept_.size() / 2;
        from_ = kept_[half - 1].first;
        kept_.erase(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(half));
      }
      kept_.emplace_back(generation, keys[i]);
    }
  }
  // Each key once. Throws std::out_of_range if that is no longer known.
  std::unordered_set<std::uint64_t, SeededHash> since(std::uint64_t generation) const {
    const std::lock_guard lock(mutex_);
    if (generation < from_) throw std::out_of_range("erasures that long ago are forgotten");
    std::unordered_set<std::uint64_t, SeededHash> keys(0, hash_);
    for (const auto& [when, key] : kept_) {
      if (when > generation) keys.insert(key);
    }
    return keys;
  }
  // Or it is not known.
  bool any_since(std::uint64_t generation) const {
    const std::lock_guard lock(mutex_);
    return generation < from_ || (!kept_.empty() && kept_.back().first > generation);
  }
  void forget(std::uint64_t until) {
    const std::lock_guard lock(mutex_);
    std::erase_if(kept_, [&](const auto& e) { return e.first <= until; });
    from_ = std::max(from_, until);
  }
  std::int64_t bytes() const {
    const std::lock_guard lock(mutex_);
    return static_cast<std::int64_t>(kept_.capacity() * sizeof(kept_[0]));
  }

 private:
  static constexpr std::size_t kMost = std::size_t{1} << 21;  // 32 MiB, as many as Monolith's touched-key set holds

  mutable std::mutex mutex_;
  SeededHash hash_;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> kept_;  // (generation, key), oldest first
  std::uint64_t from_ = 0;                                     // what is known begins after this generation
};

}  // namespace hotloop::table
