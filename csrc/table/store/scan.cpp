// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <stdexcept>

#include "core/parallel.hpp"
#include "table/store/table.hpp"

namespace hotloop::table {

namespace {

template <class T>
void put_out(T* out, std::int64_t i, const char* row, std::int64_t offset) {
  if (out == nullptr) return;
  if (offset < 0)
    out[i] = 0;
  else
    std::memcpy(&out[i], row + offset, sizeof(T));
}

}  // namespace

std::int64_t Table::export_rows(std::int64_t begin, std::int64_t end, std::uint64_t since, const Export& out) const {
  std::vector<char> copy(static_cast<std::size_t>(layout_.stride));
  const char* const row = copy.data();
  std::int64_t n = 0;
  const auto last = static_cast<std::uint32_t>(std::min<std::int64_t>(end, arena_.end()));
  for (auto r = static_cast<std::uint32_t>(std::min<std::int64_t>(begin, last)); r < last; ++r) {
    if ((r & 63u) == 0 && arena_.live_word(r >> 6) == 0) {
      r |= 63u;
      continue;
    }
    bool live = arena_.live(r);
    while (live) {
      const std::uint32_t v = locks_.begin_read(r);
      live = arena_.live(r);
      // Only the head of a row that did not change is read.
      const char* const p = arena_.row(r);
      const bool news = since == 0 || load_relaxed<std::uint32_t>(p + layout_.version) > since;
      if (news) copy_out(copy.data(), p, copy.size());
      if (!locks_.end_read(r, v)) continue;
      live = live && news;
      break;
    }
    if (!live) continue;
    put_out(out.keys, n, row, 0);
    if (out.values)
      std::memcpy(out.values.row(n), row + layout_.values, static_cast<std::size_t>(layout_.value_bytes()));
    if (out.state) std::memcpy(out.state.row(n), row + layout_.state, static_cast<std::size_t>(layout_.states) * 4);
    put_out(out.scores, n, row, layout_.score);
    put_out(out.times, n, row, layout_.time);
    ++n;
  }
  return n;
}

std::uint64_t Table::mark() {
  const std::uint64_t g = generation_.fetch_add(1, std::memory_order_seq_cst);
  if (g >= 0xFFFFFFFEu) throw std::overflow_error("a table counts to 2^32 marks");  // a row has 32 bits for it
  return g;
}

std::vector<std::uint64_t> Table::erased_since(std::uint64_t since) const {
  auto keys = erasures_.since(since);
  const std::shared_ptr<Index> index = this->index();
  std::erase_if(keys, [&](std::uint64_t key) { return row_of(*index, key, hash_of(key)) != kNoRow; });
  return {keys.begin(), keys.end()};
}

bool Table::changed_since(std::uint64_t since) const {
  if (erasures_.any_since(since)) return true;
  std::atomic<bool> changed{false};
  parallel_for(arena_.words(), 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t w = begin; w < end && !changed.load(std::memory_order_relaxed); ++w) {
      arena_.each_live(w, w + 1, [&](std::uint32_t r) {
        if (load_relaxed<std::uint32_t>(arena_.row(r) + layout_.version) > since) {
          changed.store(true, std::memory_order_relaxed);
        }
      });
    }
  });
  return changed;
}

}  // namespace hotloop::table
