// SPDX-License-Identifier: Apache-2.0
// What a warp does to segments. A body says how many warps it wants, and runs for each: on a device by warps_kernel
// (segments.cu), in tests on the emulated GPU.
//
// Reduction, in two launches. First a warp per segment reads it up to the end of the tile of positions in which it
// begins, and a warp per tile reads what goes on into it from before; a segment inside a tile is finished, other warps
// leave parts. Then a warp per tile merges, in order, the parts of the segment that begins in it and goes on. Rows of
// up to eight columns are read along the segment, a lane taking every 32nd row of one column; wider ones with a lane
// per column. Where a segment is cut depends on the shape alone, and lanes are merged as a tree, so results are the
// same on every device.
//
// Sort, in three launches per digit of 8 bits: a warp per tile of keys counts digits; a warp per digit sums the counts
// over tiles; a warp per tile moves 32 keys at a time, each by the number of equal digits below it in the warp.
#pragma once

#include <cstdint>
#include <limits>

#include "core/bisect.hpp"
#include "core/segment_parts.hpp"
#include "core/vmath.hpp"
#include "kernels/core/segments_cuda.hpp"
#include "kernels/core/threads.cuh"

namespace hotloop::segments::gpu {

using cuda::kWarp;

inline constexpr std::int64_t kAlongColumns = 8;
inline constexpr int kDigits = 1 << kCudaDigitBits;

// The segment of a position: the last that begins there or before, so not one without rows.
HOTLOOP_INLINE std::int64_t segment_at(const Groups& g, std::int64_t position) {
  return first_where(g.count, [&](std::int64_t s) { return g.offsets[s] > position; }) - 1;
}

template <Reduction kReduction, class Storage>
struct Reducer {
  using R = typename Accumulate<Storage>::type;
  ReduceCall call;

  HOTLOOP_INLINE bool along() const { return call.values.columns <= kAlongColumns || call.values.column_stride != 1; }
  // Groups of columns, each read by a warp of its own.
  HOTLOOP_INLINE std::int64_t groups() const {
    return along() ? call.values.columns : (call.values.columns + kWarp - 1) / kWarp;
  }

  HOTLOOP_BOTH void add(Part& part, double x, std::int64_t row) const {
    if constexpr (kReduction == Reduction::kSum) {
      merge<kReduction>(part, {x, 1.0, -1});
    } else if constexpr (kReduction == Reduction::kLogSumExp) {
      constexpr double kInfinity = std::numeric_limits<double>::infinity();
      if (x == -kInfinity) return;
      if (x <= part.value && x != kInfinity) {
        part.weight += static_cast<double>(vexp_weight(static_cast<R>(x) - static_cast<R>(part.value)));
      } else {
        merge<kReduction>(part, {x, 1.0, -1});
      }
    } else {
      merge<kReduction>(part, {x, 1.0, row});
    }
  }

  // Positions [begin, end) of group of columns `group`; the lane's column is in `column`, past the last if it has none.
  HOTLOOP_BOTH Part read(std::int64_t begin, std::int64_t end, std::int64_t group, int lane,
                         std::int64_t& column) const {
    const Values& v = call.values;
    const bool lanes_are_rows = along();
    column = lanes_are_rows ? group : group * kWarp + lane;
    Part part = nothing<kReduction>();
    if (column < v.columns) {
      const Storage* x = static_cast<const Storage*>(v.data) + column * v.column_stride;
      for (std::int64_t i = begin + (lanes_are_rows ? lane : 0); i < end; i += lanes_are_rows ? kWarp : 1) {
        const std::int64_t row = call.order != nullptr ? call.order[i] : i;
        if (call.groups.mask != nullptr && call.groups.mask[row] == 0) continue;
        add(part, static_cast<double>(value_of<kReduction>(x[row * v.row_stride])), row);
      }
    }
    for (int distance = kWarp / 2; lanes_are_rows && distance > 0; distance /= 2) {
      const Part more{cuda::shuffle_xor(part.value, distance), cuda::shuffle_xor(part.weight, distance),
                      static_cast<std::int64_t>(cuda::shuffle_xor(static_cast<std::uint64_t>(part.at), distance))};
      merge<kReduction>(part, more);
    }
    if (lanes_are_rows && lane != 0) column = v.columns;
    return part;
  }

  HOTLOOP_BOTH void finish(std::int64_t s, std::int64_t column, const Part& part) const {
    const std::int64_t at = s * call.values.columns + column;
    const double result = result_of<kReduction>(part, call.reduction == Reduction::kMean, part.weight);
    static_cast<R*>(call.out)[at] = static_cast<R>(result);
    if (call.rows != nullptr) call.rows[at] = part.at;
    if (call.counts != nullptr && column == 0) call.counts[s] = static_cast<std::int64_t>(part.weight);
  }
};

template <Reduction kReduction, class Storage>
struct ReducePieces : Reducer<kReduction, Storage> {
  static constexpr int kScratch = 0;
  HOTLOOP_INLINE std::int64_t warps() const {
    return (this->call.groups.count + cuda_tiles(this->call.values.n, kCudaTile)) * this->groups();
  }
  HOTLOOP_BOTH void operator()(std::int64_t warp, int lane, std::uint64_t*) const {
    const ReduceCall& call = this->call;
    const Groups& g = call.groups;
    const std::int64_t item = warp / this->groups(), group = warp % this->groups();
    std::int64_t begin, end, limit, s = item, part = 0;
    if (item < g.count) {  // the segment, as far as its first tile goes
      begin = g.offsets[s];
      end = g.offsets[s + 1];
      limit = (begin / kCudaTile + 1) * kCudaTile;
      part = 2 * (begin / kCudaTile) + 1;
    } else {  // what goes on into the tile
      const std::int64_t tile = item - g.count;
      begin = tile * kCudaTile;
      s = segment_at(g, begin);
      if (g.offsets[s] == begin) return;
      end = g.offsets[s + 1];
      limit = begin + kCudaTile;
      part = 2 * tile;
    }
    const bool whole = item < g.count && end <= limit;
    std::int64_t column;
    const Part found = this->read(begin, end < limit ? end : limit, group, lane, column);
    if (column >= call.values.columns) return;
    if (whole) {
      this->finish(s, column, found);
    } else {
      call.parts[part * call.values.columns + column] = found;
    }
  }
};

template <Reduction kReduction, class Storage>
struct ReduceSpans : Reducer<kReduction, Storage> {
  static constexpr int kScratch = 0;
  HOTLOOP_INLINE std::int64_t groups() const { return (this->call.values.columns + kWarp - 1) / kWarp; }
  HOTLOOP_INLINE std::int64_t warps() const { return cuda_tiles(this->call.values.n, kCudaTile) * groups(); }
  HOTLOOP_BOTH void operator()(std::int64_t warp, int lane, std::uint64_t*) const {
    const ReduceCall& call = this->call;
    const Groups& g = call.groups;
    const std::int64_t tile = warp / groups(), column = warp % groups() * kWarp + lane;
    const std::int64_t next = (tile + 1) * kCudaTile, columns = call.values.columns;
    if (next >= call.values.n || column >= columns) return;
    const std::int64_t s = segment_at(g, next);
    if (g.offsets[s] == next || g.offsets[s] < tile * kCudaTile) return;
    Part whole = call.parts[(2 * tile + 1) * columns + column];
    for (std::int64_t t = tile + 1; t * kCudaTile < g.offsets[s + 1]; ++t) {
      merge<kReduction>(whole, call.parts[2 * t * columns + column]);
    }
    this->finish(s, column, whole);
  }
};

// A lane per element of the gradient.
template <class Storage>
struct Spread {
  using R = typename Accumulate<Storage>::type;
  static constexpr int kScratch = 0;
  SpreadCall call;
  HOTLOOP_INLINE std::int64_t elements() const { return call.values.n * call.values.columns; }
  HOTLOOP_INLINE std::int64_t warps() const { return (elements() + kWarp - 1) / kWarp; }
  HOTLOOP_BOTH void operator()(std::int64_t warp, int lane, std::uint64_t*) const {
    const Values& v = call.values;
    const std::int64_t element = warp * kWarp + lane;
    if (element >= elements()) return;
    const std::int64_t row = element / v.columns, column = element % v.columns;
    Storage& out = static_cast<Storage*>(call.result)[element];
    if (call.groups.mask != nullptr && call.groups.mask[row] == 0) return put(out, R(0));
    const std::int64_t s = owner(row), at = s * v.columns + column;
    R slope = static_cast<const R*>(call.grad)[at];
    if (call.reduction == Reduction::kMean) slope /= static_cast<R>(call.counts[s]);
    if (call.rows != nullptr && call.rows[at] != row) slope = R(0);
    if (call.reduction == Reduction::kLogSumExp) {
      const Storage x = static_cast<const Storage*>(v.data)[row * v.row_stride + column * v.column_stride];
      slope *= vexp_weight(shifted<R>(to_float(x), static_cast<const R*>(call.out)[at]));
    }
    put(out, slope);
  }

 private:
  HOTLOOP_BOTH std::int64_t owner(std::int64_t row) const {
    const Groups& g = call.groups;
    if (g.ids == nullptr) return segment_at(g, row);
    if (g.ids_dtype == Dtype::kInt32) return static_cast<const std::int32_t*>(g.ids)[row];
    return static_cast<const std::int64_t*>(g.ids)[row];
  }
};

// One pass of a sort, over bits [shift, shift + 8) of the keys.
template <class Key>
struct Pass {
  const Key* keys;
  std::int64_t n;
  int shift;
  const std::int64_t* from;  // (n,): the order so far; nullptr: 0 to n - 1
  std::int64_t* to;
  std::int64_t* starts;  // (256, tiles), then (256,) totals

  HOTLOOP_INLINE std::int64_t tiles() const { return cuda_tiles(n, kCudaSortTile); }
  HOTLOOP_INLINE std::int64_t* totals() const { return starts + kDigits * tiles(); }
  HOTLOOP_INLINE std::int64_t position(std::int64_t i) const { return from != nullptr ? from[i] : i; }
  HOTLOOP_INLINE int digit(std::int64_t position) const {
    return static_cast<int>(static_cast<std::uint64_t>(keys[position]) >> shift & (kDigits - 1));
  }
};

template <class Key>
struct CountDigits : Pass<Key> {
  static constexpr int kScratch = kDigits;
  HOTLOOP_INLINE std::int64_t warps() const { return this->tiles(); }
  HOTLOOP_BOTH void operator()(std::int64_t tile, int lane, std::uint64_t* scratch) const {
    auto* counts = reinterpret_cast<std::uint32_t*>(scratch);
    for (int d = lane; d < kDigits; d += kWarp) counts[d] = 0;
    cuda::warp_barrier();
    const std::int64_t begin = tile * kCudaSortTile, limit = begin + kCudaSortTile;
    for (std::int64_t i = begin + lane; i < (limit < this->n ? limit : this->n); i += kWarp) {
      cuda::add_shared(counts + this->digit(this->position(i)), 1u);
    }
    cuda::warp_barrier();
    for (int d = lane; d < kDigits; d += kWarp) this->starts[d * this->tiles() + tile] = counts[d];
    cuda::warp_barrier();  // the next tile of this warp clears them
  }
};

template <class Key>
struct SumDigits : Pass<Key> {
  static constexpr int kScratch = 0;
  HOTLOOP_INLINE std::int64_t warps() const { return kDigits; }
  HOTLOOP_BOTH void operator()(std::int64_t d, int lane, std::uint64_t*) const {
    std::int64_t* counts = this->starts + d * this->tiles();
    std::uint64_t sum = 0;
    for (std::int64_t first = 0; first < this->tiles(); first += kWarp) {
      const bool inside = first + lane < this->tiles();
      const std::uint64_t mine = inside ? static_cast<std::uint64_t>(counts[first + lane]) : 0;
      std::uint64_t up_to = mine;
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const std::uint64_t below = cuda::shuffle_up(up_to, distance);
        up_to += lane >= distance ? below : 0;
      }
      if (inside) counts[first + lane] = static_cast<std::int64_t>(sum + up_to - mine);
      sum += cuda::shuffle(up_to, kWarp - 1);
    }
    if (lane == 0) this->totals()[d] = static_cast<std::int64_t>(sum);
  }
};

template <class Key>
struct MoveKeys : Pass<Key> {
  static constexpr int kScratch = kDigits;
  HOTLOOP_INLINE std::int64_t warps() const { return this->tiles(); }
  HOTLOOP_BOTH void operator()(std::int64_t tile, int lane, std::uint64_t* place) const {
    constexpr int kEach = kDigits / kWarp;
    std::uint64_t own = 0;
    for (int k = 0; k < kEach; ++k) own += static_cast<std::uint64_t>(this->totals()[lane * kEach + k]);
    std::uint64_t up_to = own;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const std::uint64_t below = cuda::shuffle_up(up_to, distance);
      up_to += lane >= distance ? below : 0;
    }
    std::uint64_t before = up_to - own;
    for (int k = 0; k < kEach; ++k) {
      const int d = lane * kEach + k;
      place[d] = before + static_cast<std::uint64_t>(this->starts[d * this->tiles() + tile]);
      before += static_cast<std::uint64_t>(this->totals()[d]);
    }
    cuda::warp_barrier();
    const std::int64_t begin = tile * kCudaSortTile;
    for (std::int64_t i = begin; i < begin + kCudaSortTile && i < this->n; i += kWarp) {
      const bool inside = i + lane < this->n;
      const std::int64_t position = inside ? this->position(i + lane) : 0;
      const int d = inside ? this->digit(position) : 0;
      std::uint32_t equal = cuda::ballot(inside);
      for (int bit = 0; bit < kCudaDigitBits; ++bit) {
        const bool set = (d >> bit & 1) != 0;
        const std::uint32_t with = cuda::ballot(set);
        equal &= set ? with : ~with;
      }
      const std::uint32_t below = equal & ((1u << lane) - 1u);
      if (inside) this->to[place[d] + static_cast<std::uint64_t>(cuda::count_bits(below))] = position;
      cuda::warp_barrier();
      if (inside && below == 0) place[d] += static_cast<std::uint64_t>(cuda::count_bits(equal));
      cuda::warp_barrier();
    }
  }
};

// A lane per key.
template <class Key>
struct WriteOffsets {
  static constexpr int kScratch = 0;
  const Key* keys;
  const std::int64_t* order;
  std::int64_t n, num_keys;
  std::int64_t* counts;
  std::int64_t* offsets;
  HOTLOOP_INLINE std::int64_t warps() const { return num_keys / kWarp + 1; }
  HOTLOOP_BOTH void operator()(std::int64_t warp, int lane, std::uint64_t*) const {
    const std::int64_t key = warp * kWarp + lane;
    if (key > num_keys) return;
    const std::int64_t first = first_from(key);
    if (offsets != nullptr) offsets[key] = first;
    if (counts != nullptr && key < num_keys) counts[key] = first_from(key + 1) - first;
  }

 private:
  HOTLOOP_BOTH std::int64_t first_from(std::int64_t key) const {
    return first_where(n, [&](std::int64_t i) { return static_cast<std::int64_t>(keys[order[i]]) >= key; });
  }
};

// Calls run(body) for each launch of a reduction, in order.
template <Reduction kReduction, class Storage, class Run>
void reduce_with(const ReduceCall& call, Run&& run) {
  run(ReducePieces<kReduction, Storage>{{call}});
  run(ReduceSpans<kReduction, Storage>{{call}});
}
template <class Storage, class Run>
void reduce_as(const ReduceCall& call, Run&& run) {
  switch (call.reduction) {
    case Reduction::kMax:
      return reduce_with<Reduction::kMax, Storage>(call, run);
    case Reduction::kMin:
      return reduce_with<Reduction::kMin, Storage>(call, run);
    case Reduction::kLogSumExp:
      return reduce_with<Reduction::kLogSumExp, Storage>(call, run);
    default:
      return reduce_with<Reduction::kSum, Storage>(call, run);
  }
}
template <class Run>
void reduce(const ReduceCall& call, Run&& run) {
  with_float(call.values.dtype, [&](auto storage) { reduce_as<decltype(storage)>(call, run); });
}
template <class Run>
void spread(const SpreadCall& call, Run&& run) {
  with_float(call.values.dtype, [&](auto storage) { run(Spread<decltype(storage)>{call}); });
}

template <class Key, class Run>
void sort(const CudaSortCall& call, const Key* keys, Run&& run) {
  int passes = 1;
  while (passes < 8 && (call.num_keys - 1) >> (passes * kCudaDigitBits) > 0) ++passes;
  const std::int64_t* from = call.from;
  for (int p = 0; p < passes; ++p) {
    std::int64_t* to = (passes - p) % 2 == 1 ? call.order : call.other;  // the last one ends in `order`
    const Pass<Key> pass{keys, call.n, p * kCudaDigitBits, from, to, call.starts};
    run(CountDigits<Key>{pass});
    run(SumDigits<Key>{pass});
    run(MoveKeys<Key>{pass});
    from = to;
  }
  if (call.counts == nullptr && call.offsets == nullptr) return;
  run(WriteOffsets<Key>{keys, call.order, call.n, call.num_keys, call.counts, call.offsets});
}
template <class Run>
void sort(const CudaSortCall& call, Run&& run) {
  with_integer(call.dtype, [&](auto key) { sort(call, static_cast<const decltype(key)*>(call.keys), run); });
}

}  // namespace hotloop::segments::gpu
