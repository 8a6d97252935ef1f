// SPDX-License-Identifier: Apache-2.0
#include "core/segments.hpp"

#include <algorithm>
#include <memory>

#include "core/counting_sort.hpp"
#include "core/parallel.hpp"

namespace hotloop::segments {

namespace {

constexpr std::int64_t kTileElements = 16384;  // some microseconds of one thread
constexpr std::int64_t kLeastTile = 256;
constexpr std::int64_t kFewColumns = 8;  // up to here rows with ids are added one by one
constexpr std::int64_t kStretch = 65536;

// What a call keeps while it runs. Memory is not initialised: only what is written is read.
template <class T>
std::unique_ptr<T[]> memory(std::int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(count)]);
}

// Rows of each segment that the mask lets count.
void count_rows(const ReduceCall& call) {
  const Groups& g = call.groups;
  const std::int64_t grain = std::max<std::int64_t>(1, kStretch * g.count / (call.values.n + 1));
  parallel_for(g.count, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t s = begin; s < end; ++s) {
      std::int64_t count = g.offsets[s + 1] - g.offsets[s];
      if (g.mask != nullptr) {
        count = 0;
        for (std::int64_t i = g.offsets[s]; i < g.offsets[s + 1]; ++i) {
          count += g.mask[call.order != nullptr ? call.order[i] : i] != 0 ? 1 : 0;
        }
      }
      call.counts[s] = count;
    }
  });
}

bool rising(const Groups& g, std::int64_t n) {
  bool rises = g.offsets[0] == 0 && g.offsets[g.count] == n;
  for (std::int64_t s = 0; s < g.count; ++s) rises &= g.offsets[s] <= g.offsets[s + 1];
  return rises;
}

void run(const ReduceCall& call) { HOTLOOP_SIMD_DISPATCH(segment_reduce(call)) }

}  // namespace

bool segment_reduce(ReduceCall call) {
  Groups& g = call.groups;
  const std::int64_t n = call.values.n, columns = call.values.columns;
  std::unique_ptr<std::int64_t[]> counts, order, offsets;
  // A mean divides by them.
  if (call.counts == nullptr && call.reduction == Reduction::kMean) {
    counts = memory<std::int64_t>(g.count);
    call.counts = counts.get();
  }
  if (g.ids != nullptr) {
    if (first_outside(g.ids, g.ids_dtype, n, g.count) >= 0) return false;
    if (columns <= kFewColumns) {
      // Stretches together keep no more than a quarter as many numbers as there are rows.
      call.stretches = std::clamp<std::int64_t>(n / std::max(kStretch, 4 * g.count), 1, 64);
      const std::int64_t size = call.stretches * g.count * columns;
      const auto value = memory<double>(size);
      const auto weight = memory<double>(call.reduction == Reduction::kLogSumExp ? size : 0);
      const auto at = memory<std::int64_t>(call.rows != nullptr ? size : 0);
      call.value = value.get();
      call.weight = weight.get();
      call.at = call.rows != nullptr ? at.get() : nullptr;
      run(call);
      return true;
    }
    order = memory<std::int64_t>(n);
    offsets = memory<std::int64_t>(g.count + 1);
    counting_sort(g.ids, g.ids_dtype, n, g.count, order.get(), nullptr, offsets.get());
    call.order = order.get();
    g.offsets = offsets.get();
  } else if (!rising(g, n)) {
    return false;
  }
  if (call.counts != nullptr) count_rows(call);
  call.tile = std::max(kLeastTile, kTileElements / std::max<std::int64_t>(1, columns));
  call.tiles = std::max<std::int64_t>(1, (n + call.tile - 1) / call.tile);
  const auto parts = memory<Part>(2 * call.tiles * columns);
  const auto begun = memory<std::int64_t>(call.tiles);
  std::fill_n(begun.get(), call.tiles, -1);
  call.parts = parts.get();
  call.begun = begun.get();
  run(call);
  return true;
}

void segment_spread(const SpreadCall& call) { HOTLOOP_SIMD_DISPATCH(segment_spread(call)) }

}  // namespace hotloop::segments
