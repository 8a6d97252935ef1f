// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/parallel.hpp"
#include "table/store/pool.hpp"

namespace hotloop::table {

namespace {

constexpr std::int64_t kGrain = 256;

struct Entry {
  std::uint32_t row, position, bag;
};

// By row, positions in order: a radix sort, eight passes at most of which most are skipped.
void sort_by_row(std::vector<Entry>& entries, std::vector<Entry>& spare) {
  spare.resize(entries.size());
  std::uint32_t most = 0;
  for (const Entry& e : entries) most = std::max(most, e.row);
  for (int shift = 0; shift < 32 && (most >> shift) != 0; shift += 11) {
    std::uint32_t count[2048] = {};
    for (const Entry& e : entries) ++count[(e.row >> shift) & 2047u];
    std::uint32_t before = 0;
    for (std::uint32_t& c : count) before += std::exchange(c, before);
    for (const Entry& e : entries) spare[count[(e.row >> shift) & 2047u]++] = e;
    entries.swap(spare);
  }
}

using AddRows = decltype(&simd_baseline::table_add_rows);
AddRows add_rows() { HOTLOOP_SIMD_DISPATCH(table_add_rows) }

}  // namespace

std::int64_t update_bags(Table& table, const Bags& bags, const Update& update) {
  const std::int64_t dim = table.layout().dim;
  const std::int64_t first = bags.count > 0 ? bags.begin(0) : 0;
  const std::int64_t n = bags.count > 0 ? bags.end(bags.count - 1) - first : 0;
  if (n > 0xFFFFFFFFll || bags.count > 0xFFFFFFFFll) throw std::length_error("[Table.update] keys: more than 2^32.");
  Stamp stamp = update.stamp;
  stamp.tick = table.next_tick();
  const UpdateRow apply = update_row(update.spec, table.settings().dtype);
  const AddRows add = add_rows();
  const Arena& arena = table.arena();
  const std::int64_t row_bytes = table.layout().stride, grad_bytes = dim * 4;
  const auto grad_of = [&](const Entry& e) { return update.grad + e.bag * update.grad_stride; };
  std::atomic<std::int64_t> lost{0};

  // A thread has the rows of its share, so a row is updated once and by one.
  const std::int64_t threads = std::clamp<std::int64_t>(n / kGrain, 1, max_threads());
  parallel_for(threads, 1, [&](std::int64_t begin, std::int64_t end) {
    constexpr std::size_t kRoom = 1024;
    std::vector<Entry> mine(static_cast<std::size_t>(n / threads) + kRoom), spare;
    std::size_t count = 0;
    for (std::int64_t b = 0; b < bags.count; ++b) {
      for (std::int64_t i = bags.begin(b) - first, last = bags.end(b) - first; i < last; ++i) {
        if (count == mine.size()) mine.resize(count + count / 4);
        const std::uint32_t row = bags.rows[first + i];
        const std::int64_t share =
            (std::uint64_t{row} * 0x9E3779B1u >> 16 & 0xFFFFu) * static_cast<std::uint64_t>(threads) >> 16;
        // Written whether it is ours or not: a branch would be mispredicted every other time.
        mine[count] = {row, static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(b)};
        count += static_cast<std::size_t>((row != kNoRow) & (share >= begin) & (share < end));
      }
    }
    mine.resize(count);
    sort_by_row(mine, spare);
    std::vector<float> sum(static_cast<std::size_t>(dim));
    std::vector<WeightedRow> parts;
    std::int64_t my_lost = 0;
    constexpr std::size_t kAhead = 8;
    for (std::size_t i = 0; i < mine.size();) {
      const std::uint32_t row = mine[i].row;
      const std::uint64_t key = bags.keys[first + mine[i].position];
      parts.clear();
      if (bags.pool == Pool::kMax) std::fill(sum.begin(), sum.end(), 0.0f);
      std::size_t last = i;
      // The key, too: a row may have changed hands inside a batch that other threads evicted from.
      for (; last < mine.size() && mine[last].row == row && bags.keys[first + mine[last].position] == key; ++last) {
        if (last + kAhead < mine.size()) {
          const Entry& ahead = mine[last + kAhead];
          prefetch_row<true>(arena.row(ahead.row), row_bytes);
          prefetch_row(reinterpret_cast<const char*>(grad_of(ahead)), grad_bytes);
        }
        const Entry& e = mine[last];
        const float* const g = grad_of(e);
        if (bags.pool == Pool::kMax) {
          const std::int64_t* const from = update.largest + std::int64_t{e.bag} * dim;
          const std::int64_t at = first + e.position;
          for (std::int64_t j = 0; j < dim; ++j) sum[static_cast<std::size_t>(j)] += from[j] == at ? g[j] : 0.0f;
          continue;
        }
        float weight = bags.weights != nullptr ? bags.weights[first + e.position] : 1.0f;
        if (bags.pool == Pool::kMean) weight /= static_cast<float>(update.sizes[e.bag]);
        parts.push_back({g, weight});
      }
      const float* merged = sum.data();
      if (parts.size() == 1 && parts[0].weight == 1.0f)
        merged = static_cast<const float*>(parts[0].row);
      else if (!parts.empty())
        add(Dtype::kFloat32, parts.data(), static_cast<std::int64_t>(parts.size()), dim, nullptr, sum.data());
      const std::int64_t occurrences = static_cast<std::int64_t>(last - i);
      i = last;
      const std::uint64_t random = mix64(update.seed + stamp.tick * 0x9E3779B97F4A7C15ull) ^ mix64(key);
      bool done = false;
      for (std::uint32_t r = row; !done && r != kNoRow;) {
        done = table.edit(key, r, stamp, -1, [&](char* p) {
          apply(update.spec, dim, merged, p + table.layout().values, reinterpret_cast<float*>(p + table.layout().state),
                random);
        });
        if (!done) r = table.look_again(key);
      }
      if (!done) my_lost += occurrences;
    }
    lost += my_lost;
  });
  return lost;
}

}  // namespace hotloop::table
