// SPDX-License-Identifier: Apache-2.0
// Writes to rows that exist. Positions of the batch are sorted by slot, so the positions of one row are a run, in the
// order of the batch, and one warp owns the run. A run may be half of the batch, which one warp would take long to add.
// So runs are cut every kTile positions of the sorted batch: the sums of the pieces are left in memory, and a second
// pass adds them in order. The cuts depend on the batch alone, so results do not depend on the device.
#pragma once

#include <cstdint>

#include "kernels/table/lookup.cuh"
#include "kernels/table/row_update.cuh"

namespace hotloop::table::gpu {

// Positions that one warp adds up: a piece of 256 rows of 64 floats is 64 KB, some microseconds of one warp.
inline constexpr std::int64_t kTile = 256;

enum class Write : std::int32_t { kTouch, kAssign, kAccumulate, kUpdate };

// Positions sorted by slot, in order within a slot; those without one are last, with kNoRow.
struct Runs {
  const std::uint32_t* slots = nullptr;
  const std::uint32_t* positions = nullptr;
  std::int64_t n = 0;

  HOTLOOP_INLINE std::int64_t tiles() const { return blocks_of(n, kTile); }
  HOTLOOP_INLINE bool begins(std::int64_t i) const { return i == 0 || slots[i - 1] != slots[i]; }
  // How many from i on, before `end`, have the slot of i; all lanes call it.
  HOTLOOP_BOTH std::int64_t length(std::int64_t i, std::int64_t end, int lane) const {
    const std::uint32_t slot = slots[i];
    std::int64_t length = 0;
    for (;; length += kWarp) {
      const std::int64_t at = i + length + lane;
      const std::uint32_t same = cuda::ballot(at < end && slots[at] == slot);
      if (same != 0xffffffffu) return length + cuda::count_bits(same);
    }
  }
};

struct WriteCall {
  Store store;
  Shape shape;
  Stamp stamp;
  Write write;
  Runs runs;
  Matrix values;  // of the batch, for kAssign and kAccumulate
  Update update;  // kUpdate, but for its stamp
  Bags bags;
  float* part_rows;          // (2 tiles, dim): sums of pieces; 2 t goes on from before tile t, 2 t + 1 begins in it
  std::uint64_t* part_uses;  // (2 tiles,)

  HOTLOOP_INLINE bool sums() const { return write == Write::kAccumulate || write == Write::kUpdate; }
  HOTLOOP_INLINE bool counts() const {
    return write != Write::kUpdate && store.scores != nullptr && counts_uses(shape, stamp);
  }
};

template <class Storage>
struct RunWriter {
  WriteCall call;

  // Sum of what the positions [first, first + count) of the sorted batch add; every lane keeps its own elements.
  HOTLOOP_BOTH void add_up(std::int64_t first, std::int64_t count, int lane, float* sum) const {
    constexpr int kWide = 4;
    const std::int64_t dim = call.shape.dim;
    const bool updates = call.write == Write::kUpdate;
    for (std::int64_t column = 0; column < dim; column += kWide * kWarp) {
      float total[kWide] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (std::int64_t c = 0; c < count; c += kWarp) {
        const bool inside = c + lane < count;
        const std::int64_t mine = inside ? call.runs.positions[first + c + lane] : 0;
        const std::int64_t my_bag = inside && updates ? call.bags.bag_of(mine) : mine;
        const float my_weight = inside && updates ? weight_of(mine, my_bag) : 1.0f;
        const auto batch = static_cast<int>(count - c < kWarp ? count - c : kWarp);
        for (int k = 0; k < batch; ++k) {
          const auto position = static_cast<std::int64_t>(cuda::shuffle(static_cast<std::uint64_t>(mine), k));
          const auto bag = static_cast<std::int64_t>(cuda::shuffle(static_cast<std::uint64_t>(my_bag), k));
          const float weight = cuda::shuffle(my_weight, k);
          HOTLOOP_UNROLL
          for (int r = 0; r < kWide; ++r) {
            const std::int64_t j = column + r * kWarp + lane;
            if (j >= dim) break;
            total[r] = total[r] + term(position, bag, weight, j);
          }
        }
      }
      HOTLOOP_UNROLL
      for (int r = 0; r < kWide; ++r) {
        const std::int64_t j = column + r * kWarp + lane;
        if (j < dim) sum[j] = total[r];
      }
    }
  }

  HOTLOOP_BOTH std::uint64_t uses(std::int64_t first, std::int64_t count, int lane) const {
    std::uint64_t sum = 0;
    for (std::int64_t c = lane; c < count; c += kWarp) {
      sum = add_scores(sum, uses_of(call.shape, call.stamp, call.runs.positions[first + c]));
    }
    return warp_add_scores(sum);
  }

  // The whole run is known: writes the row. `last`: the last of its positions.
  HOTLOOP_BOTH void finish(std::uint32_t slot, std::int64_t last, std::uint64_t uses, const float* sum,
                           int lane) const {
    char* row = row_at(call.store, call.shape, slot);
    Storage* values = reinterpret_cast<Storage*>(row);
    if (call.write == Write::kAssign) {
      copy_row(row, call.values.row(last), call.shape.value_bytes, call.values.access, lane, kWarp);
    } else if (call.write == Write::kAccumulate) {
      for (std::int64_t j = lane; j < call.shape.dim; j += kWarp) put(values[j], to_float(values[j]) + sum[j]);
    } else if (call.write == Write::kUpdate) {
      const std::uint64_t key = call.store.keys[slot];
      const std::uint64_t random = mix64(call.update.seed + call.stamp.tick * 0x9E3779B97F4A7C15ull) ^ mix64(key);
      update_row(call.update.spec, sum,
                 Weights<Storage>{values, call.shape.dim, random, call.update.spec.stochastic_rounding, lane},
                 reinterpret_cast<float*>(row + call.shape.state));
    }
    if (lane != 0) return;
    const std::uint64_t given = call.counts() ? uses : call.stamp.scores != nullptr ? call.stamp.scores[last] : 1;
    touch(call.store, call.shape, call.stamp, slot, given, call.write != Write::kUpdate);
  }

 private:
  HOTLOOP_BOTH float weight_of(std::int64_t position, std::int64_t bag) const {
    float weight = call.bags.weights != nullptr ? call.bags.weights[position] : 1.0f;
    if (call.bags.pool == table::Pool::kMean) weight /= static_cast<float>(call.update.sizes[bag]);
    return weight;
  }
  HOTLOOP_INLINE float term(std::int64_t position, std::int64_t bag, float weight, std::int64_t j) const {
    if (call.write == Write::kAccumulate) {
      return to_float(reinterpret_cast<const Storage*>(call.values.row(position))[j]);
    }
    const float g = call.update.grad[bag * call.update.grad_stride + j];
    if (call.bags.pool == table::Pool::kMax)
      return call.update.largest[bag * call.shape.dim + j] == position ? g : 0.0f;
    return weight * g;
  }
};

// A warp per sorted position; those where no piece begins have nothing to do.
template <class Storage>
struct WritePieces : RunWriter<Storage> {
  static constexpr std::int64_t kScratch = 1;  // rows of dim floats for each warp
  std::int64_t warps() const { return this->call.runs.n; }
  HOTLOOP_BOTH void operator()(std::int64_t i, int lane, float* sum) const {
    const WriteCall& call = this->call;
    const Runs& runs = call.runs;
    const std::uint32_t slot = runs.slots[i];
    const bool begins = runs.begins(i);
    if (slot == kNoRow || (!begins && i % kTile != 0)) return;
    const std::int64_t tile = i / kTile, limit = (tile + 1) * kTile < runs.n ? (tile + 1) * kTile : runs.n;
    const std::int64_t count = runs.length(i, limit, lane);
    const bool ends = i + count == runs.n || runs.slots[i + count] != slot;
    const std::uint64_t uses = call.counts() ? this->uses(i, count, lane) : 0;
    if (call.sums()) this->add_up(i, count, lane, sum);
    if (begins && ends) {
      this->finish(slot, runs.positions[i + count - 1], uses, sum, lane);
      return;
    }
    const std::int64_t part = 2 * tile + (begins ? 1 : 0);
    if (call.sums()) {
      for (std::int64_t j = lane; j < call.shape.dim; j += kWarp) call.part_rows[part * call.shape.dim + j] = sum[j];
    }
    if (lane == 0) call.part_uses[part] = uses;
  }
};

// A warp per tile: if a run begins in it and goes on behind it, its pieces are added in order.
template <class Storage>
struct WriteSpans : RunWriter<Storage> {
  static constexpr std::int64_t kScratch = 1;
  std::int64_t warps() const { return this->call.runs.tiles(); }
  HOTLOOP_BOTH void operator()(std::int64_t tile, int lane, float* sum) const {
    const WriteCall& call = this->call;
    const Runs& runs = call.runs;
    const std::int64_t next = (tile + 1) * kTile;
    if (next >= runs.n) return;
    const std::uint32_t slot = runs.slots[next];
    const bool goes_on = runs.slots[next - 1] == slot, from_before = tile > 0 && runs.slots[tile * kTile - 1] == slot;
    if (slot == kNoRow || !goes_on || from_before) return;
    std::int64_t last_tile = tile + 1;
    while ((last_tile + 1) * kTile < runs.n && runs.slots[(last_tile + 1) * kTile] == slot) ++last_tile;
    const std::int64_t dim = call.shape.dim;
    if (call.sums()) {
      for (std::int64_t j = lane; j < dim; j += kWarp) {
        float total = call.part_rows[(2 * tile + 1) * dim + j];
        for (std::int64_t t = tile + 1; t <= last_tile; ++t) total += call.part_rows[2 * t * dim + j];
        sum[j] = total;
      }
    }
    std::uint64_t uses = 0;
    if (call.counts()) {
      for (std::int64_t t = tile + 1 + lane; t <= last_tile; t += kWarp) {
        uses = add_scores(uses, call.part_uses[2 * t]);
      }
      uses = add_scores(warp_add_scores(uses), call.part_uses[2 * tile + 1]);
    }
    const std::int64_t begin = last_tile * kTile, limit = begin + kTile < runs.n ? begin + kTile : runs.n;
    const std::int64_t end = begin + runs.length(begin, limit, lane);
    this->finish(slot, runs.positions[end - 1], uses, sum, lane);
  }
};

// Of repeated keys the first one erases.
struct EraseRuns {
  static constexpr std::int64_t kScratch = 0;
  Store store;
  Runs runs;
  std::uint8_t* found;  // (n,), 0 at first
  std::uint64_t* size;
  std::int64_t warps() const { return blocks_of(runs.n, kWarp); }
  HOTLOOP_BOTH void operator()(std::int64_t warp, int lane, float*) const {
    const std::int64_t i = warp * kWarp + lane;
    const bool erases = i < runs.n && runs.slots[i] != kNoRow && runs.begins(i);
    if (erases) {
      *digest_at(store, runs.slots[i]) = 0;
      found[runs.positions[i]] = 1;
    }
    const int count = cuda::count_bits(cuda::ballot(erases));
    if (lane == 0 && count > 0) cuda::add_global(size, ~std::uint64_t{0} * static_cast<std::uint64_t>(count));
  }
};

// State and last use of rows that come back as they were exported; the last of repeated keys.
struct RestoreRuns {
  static constexpr std::int64_t kScratch = 0;
  Store store;
  Shape shape;
  Runs runs;
  Matrix state;                // none: stays
  const std::uint32_t* times;  // (n,), or null
  std::int64_t warps() const { return runs.n; }
  HOTLOOP_BOTH void operator()(std::int64_t i, int lane, float*) const {
    const std::uint32_t slot = runs.slots[i];
    if (slot == kNoRow || (i + 1 < runs.n && runs.slots[i + 1] == slot)) return;
    const std::int64_t position = runs.positions[i];
    if (state.data != nullptr) {
      const int access = shape.state % 16 == 0 ? state.access : state.access < 4 ? 2 : 4;
      copy_row(row_at(store, shape, slot) + shape.state, state.row(position), shape.states * 4, access, lane, kWarp);
    }
    if (lane == 0 && times != nullptr && store.times != nullptr) store.times[slot] = times[position];
  }
};

// Of a table that keeps the number of the last call, or nothing: a use needs no order.
struct TouchEach {
  Store store;
  Shape shape;
  Stamp stamp;
  const std::uint32_t* rows;
  HOTLOOP_BOTH void each(std::int64_t i) const {
    if (rows[i] != kNoRow) touch(store, shape, stamp, rows[i], 1, true);
  }
};

}  // namespace hotloop::table::gpu
