// SPDX-License-Identifier: Apache-2.0
// What a block does to a piece of the tokens of a router, and how pieces are merged.
//
// Forward: a warp per token. Of up to 512 experts its row is read once, 16 bytes at a time, into registers, where it
// stays; wider rows, and float64, are in shared memory, and a block is then one warp. Largest logit, exponentials and
// their sum are trees over the warp. The best expert of every lane is known; k times the best of these is taken, the
// lower index of equal ones, and its lane alone looks for its next. Scores are added lane by lane, without an exchange,
// over the tokens of a warp, and over the warps of a block in order; choices are counted by integer atomics in shared
// memory. A block leaves both in device memory.
//
// Pieces are cut at multiples of a number of tokens that depends on the shape, and at the ends of sequences. A second
// launch merges them in order, in double, and makes of the counts where the rows of a piece begin; a third moves slots.
// So the same logits give the same bits on every device, and nothing waits for the host.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "core/dtype.hpp"
#include "core/vmath.hpp"
#include "kernels/moe/blocks.cuh"
#include "kernels/moe/pieces.cuh"
#include "moe/route.hpp"

namespace hotloop::moe::gpu {

template <class Storage, int kVector>
struct alignas(sizeof(Storage) * kVector) Pack {
  Storage of[kVector];
};

// What pieces leave.
struct Parts {
  std::int64_t* counts;  // (pieces, experts); with an order, then the slots of an expert before the piece
  void* sums;            // (pieces, experts) of R
  std::int64_t* tokens;  // (pieces,)
};

// Numbers that rise with x, and are the same for equal x: NaN is 1, below all others; 0 is left for what is taken.
HOTLOOP_INLINE std::uint32_t rising(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x + 0.0f);
  return x != x ? 1u : (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
HOTLOOP_INLINE std::uint64_t rising(double x) {
  constexpr std::uint64_t kSign = std::uint64_t{1} << 63;
  const std::uint64_t bits = std::bit_cast<std::uint64_t>(x + 0.0);
  return x != x ? 1u : (bits & kSign) != 0 ? ~bits : bits | kSign;
}

// A number for every expert, those of a lane in its registers, or all in memory (kEach 0).
template <class R, int kEach, int kVector>
struct Cells {
  R own[kEach > 0 ? kEach : 1];
  R* memory;

  HOTLOOP_INLINE R& at([[maybe_unused]] int j, [[maybe_unused]] int expert) {
    if constexpr (kEach > 0) {
      return own[j];
    } else {
      return memory[expert];
    }
  }
  // f(j, expert) for the experts of a lane, rising.
  template <class F>
  static HOTLOOP_INLINE void each(int lane, int experts, F&& f) {
    if constexpr (kEach > 0) {
      HOTLOOP_UNROLL
      for (int j = 0; j < kEach; ++j) {
        const int expert = j / kVector * (kWarp * kVector) + lane * kVector + j % kVector;
        if (expert < experts) f(j, expert);
      }
    } else {
      for (int expert = lane; expert < experts; expert += kWarp) f(0, expert);
    }
  }
};

// kEach: numbers of a lane in registers; 0: of any count of experts, in shared memory.
template <class Storage, int kEach>
struct RouteTokens {
  using R = typename Accumulate<Storage>::type;
  using Key = std::conditional_t<sizeof(R) == 4, std::uint32_t, std::uint64_t>;
  static constexpr int kWarps = kEach > 0 ? 8 : 1;
  static constexpr int kMostThreads = kWarps * kWarp;
  static constexpr int kVector = kEach > 0 ? (kEach < 16 / static_cast<int>(sizeof(Storage))
                                                  ? kEach
                                                  : 16 / static_cast<int>(sizeof(Storage)))
                                           : 1;
  using Row = Cells<R, kEach, kVector>;
  RouteCall call;
  Pieces pieces;
  Parts parts;
  bool packed;  // rows begin at multiples of what is read at once

  HOTLOOP_INLINE std::int64_t blocks() const { return pieces.count(); }
  HOTLOOP_INLINE int threads() const { return kMostThreads; }
  HOTLOOP_BOTH std::int64_t shared_bytes() const {
    Arrays arrays(nullptr);
    static_cast<void>(Shared(arrays, *this));
    return arrays.bytes();
  }

  struct Shared {
    R* sums;  // of the block
    R *row, *ranked, *worth;
    std::uint32_t *counts, *tokens;
    std::uint8_t* open;
    HOTLOOP_BOTH Shared(Arrays& arrays, const RouteTokens& body) {
      const std::int64_t experts = body.call.logits.experts;
      const std::int64_t groups = body.closes() ? body.call.selection.groups : 0;
      sums = arrays.take<R>(experts);
      counts = arrays.take<std::uint32_t>(experts);
      tokens = arrays.take<std::uint32_t>(1);
      row = arrays.take<R>(kEach > 0 ? 0 : experts);
      ranked = kEach > 0 ? arrays.take<R>(groups > 0 ? kWarps * experts : 0) : row;
      worth = arrays.take<R>(kWarps * groups);
      open = arrays.take<std::uint8_t>(kWarps * groups);
    }
  };

  HOTLOOP_INLINE bool closes() const { return call.selection.open_groups < call.selection.groups; }

  HOTLOOP_BOTH void operator()(std::int64_t piece, int thread, void* memory) const {
    std::int64_t begin, end;
    pieces.at(piece, begin, end);
    if (begin >= end) return;
    Arrays arrays(memory);
    Shared shared(arrays, *this);
    const auto experts = static_cast<int>(call.logits.experts);
    const int warp = thread / kWarp, lane = thread % kWarp;
    for (int e = thread; e < experts; e += kMostThreads) {
      shared.counts[e] = 0;
      shared.sums[e] = R(0);
    }
    if (thread == 0) *shared.tokens = 0;
    cuda::block_barrier();
    if constexpr (kEach > 0) {
      shared.ranked += warp * experts;
      shared.worth += warp * call.selection.groups;
      shared.open += warp * call.selection.groups;
    }
    Row sums;  // of the lane's experts
    sums.memory = shared.sums;
    if constexpr (kEach > 0) {
      HOTLOOP_UNROLL
      for (int j = 0; j < kEach; ++j) sums.own[j] = R(0);
    }
    std::uint32_t counted = 0;
    for (std::int64_t t = begin + warp; t < end; t += kWarps) {
      if (call.logits.mask != nullptr && call.logits.mask[t] == 0) {
        leave_out(t, lane);
      } else {
        token(t, lane, shared, sums);
        ++counted;
      }
    }
    if (lane == 0) cuda::add_shared(shared.tokens, counted);
    if constexpr (kEach > 0) {
      for (int w = 0; w < kWarps; ++w) {
        if (w == warp) {
          Row::each(lane, experts, [&](int j, int e) { shared.sums[e] += sums.own[j]; });
        }
        cuda::block_barrier();
      }
    } else {
      cuda::block_barrier();
    }
    R* const left = static_cast<R*>(parts.sums) + piece * experts;
    for (int e = thread; e < experts; e += kMostThreads) {
      parts.counts[piece * experts + e] = static_cast<std::int64_t>(shared.counts[e]);
      left[e] = shared.sums[e];
    }
    if (thread == 0) parts.tokens[piece] = static_cast<std::int64_t>(*shared.tokens);
  }

 private:
  HOTLOOP_INLINE const Storage* row_of(std::int64_t t) const {
    return static_cast<const Storage*>(call.logits.data) + t * call.logits.row_stride;
  }

  HOTLOOP_BOTH void leave_out(std::int64_t t, int lane) const {
    const std::int64_t k = call.selection.top_k;
    for (std::int64_t i = lane; i < k; i += kWarp) {
      call.ids[t * k + i] = -1;
      static_cast<R*>(call.weights)[t * k + i] = R(0);
    }
    if (lane == 0) static_cast<R*>(call.logsumexp)[t] = R(0);
  }

  HOTLOOP_BOTH void read(const Storage* row, int lane, Row& x) const {
    const auto experts = static_cast<int>(call.logits.experts);
    if constexpr (kVector > 1) {
      HOTLOOP_UNROLL
      for (int j = 0; j < kEach; j += kVector) {
        const int first = j * kWarp + lane * kVector;
        if (packed && first + kVector <= experts) {
          const auto pack = cuda::read_global(reinterpret_cast<const Pack<Storage, kVector>*>(row + first));
          HOTLOOP_UNROLL
          for (int i = 0; i < kVector; ++i) x.own[j + i] = to_float(pack.of[i]);
        } else {
          HOTLOOP_UNROLL
          for (int i = 0; i < kVector; ++i) x.own[j + i] = first + i < experts ? to_float(row[first + i]) : -kInf<R>;
        }
      }
    } else {
      Row::each(lane, experts, [&](int j, int e) { x.at(j, e) = to_float(row[e]); });
    }
  }

  HOTLOOP_BOTH void token(std::int64_t t, int lane, const Shared& shared, Row& sums) const {
    const Selection& s = call.selection;
    const auto experts = static_cast<int>(call.logits.experts);
    const Storage* const row = row_of(t);
    const R* const bias = static_cast<const R*>(call.bias);
    Row x;
    x.memory = shared.row;
    read(row, lane, x);
    R most = -kInf<R>;
    Row::each(lane, experts, [&](int j, int e) { most = x.at(j, e) > most ? x.at(j, e) : most; });
    most = cuda::most_of_warp(most);
    R sum = R(0), total = R(0);
    Row::each(lane, experts, [&](int j, int e) {
      sum += vexp_weight(x.at(j, e) - most);
      if (s.sigmoid) total += vsigmoid(x.at(j, e));
    });
    sum = cuda::sum_of_warp(sum);
    total = s.sigmoid ? cuda::sum_of_warp(total) + kTiny<R> : sum;
    if (lane == 0) static_cast<R*>(call.logsumexp)[t] = most + vlog(sum);
    const R inverse = R(1) / total, unit = s.sigmoid ? R(1) : inverse;
    // Experts are compared by logits where these have the order of the scores.
    const bool by_logits = s.late || (bias == nullptr && (s.groups == 1 || s.group_max));
    Row::each(lane, experts, [&](int j, int e) {
      R& v = x.at(j, e);
      const R score = s.sigmoid ? vsigmoid(v) : vexp_weight(v - most);
      sums.at(j, e) += score * inverse;
      if (!by_logits) v = score * unit;
      if (bias != nullptr) v += bias[e];
    });
    if (closes()) open_groups(lane, shared, x);
    // From here on the cells are keys.
    const int size = experts / static_cast<int>(s.groups);
    Key best = 0;
    std::uint32_t place = 0;  // ~expert, so that the lower one is larger
    Row::each(lane, experts, [&](int j, int e) {
      const bool can = !closes() || shared.open[e / size] != 0;
      const Key key = can ? rising(x.at(j, e)) : Key(0);
      x.at(j, e) = std::bit_cast<R>(key);
      if (key > best) {
        best = key;
        place = ~static_cast<std::uint32_t>(e);
      }
    });
    std::int32_t id[kRounds];
    HOTLOOP_UNROLL
    for (int round = 0; round < kRounds; ++round) {
      id[round] = 0;
      for (int i = 0; i < kWarp && round * kWarp + i < s.top_k; ++i) {
        const Key top = cuda::most_of_warp(best);
        const std::uint32_t won = cuda::most_of_warp(best == top ? place : 0u);
        if (lane == i) id[round] = static_cast<std::int32_t>(~won);
        if (best != top || place != won) continue;
        best = 0;
        place = 0;
        Row::each(lane, experts, [&](int j, int e) {
          R& cell = x.at(j, e);
          if (static_cast<std::uint32_t>(e) == ~won) cell = std::bit_cast<R>(Key(0));
          const Key key = std::bit_cast<Key>(cell);
          if (key > best) {
            best = key;
            place = ~static_cast<std::uint32_t>(e);
          }
        });
      }
    }
    write(t, lane, row, most, unit, id, shared.counts);
  }

  // Which groups may be chosen from: `shared.open`.
  HOTLOOP_BOTH void open_groups(int lane, const Shared& shared, Row& x) const {
    const Selection& s = call.selection;
    const auto experts = static_cast<int>(call.logits.experts), groups = static_cast<int>(s.groups),
               size = experts / groups;
    if constexpr (kEach > 0) {
      Row::each(lane, experts, [&](int j, int e) { shared.ranked[e] = x.at(j, e); });
    }
    cuda::warp_barrier();
    // Several lanes to a group where groups are few.
    int lanes = kWarp;
    while (lanes > 1 && lanes * groups > kWarp) lanes /= 2;
    for (int first = 0; first < groups; first += kWarp / lanes) {
      const int g = first + lane / lanes;
      R one = -kInf<R>, two = -kInf<R>;
      for (int i = lane % lanes; i < size && g < groups; i += lanes) {
        take(shared.ranked[g * size + (i + g) % size], one, two);  // rotated: other banks
      }
      for (int distance = 1; distance < lanes; distance *= 2) {
        const R theirs = cuda::shuffle_xor(one, distance), next = cuda::shuffle_xor(two, distance);
        take(theirs, one, two);
        two = next > two ? next : two;
      }
      if (lane % lanes == 0 && g < groups) shared.worth[g] = s.group_max || size == 1 ? one : one + two;
    }
    cuda::warp_barrier();
    for (int g = lane; g < groups; g += kWarp) {
      int better = 0;
      for (int h = 0; h < groups; ++h) {
        better += shared.worth[h] > shared.worth[g] || (h < g && shared.worth[h] == shared.worth[g]) ? 1 : 0;
      }
      shared.open[g] = better < s.open_groups ? 1 : 0;
    }
    cuda::warp_barrier();
  }
  // Of the numbers taken so far, `one` is the largest and `two` the next.
  static HOTLOOP_INLINE void take(R v, R& one, R& two) {
    const R low = v < one ? v : one;
    two = low > two ? low : two;
    one = v > one ? v : one;
  }

  HOTLOOP_BOTH void write(std::int64_t t, int lane, const Storage* row, R most, R unit, const std::int32_t* id,
                          std::uint32_t* counts) const {
    const Selection& s = call.selection;
    const auto k = static_cast<int>(s.top_k);
    R x[kRounds], score[kRounds];
    R top = -kInf<R>, total = R(0);
    HOTLOOP_UNROLL
    for (int r = 0; r < kRounds; ++r) {
      x[r] = r * kWarp + lane < k ? static_cast<R>(to_float(row[id[r]])) : -kInf<R>;
      top = x[r] > top ? x[r] : top;
    }
    if (s.late) {  // against the largest of all, the chosen ones may all vanish
      top = cuda::most_of_warp(top);
      unit = R(1);
    }
    HOTLOOP_UNROLL
    for (int r = 0; r < kRounds; ++r) {
      const R gap = x[r] - (s.late ? top : most);
      score[r] = s.sigmoid ? vsigmoid(x[r]) : vexp_weight(s.late && gap != gap ? R(0) : gap);
      if (r * kWarp + lane < k) total += score[r];
    }
    R scale = static_cast<R>(s.scale);
    if (s.renormalize) {
      scale /= cuda::sum_of_warp(total) + kTiny<R> / unit;
    } else {
      scale *= unit;
    }
    HOTLOOP_UNROLL
    for (int r = 0; r < kRounds; ++r) {
      const int i = r * kWarp + lane;
      if (i >= k) continue;
      call.ids[t * k + i] = id[r];
      static_cast<R*>(call.weights)[t * k + i] = score[r] * scale;
      cuda::add_shared(counts + id[r], 1u);
    }
  }
};

// A block per sequence and 32 experts, a warp per run of its pieces.
template <class R>
struct MergePieces {
  static constexpr int kWarps = 16;
  static constexpr int kMostThreads = kWarps * kWarp;
  RouteCall call;
  Pieces pieces;
  Parts parts;

  HOTLOOP_INLINE std::int64_t strips() const { return (call.logits.experts + kWarp - 1) / kWarp; }
  HOTLOOP_INLINE std::int64_t blocks() const { return pieces.sequences * strips(); }
  HOTLOOP_INLINE int threads() const { return kMostThreads; }
  HOTLOOP_INLINE std::int64_t shared_bytes() const { return kMostThreads * 16; }

  HOTLOOP_BOTH void operator()(std::int64_t block, int thread, void* memory) const {
    Arrays arrays(memory);
    auto* const sums = arrays.take<double>(kMostThreads);
    auto* const counts = arrays.take<std::int64_t>(kMostThreads);
    const int warp = thread / kWarp, lane = thread % kWarp;
    const std::int64_t experts = call.logits.experts, s = block / strips(), strip = block % strips();
    const std::int64_t e = strip * kWarp + lane, n = pieces.count_of(s);
    const std::int64_t first = n * warp / kWarps, last = n * (warp + 1) / kWarps;
    double sum = 0.0;
    std::int64_t count = 0;
    if (e < experts) {
      for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t at = pieces.of_sequence(s, i) * experts + e;
        sum += static_cast<double>(static_cast<const R*>(parts.sums)[at]);
        count += parts.counts[at];
      }
    }
    sums[thread] = sum;
    counts[thread] = count;
    cuda::block_barrier();
    std::int64_t before = 0;
    for (int w = 0; w < warp; ++w) before += counts[w * kWarp + lane];
    if (warp == kWarps - 1 && e < experts) {
      double all = 0.0;
      for (int w = 0; w < kWarps; ++w) all += sums[w * kWarp + lane];
      static_cast<R*>(call.prob_sums)[s * experts + e] = static_cast<R>(all);
      call.counts[s * experts + e] = before + count;
    }
    if (call.ordered && e < experts) {
      for (std::int64_t i = first; i < last; ++i) {
        std::int64_t& part = parts.counts[pieces.of_sequence(s, i) * experts + e];
        const std::int64_t mine = part;
        part = before;
        before += mine;
      }
    }
    if (strip != 0 || warp != 0) return;
    std::uint64_t tokens = 0;
    for (std::int64_t i = lane; i < n; i += kWarp) {
      tokens += static_cast<std::uint64_t>(parts.tokens[pieces.of_sequence(s, i)]);
    }
    tokens = cuda::sum_of_warp(tokens);
    if (lane == 0) call.num_tokens[s] = static_cast<std::int64_t>(tokens);
  }
};

// Sum of x over the lanes before this one, and over all.
HOTLOOP_BOTH inline std::int64_t before_in_warp(std::int64_t x, int lane, std::int64_t& all) {
  std::uint64_t up_to = static_cast<std::uint64_t>(x);
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const std::uint64_t below = cuda::shuffle_up(up_to, distance);
    up_to += lane >= distance ? below : 0;
  }
  all = static_cast<std::int64_t>(cuda::shuffle(up_to, kWarp - 1));
  return static_cast<std::int64_t>(up_to) - x;
}

// Moves the slots of a piece, a warp each, 32 slots at a time; of one sequence.
struct OrderSlots {
  static constexpr int kMostThreads = kWarp;
  RouteCall call;
  Pieces pieces;
  Parts parts;

  HOTLOOP_INLINE std::int64_t blocks() const { return pieces.count(); }
  HOTLOOP_INLINE int threads() const { return kWarp; }
  HOTLOOP_INLINE std::int64_t shared_bytes() const { return call.logits.experts * 8; }

  HOTLOOP_BOTH void operator()(std::int64_t piece, int lane, void* memory) const {
    auto* const next = static_cast<std::int64_t*>(memory);  // row of the next slot of every expert
    const std::int64_t experts = call.logits.experts, k = call.selection.top_k;
    const std::int64_t first = piece * pieces.size, limit = first + pieces.size;
    const std::int64_t begin = first * k, end = (limit < pieces.tokens ? limit : pieces.tokens) * k;
    std::int64_t rows = 0;
    for (std::int64_t strip = 0; strip < experts; strip += kWarp) {
      const std::int64_t e = strip + lane;
      std::int64_t all;
      const std::int64_t count = e < experts ? call.counts[e] : 0;
      const std::int64_t offset = rows + before_in_warp(count, lane, all);
      rows += all;
      if (e >= experts) continue;
      if (begin < end) next[e] = offset + parts.counts[piece * experts + e];
      if (piece == 0) call.expert_offsets[e] = offset;
    }
    if (piece == 0 && lane == 0) call.expert_offsets[experts] = rows;
    cuda::warp_barrier();
    int bits = 1;
    while (experts >> bits > 0) ++bits;
    for (std::int64_t i = begin; i < end; i += kWarp) {
      const std::int64_t slot = i + lane;
      if (slot < end && slot >= rows) call.slot_of_row[slot] = -1;  // a row behind the last
      const std::int64_t id = slot < end ? call.ids[slot] : -1;
      const std::uint32_t equal = cuda::equal_in_warp(static_cast<std::uint32_t>(id < 0 ? experts : id), bits);
      const std::uint32_t below = equal & ((1u << lane) - 1u);
      std::int64_t row = -1;
      if (id >= 0) {
        row = next[id] + cuda::count_bits(below);
        call.slot_of_row[row] = slot;
      }
      if (slot < end) call.row_of_slot[slot] = row;
      cuda::warp_barrier();
      if (id >= 0 && below == 0) next[id] += cuda::count_bits(equal);
      cuda::warp_barrier();
    }
  }
};

inline Parts parts_of(const RouteCall& call, Arrays& arrays) {
  const std::int64_t pieces = pieces_of(call.logits).count(), cells = pieces * call.logits.experts;
  Parts parts;
  parts.counts = arrays.take<std::int64_t>(cells);
  parts.sums = call.logits.dtype == Dtype::kFloat64 ? static_cast<void*>(arrays.take<double>(cells))
                                                    : static_cast<void*>(arrays.take<float>(cells));
  parts.tokens = arrays.take<std::int64_t>(pieces);
  return parts;
}

template <class Storage, int kEach, class Run>
void route_tokens(const RouteCall& call, const Pieces& pieces, const Parts& parts, Run&& run) {
  using Body = RouteTokens<Storage, kEach>;
  constexpr auto kSize = static_cast<std::uintptr_t>(sizeof(Storage));
  const auto apart = static_cast<std::uintptr_t>(call.logits.row_stride) * kSize;
  const bool packed = (reinterpret_cast<std::uintptr_t>(call.logits.data) | apart) % (kSize * Body::kVector) == 0;
  run(Body{call, pieces, parts, packed});
}

// Calls run(body) for each launch, in order.
template <class Run>
void route(const RouteCall& call, void* workspace, Run&& run) {
  Arrays arrays(workspace);
  const Pieces pieces = pieces_of(call.logits);
  const Parts parts = parts_of(call, arrays);
  const std::int64_t experts = call.logits.experts;
  with_float(call.logits.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if constexpr (!std::is_same_v<Storage, double>) {
      if (experts <= 4 * kWarp) return route_tokens<Storage, 4>(call, pieces, parts, run);
      if (experts <= 8 * kWarp) return route_tokens<Storage, 8>(call, pieces, parts, run);
      if (experts <= 16 * kWarp) return route_tokens<Storage, 16>(call, pieces, parts, run);
    }
    route_tokens<Storage, 0>(call, pieces, parts, run);
  });
  if (call.logits.dtype == Dtype::kFloat64) {
    run(MergePieces<double>{call, pieces, parts});
  } else {
    run(MergePieces<float>{call, pieces, parts});
  }
  if (call.ordered) run(OrderSlots{call, pieces, parts});
}

}  // namespace hotloop::moe::gpu
