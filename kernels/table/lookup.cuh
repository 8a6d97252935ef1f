// SPDX-License-Identifier: Apache-2.0
// Lookups: rows of keys copied out, pooled over bags, or multiplied with gradients.
//
// Every body here and in the files beside it is called as body(warp, lane, scratch) by the 32 lanes of each warp of a
// launch; `warps()` says how many warps it wants.
#pragma once

#include <cstdint>

#include "core/bisect.hpp"
#include "kernels/table/store.cuh"
#include "table/store/calls.hpp"

namespace hotloop::table::gpu {

HOTLOOP_INLINE std::int64_t blocks_of(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// An item a lane: body.each(i) for i of [0, n).
template <class Item>
struct EachLane : Item {
  static constexpr std::int64_t kScratch = 0;
  std::int64_t n;
  std::int64_t warps() const { return blocks_of(n, kWarp); }
  HOTLOOP_BOTH void operator()(std::int64_t warp, int lane, float*) const {
    const std::int64_t i = warp * kWarp + lane;
    if (i < n) this->each(i);
  }
};

// A group of lanes per key: 16 digests a lane, the keys that they let through, then the row.
struct Find {
  static constexpr std::int64_t kScratch = 0;
  Store store;
  Shape shape;
  const std::uint64_t* keys;   // (n,)
  const std::uint32_t* given;  // (n,) slots as a write left them, kNoRow to leave a position out; or null
  std::int64_t n;
  Matrix values;        // none: nothing is copied
  std::uint8_t* found;  // the rest are (n,) out, null where not wanted
  std::uint64_t* scores;
  std::uint32_t* rows;
  std::int64_t* sizes;
  std::uint32_t* missing;  // one number: positions without a row, but for those left out

  std::int64_t warps() const { return blocks_of(n, kGroups); }

  HOTLOOP_BOTH void operator()(std::int64_t warp, int lane, float*) const {
    const std::int64_t i = warp * kGroups + lane / kGroup;
    const int part = lane % kGroup;
    const bool mine = i < n;
    const std::uint64_t key = mine ? keys[i] : 0;
    const std::uint32_t row = mine && given != nullptr ? given[i] : kNoRow;
    const bool known = row != kNoRow && holds(store, row, key);
    const bool wanted = mine && !known && (given == nullptr || row != kNoRow);
    std::uint32_t slot = known ? row : kNoRow;
    if (cuda::ballot(wanted) != 0) {
      const std::uint32_t there = locate(store, key, wanted, lane);
      slot = wanted ? there : slot;
    }
    const bool is_there = slot != kNoRow;
    if (mine && values.data != nullptr) {
      copy_row(values.row(i), is_there ? row_at(store, shape, slot) : nullptr, shape.value_bytes, values.access, part,
               kGroup);
    }
    if (mine && part == 0) {
      if (found != nullptr) found[i] = is_there ? 1 : 0;
      if (scores != nullptr) scores[i] = is_there && store.scores != nullptr ? store.scores[slot] : 0;
      if (rows != nullptr) rows[i] = slot;
      if (sizes != nullptr) sizes[i] = is_there ? 1 : 0;
    }
    if (missing != nullptr) {
      const bool left_out = given != nullptr && row == kNoRow;
      const int absent = cuda::count_bits(cuda::ballot(mine && part == 0 && !is_there && !left_out));
      if (lane == 0 && absent > 0) cuda::add_global(missing, static_cast<std::uint32_t>(absent));
    }
  }
};

// Bags as a warp reads them.
struct Bags : table::Bags {
  // Kept inside the batch whatever the offsets are: they are not checked, since the host does not read them.
  HOTLOOP_INLINE std::int64_t bound(std::int64_t b) const {
    const std::int64_t at = begin(b);
    return at < 0 ? 0 : at > keys.count ? keys.count : at;
  }
  // The bag of a position: the last that begins at or before it, so that empty ones are passed over.
  HOTLOOP_INLINE std::int64_t bag_of(std::int64_t position) const {
    if (offsets == nullptr) return position;
    return first_where(count - 1, [&](std::int64_t b) { return offsets[b + 1] > position; });
  }
  HOTLOOP_BOTH std::uint32_t locate_at(const Store& store, std::int64_t position, bool inside, int lane) const {
    const std::uint64_t key = inside ? keys.data[position] : 0;
    const std::uint32_t row = inside && rows != nullptr ? rows[position] : kNoRow;
    return locate_each(store, key, row, inside && (rows == nullptr || row != kNoRow), lane);
  }
};

// A warp per bag: 32 keys are looked up at a time, then their rows are added in order. A lane has every 32nd element,
// kWide of them at once; wider rows take several turns over the bag.
template <class Storage, class Out>
struct Pool {
  static constexpr std::int64_t kScratch = 0;
  static constexpr int kWide = 8;
  Store store;
  Shape shape;
  Bags bags;
  Pooled pooled;

  std::int64_t warps() const { return bags.count; }

  HOTLOOP_BOTH void operator()(std::int64_t bag, int lane, float*) const {
    const std::int64_t begin = bags.bound(bag), end = bags.bound(bag + 1);
    for (std::int64_t column = 0; column < shape.dim; column += kWide * kWarp) {
      float sum[kWide];
      std::int64_t from[kWide];
      HOTLOOP_UNROLL
      for (int r = 0; r < kWide; ++r) {
        sum[r] = 0.0f;
        from[r] = -1;
      }
      std::int64_t size = 0;
      for (std::int64_t first = begin; first < end; first += kWarp) {
        const std::uint32_t slots = bags.locate_at(store, first + lane, first + lane < end, lane);
        const auto count = static_cast<int>(end - first < kWarp ? end - first : kWarp);
        for (int k = 0; k < count; ++k) {
          const std::uint32_t slot = cuda::shuffle(slots, k);
          if (slot == kNoRow) continue;
          ++size;
          const Storage* row = reinterpret_cast<const Storage*>(row_at(store, shape, slot));
          const float weight = bags.weights != nullptr ? bags.weights[first + k] : 1.0f;
          HOTLOOP_UNROLL
          for (int r = 0; r < kWide; ++r) {
            const std::int64_t j = column + r * kWarp + lane;
            if (j >= shape.dim) break;
            const float x = to_float(cuda::read_global(row + j));
            if (bags.pool == table::Pool::kMax) {
              const bool better = x > sum[r] || from[r] < 0;
              sum[r] = better ? x : sum[r];
              from[r] = better ? first + k : from[r];
            } else {
              sum[r] = sum[r] + weight * x;
            }
          }
        }
      }
      HOTLOOP_UNROLL
      for (int r = 0; r < kWide; ++r) {
        const std::int64_t j = column + r * kWarp + lane;
        if (j >= shape.dim) break;
        const float x = bags.pool == table::Pool::kMean && size > 1 ? sum[r] / static_cast<float>(size) : sum[r];
        put(reinterpret_cast<Out*>(pooled.out.row(bag))[j], x);
        if (pooled.largest != nullptr) pooled.largest[bag * shape.dim + j] = from[r];
      }
      if (pooled.sizes != nullptr && lane == 0) pooled.sizes[bag] = size;
    }
  }
};

// <row of a position, gradient of its bag>: sixteen lanes a position, in the order of sums of the CPU.
template <class Storage>
struct WeightGradient {
  static constexpr std::int64_t kScratch = 0;
  static constexpr int kHalf = kWarp / 2;
  Shape shape;
  Bags bags;
  Values kept;  // (n, dim): the rows as they were when the bags were pooled, zeros where there was none
  const float* grad;
  std::int64_t grad_stride;
  float* out;  // (n,)

  std::int64_t warps() const { return blocks_of(bags.keys.count, kWarp); }

  HOTLOOP_BOTH void operator()(std::int64_t warp, int lane, float*) const {
    const std::int64_t first = warp * kWarp;
    const int half = lane / kHalf;
    for (int k = 0; k < kWarp && first + k < bags.keys.count; k += 2) {
      const std::int64_t position = first + k + half;
      float part = 0.0f;
      if (position < bags.keys.count) {
        const Storage* row = reinterpret_cast<const Storage*>(kept.row(position));
        const float* g = grad + bags.bag_of(position) * grad_stride;
        for (std::int64_t j = lane % kHalf; j < shape.dim; j += kHalf) {
          part += to_float(cuda::read_global(row + j)) * g[j];
        }
      }
      float sum = 0.0f;
      for (int l = 0; l < kHalf; ++l) sum += cuda::shuffle(part, half * kHalf + l);
      if (position < bags.keys.count && lane % kHalf == 0) out[position] = sum;
    }
  }
};

}  // namespace hotloop::table::gpu
