#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/parallel.hpp"
#include "table/pool.hpp"

namespace hotloop::table {

namespace {

constexpr std::int64_t kGrain = 256;

struct Entry {
  std::uint32_t row;
  std::uint32_t position;
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

using AddRow = decltype(&simd_baseline::table_add_row);
AddRow add_row() { HOTLOOP_SIMD_DISPATCH(table_add_row) }

}  // namespace

std::int64_t update_bags(Table& table, const Bags& bags, const std::uint32_t* rows, const Update& update) {
  const std::int64_t dim = table.layout().dim;
  const std::int64_t first = bags.count > 0 ? bags.begin(0) : 0;
  const std::int64_t n = bags.count > 0 ? bags.end(bags.count - 1) - first : 0;
  if (n > 0xFFFFFFFFll || bags.count > 0xFFFFFFFFll) throw std::length_error("[Table.update] keys: more than 2^32.");
  std::vector<std::uint32_t> bag_of(bags.offsets != nullptr ? static_cast<std::size_t>(n) : 0);
  if (bags.offsets != nullptr) {
    for (std::int64_t b = 0; b < bags.count; ++b) {
      std::fill(bag_of.begin() + (bags.begin(b) - first), bag_of.begin() + (bags.end(b) - first), static_cast<std::uint32_t>(b));
    }
  }
  Stamp stamp = update.stamp;
  stamp.tick = table.next_tick();
  const UpdateRow apply = update_row(update.spec, table.settings().dtype);
  const AddRow add = add_row();
  std::atomic<std::int64_t> lost{0};

  // A thread has the rows of its share, so a row is updated once and by one.
  const std::int64_t threads = std::clamp<std::int64_t>(n / kGrain, 1, max_threads());
  parallel_for(threads, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<Entry> mine, spare;
    mine.reserve(static_cast<std::size_t>(n / threads + n / 8));
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint32_t row = rows[first + i];
      const std::int64_t share = (std::uint64_t{row} * 0x9E3779B1u >> 16 & 0xFFFFu) * static_cast<std::uint64_t>(threads) >> 16;
      if (row != kNoRow && share >= begin && share < end) mine.push_back({row, static_cast<std::uint32_t>(i)});
    }
    sort_by_row(mine, spare);
    std::vector<float> sum(static_cast<std::size_t>(dim));
    std::int64_t my_lost = 0;
    constexpr std::size_t kAhead = 8;
    for (std::size_t i = 0; i < mine.size();) {
      if (i + kAhead < mine.size()) prefetch_row(table.arena().row(mine[i + kAhead].row), table.layout().stride);
      const std::uint32_t row = mine[i].row;
      const std::uint64_t key = bags.keys[first + mine[i].position];
      std::fill(sum.begin(), sum.end(), 0.0f);
      std::size_t last = i;
      // The key, too: a row may have changed hands inside a batch that other threads evicted from.
      for (; last < mine.size() && mine[last].row == row && bags.keys[first + mine[last].position] == key; ++last) {
        const std::int64_t at = mine[last].position;
        const std::int64_t bag = bags.offsets != nullptr ? bag_of[static_cast<std::size_t>(at)] : at;
        const float* const g = update.grad + bag * update.grad_stride;
        if (bags.pool == Pool::kMax) {
          const std::int64_t* const from = update.largest + bag * dim;
          for (std::int64_t j = 0; j < dim; ++j) sum[static_cast<std::size_t>(j)] += from[j] == first + at ? g[j] : 0.0f;
          continue;
        }
        float weight = bags.weights != nullptr ? bags.weights[first + at] : 1.0f;
        if (bags.pool == Pool::kMean) weight /= static_cast<float>(update.sizes[bag]);
        add(Dtype::kFloat32, g, weight, sum.data(), dim, sum.data());
      }
      const std::int64_t occurrences = static_cast<std::int64_t>(last - i);
      i = last;
      const std::uint64_t random = mix64(update.seed + stamp.tick * 0x9E3779B97F4A7C15ull) ^ mix64(key);
      bool done = false;
      for (std::uint32_t r = row; !done && r != kNoRow;) {
        done = table.edit(key, r, stamp, -1, [&](char* p) {
          apply(update.spec, dim, sum.data(), p + table.layout().values, reinterpret_cast<float*>(p + table.layout().state), random);
        });
        if (!done) r = table.row_of(*table.index(), key, place_hash(key));
      }
      if (!done) my_lost += occurrences;
    }
    lost += my_lost;
  });
  return lost;
}

}  // namespace hotloop::table
