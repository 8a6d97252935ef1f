// SPDX-License-Identifier: Apache-2.0
#include "table/store/arena.hpp"

#include <new>
#include <stdexcept>

namespace hotloop::table {

namespace {

// Two huge pages or so: few chunks, and little is wasted in a table of a few rows.
constexpr std::int64_t kChunkBytes = std::int64_t{1} << 22;

int chunk_shift(std::int64_t stride) {
  int shift = 6;  // whole words of the bitmap
  while ((stride << (shift + 1)) <= kChunkBytes) ++shift;
  return shift;
}

}  // namespace

Arena::Arena(std::int64_t stride, std::int64_t expected_rows)
    : stride_(stride),
      shift_(chunk_shift(stride)),
      mask_((std::uint32_t{1} << shift_) - 1),
      live_offset_(stride << shift_),
      chunk_bytes_(live_offset_ + (std::int64_t{1} << shift_) / 8),
      large_(expected_rows * stride >= kChunkBytes / 2),
      chunks_(sparse_array<char*>(static_cast<std::size_t>((kMaxRows >> shift_) + 1))) {
  if (chunks_ == nullptr) throw std::bad_alloc();
  add_chunk();
}

void Arena::add_chunk() {
  // Small tables keep to small pages: a thousand of them must not take two megabytes each.
  pages_.emplace_back(static_cast<std::size_t>(chunk_bytes_), large_ || !pages_.empty());
  __atomic_store_n(&chunks_[pages_.size() - 1], static_cast<char*>(pages_.back().data()), __ATOMIC_RELEASE);
}

std::int64_t Arena::bytes() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::int64_t>(pages_.size()) * chunk_bytes_ + static_cast<std::int64_t>(free_.capacity() * 4);
}

void Arena::take(std::vector<std::uint32_t>& rows, std::size_t count) {
  const std::lock_guard lock(mutex_);
  if (!free_.empty()) {
    const std::size_t n = count < free_.size() ? count : free_.size();
    rows.insert(rows.end(), free_.end() - static_cast<std::ptrdiff_t>(n), free_.end());
    free_.resize(free_.size() - n);
    return;
  }
  std::uint32_t end = end_.load(std::memory_order_relaxed);
  if (std::int64_t{end} + static_cast<std::int64_t>(count) > kMaxRows)
    throw std::length_error("a table holds 2^32 rows");
  while (std::int64_t{end} + static_cast<std::int64_t>(count) > static_cast<std::int64_t>(pages_.size()) << shift_) {
    add_chunk();
  }
  // The lowest row last, so that it is used first.
  for (std::size_t i = count; i-- > 0;) rows.push_back(end + static_cast<std::uint32_t>(i));
  end_.store(end + static_cast<std::uint32_t>(count), std::memory_order_release);
}

void Arena::give(std::vector<std::uint32_t>& rows) {
  if (rows.empty()) return;
  const std::lock_guard lock(mutex_);
  free_.insert(free_.end(), rows.begin(), rows.end());
  rows.clear();
}

}  // namespace hotloop::table
