// SPDX-License-Identifier: Apache-2.0
// Panels of the products of experts: how operands are packed into them, and the tile in which a panel of rows meets a
// panel of columns, its sums in registers. Included by products.simd.cpp only, behind core/simd_begin.hpp.
namespace {

using namespace hotloop::moe;
using std::int64_t;

#if HOTLOOP_SIMD_LEVEL == 2
constexpr int kVectorBytes = 64;
constexpr int kMostRows = 14;  // with two vectors of columns, 28 of the 32 registers hold sums
#else
constexpr int kVectorBytes = HOTLOOP_SIMD_LEVEL == 1 ? 32 : 16;
constexpr int kMostRows = 6;  // 12 of 16
#endif

template <class R>
struct Lanes {
  static constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(R));
  typedef R Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(R)), may_alias));
  static constexpr int64_t kColumns = 2 * kCount;  // of a tile
};

template <class T>
HOTLOOP_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}
HOTLOOP_INLINE int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// -- tiles --------------------------------------------------------------------------------------------------

// c (rows, kColumns) = start or c, + a b^T over packed panels: a (depth, rows), b (depth, kColumns).
template <class R, int kRows>
void tile(const R* a, const R* b, int64_t depth, R* c, int64_t c_stride, bool add, const R* start) {
  using V = typename Lanes<R>::Vector;
  constexpr int kCount = Lanes<R>::kCount;
  V sum[kRows][2] = {};
  for (int64_t d = 0; d < depth; ++d) {
    const V b0 = *reinterpret_cast<const V*>(b);
    const V b1 = *reinterpret_cast<const V*>(b + kCount);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      sum[i][0] += a[i] * b0;
      sum[i][1] += a[i] * b1;
    }
    a += kRows;
    b += 2 * kCount;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const R* from = add ? c + i * c_stride : start;
      *reinterpret_cast<V*>(c + i * c_stride + v * kCount) = *reinterpret_cast<const V*>(from + v * kCount) + sum[i][v];
    }
  }
}

// Two bfloat16 of neighbouring depths, as they lie in a float of a panel.
struct Pair {
  BFloat16 low, high;
};

#if HOTLOOP_SIMD_LEVEL == 2 && !defined(__clang__)
// Whether this CPU multiplies pairs, twice as many numbers per instruction.
bool has_pairs() {
  static const bool found = __builtin_cpu_supports("avx512bf16") != 0;
  return found;
}

// `tile` over panels of pairs.
template <int kRows>
__attribute__((target("avx512bf16"))) void tile_of_pairs(const float* a, const float* b, int64_t depth, float* c,
                                                         int64_t c_stride, bool add, const float* start) {
  __m512 sum[kRows][2] = {};
  for (int64_t d = 0; d < depth; ++d) {
    const auto b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 16);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto x = (__m512bh)_mm512_set1_ps(a[i]);
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, b0);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, b1);
    }
    a += kRows;
    b += 32;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const float* from = add ? c + i * c_stride : start;
    _mm512_storeu_ps(c + i * c_stride, _mm512_add_ps(_mm512_loadu_ps(from), sum[i][0]));
    _mm512_storeu_ps(c + i * c_stride + 16, _mm512_add_ps(_mm512_loadu_ps(from + 16), sum[i][1]));
  }
}
#else
bool has_pairs() { return false; }
template <int kRows>
void tile_of_pairs(const float*, const float*, int64_t, float*, int64_t, bool, const float*) {}
#endif

template <class R>
using Tile = void (*)(const R*, const R*, int64_t, R*, int64_t, bool, const R*);

template <class R, bool kPairs, int... kRows>
constexpr Tile<R> tile_of(int rows, std::integer_sequence<int, kRows...>) {
  if constexpr (kPairs) {
    constexpr Tile<R> kTiles[] = {&tile_of_pairs<kRows + 1>...};
    return kTiles[rows - 1];
  } else {
    constexpr Tile<R> kTiles[] = {&tile<R, kRows + 1>...};
    return kTiles[rows - 1];
  }
}

// -- packing ------------------------------------------------------------------------------------------------

// Which row of the data row r of a group is.
HOTLOOP_INLINE int64_t row_at(const Operand& o, int64_t r) { return o.slots == nullptr ? r : o.slots[r] / o.choices; }

// v[i][j] becomes v[j][i]: blocks of kStep rows and columns change places, for every power of two.
template <class R, int kStep, std::size_t... kLane>
HOTLOOP_INLINE void swap_blocks(typename Lanes<R>::Vector* v, std::index_sequence<kLane...>) {
  constexpr int kCount = Lanes<R>::kCount;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    if ((i & kStep) != 0) continue;
    const auto a = v[i], b = v[i + kStep];
    v[i] = __builtin_shufflevector(a, b, ((kLane & kStep) != 0 ? kLane + kCount - kStep : kLane)...);
    v[i + kStep] = __builtin_shufflevector(a, b, ((kLane & kStep) != 0 ? kLane + kCount : kLane + kStep)...);
  }
}
template <class R>
HOTLOOP_INLINE void transpose(typename Lanes<R>::Vector* v) {
  constexpr int kCount = Lanes<R>::kCount;
  constexpr auto kLane = std::make_index_sequence<kCount>{};
  swap_blocks<R, 1>(v, kLane);
  if constexpr (kCount > 2) swap_blocks<R, 2>(v, kLane);
  if constexpr (kCount > 4) swap_blocks<R, 4>(v, kLane);
  if constexpr (kCount > 8) swap_blocks<R, 8>(v, kLane);
}

// kCount numbers, widened.
template <class R, class S>
HOTLOOP_INLINE typename Lanes<R>::Vector load(const S* from) {
  using V = typename Lanes<R>::Vector;
  if constexpr (std::is_same_v<S, Pair>) {
    V pairs;
    __builtin_memcpy(&pairs, from, sizeof pairs);
    return pairs;
  } else if constexpr (std::is_same_v<R, S>) {
    return *reinterpret_cast<const V*>(from);
  } else {
    alignas(64) R wide[Lanes<R>::kCount];
#pragma omp simd
    for (int i = 0; i < Lanes<R>::kCount; ++i) wide[i] = to_float(from[i]);
    return *reinterpret_cast<const V*>(wide);
  }
}

// Depths [0, depth) of lanes that lie each in a row of their own, so that they are transposed; returns how many depths
// it did. A store may write behind the width: into what a later one fills, or into the space behind all panels.
template <class R, class S>
int64_t pack_transposed(const S* const* from, int64_t lanes, int64_t depth, int64_t width, R* to) {
  using V = typename Lanes<R>::Vector;
  constexpr int64_t kCount = Lanes<R>::kCount;
  if (width > kCount && width % kCount != 0) return 0;
  int64_t d = 0;
  for (; d + kCount <= depth; d += kCount) {
    for (int64_t l = 0; l < width; l += kCount) {
      V v[kCount];
      for (int64_t i = 0; i < kCount; ++i) v[i] = l + i < lanes ? load<R>(from[l + i] + d) : V{};
      transpose<R>(v);
      for (int64_t i = 0; i < kCount; ++i) *reinterpret_cast<V*>(to + (d + i) * width + l) = v[i];
    }
  }
  return d;
}

constexpr int64_t kMostLanes = 32;  // of a panel

// A panel (depth, width) of lanes [lane, lane + lanes) and depths [first, first + depth); lanes behind are 0.
template <class R, class S>
void pack(const Operand& o, const S* data, bool rows_are_lanes, int64_t lane, int64_t lanes, int64_t first,
          int64_t depth, int64_t width, R* to) {
  if (o.lane_stride == 1 && !(rows_are_lanes && o.slots != nullptr)) {
    for (int64_t d = 0; d < depth; ++d) {
      const int64_t at = rows_are_lanes ? first + d : row_at(o, first + d);
      const S* from = data + at * o.depth_stride + lane;
      R* row = to + d * width;
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) row[i] = static_cast<R>(to_float(from[i]));
      for (int64_t i = lanes; i < width; ++i) row[i] = R(0);
    }
    return;
  }
  if (rows_are_lanes || o.slots == nullptr) {
    const S* from[kMostLanes] = {};
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t at = rows_are_lanes ? row_at(o, lane + i) : lane + i;
      from[i] = data + at * o.lane_stride + first * o.depth_stride;
    }
    int64_t d = 0;
    if (o.depth_stride == 1 && width == 1) {
#pragma omp simd
      for (d = 0; d < depth; ++d) to[d] = static_cast<R>(to_float(from[0][d]));
    } else if (o.depth_stride == 1) {
      d = pack_transposed(from, lanes, depth, width, to);
    }
    for (; d < depth; ++d) {
      R* row = to + d * width;
      for (int64_t i = 0; i < lanes; ++i) row[i] = static_cast<R>(to_float(from[i][d * o.depth_stride]));
      for (int64_t i = lanes; i < width; ++i) row[i] = R(0);
    }
    return;
  }
  for (int64_t d = 0; d < depth; ++d) {
    const S* from = data + lane * o.lane_stride + row_at(o, first + d) * o.depth_stride;
    R* row = to + d * width;
    for (int64_t i = 0; i < lanes; ++i) row[i] = static_cast<R>(to_float(from[i * o.lane_stride]));
    for (int64_t i = lanes; i < width; ++i) row[i] = R(0);
  }
}

template <class R>
void pack_any(const Operand& o, int64_t expert, bool rows_are_lanes, int64_t lane, int64_t lanes, int64_t first,
              int64_t depth, int64_t width, R* to) {
  if constexpr (std::is_same_v<R, double>) {
    pack(o, static_cast<const double*>(o.data) + expert * o.expert_stride, rows_are_lanes, lane, lanes, first, depth,
         width, to);
  } else {
    with_row_type(o.dtype, [&](auto storage) {
      using S = decltype(storage);
      pack(o, static_cast<const S*>(o.data) + expert * o.expert_stride, rows_are_lanes, lane, lanes, first, depth,
           width, to);
    });
  }
}

HOTLOOP_INLINE float pair_of(std::uint32_t low, std::uint32_t high) { return std::bit_cast<float>(low | high << 16); }

// `pack` of bfloat16 in pairs: `first` and `depth` count pairs, of `whole` depths in all; a last one without a partner
// has 0.
void pack_pairs(const Operand& o, int64_t expert, bool rows_are_lanes, int64_t lane, int64_t lanes, int64_t first,
                int64_t first_row, int64_t depth, int64_t whole, int64_t width, float* to) {
  const BFloat16* const data = static_cast<const BFloat16*>(o.data) + expert * o.expert_stride;
  const int64_t count = smaller(2 * depth, whole - 2 * first);
  if (rows_are_lanes || (o.slots == nullptr && o.lane_stride != 1)) {
    const BFloat16* from[kMostLanes] = {};
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t at = rows_are_lanes ? row_at(o, lane + i) : lane + i;
      from[i] = data + at * o.lane_stride + (rows_are_lanes ? 2 * first : first_row + 2 * first) * o.depth_stride;
    }
    int64_t d = 0;
    if (o.depth_stride == 1) {
      const Pair* pairs[kMostLanes] = {};
      for (int64_t i = 0; i < lanes; ++i) pairs[i] = reinterpret_cast<const Pair*>(from[i]);
      d = pack_transposed(pairs, lanes, count / 2, width, to);
    }
    for (; d < depth; ++d) {
      const int64_t low = 2 * d * o.depth_stride, high = low + o.depth_stride;
      float* row = to + d * width;
      for (int64_t i = 0; i < lanes; ++i)
        row[i] = pair_of(from[i][low].bits, 2 * d + 1 < count ? from[i][high].bits : 0u);
      for (int64_t i = lanes; i < width; ++i) row[i] = 0.0f;
    }
    return;
  }
  for (int64_t d = 0; d < depth; ++d) {
    const int64_t r = first_row + 2 * (first + d);
    const BFloat16* low = data + row_at(o, r) * o.depth_stride + lane * o.lane_stride;
    const BFloat16* high = low;
    const bool partner = 2 * d + 1 < count;
    if (partner) high = data + row_at(o, r + 1) * o.depth_stride + lane * o.lane_stride;
    const std::uint32_t keep = partner ? 0xffffu : 0u;
    float* row = to + d * width;
    if (o.lane_stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) row[i] = pair_of(low[i].bits, high[i].bits & keep);
    } else {
      for (int64_t i = 0; i < lanes; ++i)
        row[i] = pair_of(low[i * o.lane_stride].bits, high[i * o.lane_stride].bits & keep);
    }
    for (int64_t i = lanes; i < width; ++i) row[i] = 0.0f;
  }
}

}  // namespace
