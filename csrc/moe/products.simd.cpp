// SPDX-License-Identifier: Apache-2.0
// Products of experts (see products.hpp): both operands are packed into panels, a panel of rows meets a panel of
// columns in a tile whose sums stay in registers, and blocks of the depth keep the panels in cache.
//
// A group of few rows packs nothing: its weight would be read and written again for a handful of products, so it is
// read once, as it lies, and all rows take what they need of every vector.
#include "moe/products.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

#include "core/dtype.hpp"
#include "core/parallel.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/simd_begin.hpp"

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
// Of a block: a panel of rows, 14 KiB, stays in L1, and every 256 terms have a sum of their own, which rounds less.
constexpr int64_t kDepth = 256;
constexpr int64_t kPackedBytes = 512 * 1024;  // of columns: half of an L2
constexpr int64_t kPackedRowsBytes = 2 * 1024 * 1024;
constexpr int64_t kLeastRows = 8 * kMostRows, kMostBlockRows = 24 * kMostRows;
constexpr int64_t kFewRows = 8;

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

// Memory of a thread that lasts between calls, so that its pages are faulted in once.
class Scratch {
 public:
  void* at_least(std::size_t bytes) {
    if (bytes > bytes_) {
      memory_.reset(new unsigned char[bytes + 64]);
      bytes_ = bytes;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    return memory_.get() + (64 - address % 64) % 64;
  }

 private:
  std::unique_ptr<unsigned char[]> memory_;
  std::size_t bytes_ = 0;
};
thread_local Scratch scratch;

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

// -- blocks -------------------------------------------------------------------------------------------------

// Rows [first, first + rows) of panels that are as equal as can be.
struct Panels {
  int64_t rows, count;
  explicit Panels(int64_t n) : rows(n), count(pieces(n, kMostRows)) {}
  int64_t begin(int64_t p) const { return rows * p / count; }
};

// Lanes [i0, i1) of a and [j0, j1) of b, of one group.
struct Block {
  const Group* group;
  int64_t i0, i1, j0, j1;
};

template <class R, class S>
void store(const R* from, int64_t stride, int64_t rows, int64_t columns, S* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const R* source = from + i * stride;
    S* row = to + i * to_stride;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) put(row[j], source[j]);
  }
}

template <class R>
struct Shape {
  static constexpr int64_t kColumns = Lanes<R>::kColumns;
  int64_t depth_block, column_block, row_block;
  explicit Shape(int64_t depth) {
    const int64_t blocks = depth <= kDepth + kDepth / 2 ? 1 : pieces(depth, kDepth);
    depth_block = std::max<int64_t>(1, pieces(depth, blocks));
    const auto size = static_cast<int64_t>(sizeof(R));
    column_block = std::max<int64_t>(1, kPackedBytes / (size * depth_block * kColumns)) * kColumns;
    const int64_t fit = kPackedRowsBytes / (size * std::max<int64_t>(1, depth)) / kMostRows * kMostRows;
    row_block = std::clamp(fit, kLeastRows, kMostBlockRows);
  }
};

// With kPairs the depth counts pairs.
template <class R, bool kPairs>
void multiply(const ProductCall& call, const Block& block) {
  constexpr int64_t kColumns = Lanes<R>::kColumns;
  const Group& group = *block.group;
  const bool outer = call.outer;
  const int64_t whole = outer ? group.count : call.depth;
  const int64_t depth = kPairs ? pieces(whole, 2) : whole;
  const Shape<R> shape(depth);
  const int64_t rows = block.i1 - block.i0;
  const Panels panels(rows);
  const int64_t wide = smaller(shape.column_block, pieces(block.j1 - block.j0, kColumns) * kColumns);
  // Packed rows over the whole depth, packed columns of one block, sums of one block, bias.
  const auto a_size = static_cast<std::size_t>(rows * depth);
  const auto b_size = static_cast<std::size_t>(wide * shape.depth_block);
  const auto c_size = static_cast<std::size_t>(rows * wide);
  R* const packed_a =
      static_cast<R*>(scratch.at_least((a_size + b_size + c_size + static_cast<std::size_t>(wide) + 64) * sizeof(R)));
  R* const packed_b = packed_a + (a_size + 15) / 16 * 16;
  R* const sums = packed_b + b_size;
  R* const start = sums + c_size;

  const int64_t a_rows = group.first - call.a.first_row, b_rows = group.first - call.b.first_row;
  const int64_t a_expert = call.a.expert_stride == 0 ? 0 : group.expert;
  // Lanes from `lane` on; of an outer product depths are rows, from `row` on.
  const auto pack_panel = [&](const Operand& o, int64_t expert, bool rows_are_lanes, int64_t lane, int64_t lanes,
                              int64_t row, int64_t first, int64_t count, int64_t width, R* to) {
    if constexpr (kPairs) {
      pack_pairs(o, expert, rows_are_lanes, lane, lanes, first, row, count, whole, width, to);
    } else {
      pack_any(o, expert, rows_are_lanes, lane, lanes, row + first, count, width, to);
    }
  };
  for (int64_t d = 0; d < depth; d += shape.depth_block) {
    const int64_t here = smaller(shape.depth_block, depth - d);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t i = panels.begin(p), width = panels.begin(p + 1) - i;
      const int64_t lane = block.i0 + i + (outer ? 0 : a_rows);
      pack_panel(call.a, a_expert, !outer, lane, width, outer ? a_rows : 0, d, here, width,
                 packed_a + d * rows + i * here);
    }
  }
  for (int64_t j = block.j0; j < block.j1; j += wide) {
    const int64_t columns = smaller(wide, block.j1 - j);
    std::fill_n(start, wide, R(0));
    if (call.bias != nullptr) {
      Operand bias;
      bias.data = call.bias;
      bias.dtype = call.b.dtype;
      bias.expert_stride = call.b_lanes;
      pack_any(bias, group.expert, false, j, columns, 0, 1, wide, start);
    }
    std::byte* const out =
        static_cast<std::byte*>(call.out) +
        item_size(call.out_dtype) * (j + (outer ? group.expert * call.out_expert_stride + block.i0 * call.out_row_stride
                                                : (group.first - call.out_first_row + block.i0) * call.out_row_stride));
    // Sums go where the result goes if that takes them as they are.
    const bool direct = call.out_dtype == DtypeOf<R>::value && columns % kColumns == 0;
    R* const c = direct ? reinterpret_cast<R*>(out) : sums;
    const int64_t c_stride = direct ? call.out_row_stride : wide;
    for (int64_t d = 0; d == 0 || d < depth; d += shape.depth_block) {
      const int64_t here = smaller(shape.depth_block, depth - d);
      for (int64_t v = 0; v < columns; v += kColumns) {
        pack_panel(call.b, group.expert, false, j + v, smaller(kColumns, columns - v), outer ? b_rows : 0, d, here,
                   kColumns, packed_b + v * here);
      }
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t i = panels.begin(p);
        const int width = static_cast<int>(panels.begin(p + 1) - i);
        const Tile<R> run = tile_of<R, kPairs>(width, std::make_integer_sequence<int, kMostRows>{});
        for (int64_t v = 0; v < columns; v += kColumns) {
          run(packed_a + d * rows + i * here, packed_b + v * here, here, c + i * c_stride + v, c_stride, d > 0,
              start + v);
        }
      }
    }
    if (!direct) {
      with_float(call.out_dtype, [&](auto storage) {
        using S = decltype(storage);
        if constexpr (std::is_same_v<R, double> == std::is_same_v<S, double>) {
          store(sums, wide, rows, columns, reinterpret_cast<S*>(out), call.out_row_stride);
        }
      });
    }
  }
}

// -- few rows -----------------------------------------------------------------------------------------------

// out(r, lane) += a(r, :) w(lane, :) for kRows rows and kLanes lanes whose depth lies side by side. `a` is as long as
// whole vectors, 0 at its end.
template <int kRows, int kLanes, class R, class S>
HOTLOOP_INLINE void dots(const R* a, int64_t a_stride, const S* w, int64_t w_stride, int64_t depth, R* out,
                         int64_t out_stride) {
  using V = typename Lanes<R>::Vector;
  constexpr int64_t kCount = Lanes<R>::kCount;
  V sum[kRows][kLanes] = {};
  const auto add = [&](int64_t d, const auto* from, int64_t stride) {
#pragma GCC unroll 4
    for (int l = 0; l < kLanes; ++l) {
      const V x = load<R>(from + l * stride);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][l] += *reinterpret_cast<const V*>(a + r * a_stride + d) * x;
    }
  };
  int64_t d = 0;
  for (; d + kCount <= depth; d += kCount) add(d, w + d, w_stride);
  if (d < depth) {
    alignas(64) R rest[kLanes * kCount] = {};
    for (int l = 0; l < kLanes; ++l) {
      for (int64_t i = d; i < depth; ++i) rest[l * kCount + i - d] = to_float(w[l * w_stride + i]);
    }
    add(d, static_cast<const R*>(rest), kCount);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int l = 0; l < kLanes; ++l) {
      R total = 0;
      for (int i = 0; i < kCount; ++i) total += sum[r][l][i];
      out[r * out_stride + l] += total;
    }
  }
}

// out(r, :) += a(r, d) w(d, :) for four depths at a time, whose lanes lie side by side.
template <class R, class S>
HOTLOOP_INLINE void add_depths(const R* a, const S* w, int64_t w_stride, int64_t depths, int64_t columns, R* out) {
  if (depths == 4) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      out[j] += a[0] * to_float(w[j]) + a[1] * to_float(w[w_stride + j]) + a[2] * to_float(w[2 * w_stride + j]) +
                a[3] * to_float(w[3 * w_stride + j]);
    }
    return;
  }
  for (int64_t d = 0; d < depths; ++d) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) out[j] += a[d] * to_float(w[d * w_stride + j]);
  }
}

// Whether a group is so small that reading its weight is all there is to do: then it is read once, as it lies.
HOTLOOP_INLINE bool is_few(const ProductCall& call, const Group& group) {
  return !call.outer && group.count <= kFewRows && (call.b.depth_stride == 1 || call.b.lane_stride == 1);
}

template <class R, class S>
void multiply_few(const ProductCall& call, const Block& block) {
  constexpr int64_t kCount = Lanes<R>::kCount;
  const Group& group = *block.group;
  const int64_t rows = group.count, depth = call.depth, columns = block.j1 - block.j0;
  const int64_t a_stride = pieces(depth, kCount) * kCount;
  R* const a = static_cast<R*>(scratch.at_least(static_cast<std::size_t>(rows * (a_stride + columns)) * sizeof(R)));
  R* const sums = a + rows * a_stride;
  Operand bias;
  bias.data = call.bias;
  bias.dtype = call.b.dtype;
  bias.expert_stride = call.b_lanes;
  for (int64_t r = 0; r < rows; ++r) {
    pack_any(call.a, 0, true, group.first - call.a.first_row + r, 1, 0, depth, 1, a + r * a_stride);
    std::fill(a + r * a_stride + depth, a + (r + 1) * a_stride, R(0));
    std::fill_n(sums + r * columns, columns, R(0));
    for (int64_t j = 0; call.bias != nullptr && j < columns; j += kMostLanes) {
      const int64_t here = smaller(kMostLanes, columns - j);
      pack_any(bias, group.expert, false, block.j0 + j, here, 0, 1, here, sums + r * columns + j);
    }
  }
  const S* const w = static_cast<const S*>(call.b.data) + group.expert * call.b.expert_stride;
  if (call.b.depth_stride == 1) {
    constexpr int kLanes = kVectorBytes == 64 ? 4 : 2;
    const int64_t stride = call.b.lane_stride;
    const auto some = [&](int64_t j, auto lanes) {
      for (int64_t r = 0; r < rows;) {
        const S* const from = w + (block.j0 + j) * stride;
        const auto next = [&](auto many) {
          dots<decltype(many)::value, decltype(lanes)::value>(a + r * a_stride, a_stride, from, stride, depth,
                                                              sums + r * columns + j, columns);
          r += decltype(many)::value;
        };
        if (rows - r >= 4) {
          next(std::integral_constant<int, 4>{});
        } else if (rows - r >= 2) {
          next(std::integral_constant<int, 2>{});
        } else {
          next(std::integral_constant<int, 1>{});
        }
      }
    };
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) some(j, std::integral_constant<int, kLanes>{});
    for (; j < columns; ++j) some(j, std::integral_constant<int, 1>{});
  } else {
    const int64_t stride = call.b.depth_stride;
    for (int64_t d = 0; d < depth; d += 4) {
      for (int64_t r = 0; r < rows; ++r) {
        add_depths(a + r * a_stride + d, w + d * stride + block.j0, stride, smaller<int64_t>(4, depth - d), columns,
                   sums + r * columns);
      }
    }
  }
  with_float(call.out_dtype, [&](auto storage) {
    using To = decltype(storage);
    if constexpr (std::is_same_v<R, double> == std::is_same_v<To, double>) {
      To* const out = static_cast<To*>(call.out) + (group.first - call.out_first_row) * call.out_row_stride + block.j0;
      store(sums, columns, rows, columns, out, call.out_row_stride);
    }
  });
}

template <class R>
void multiply_block(const ProductCall& call, const Block& block) {
  if constexpr (std::is_same_v<R, double>) {
    if (!is_few(call, *block.group)) return multiply<R, false>(call, block);
    multiply_few<double, double>(call, block);
  } else {
    if (!is_few(call, *block.group)) {
      const bool pairs = call.a.dtype == Dtype::kBFloat16 && call.b.dtype == Dtype::kBFloat16 && has_pairs();
      return pairs ? multiply<R, true>(call, block) : multiply<R, false>(call, block);
    }
    with_row_type(call.b.dtype, [&](auto storage) { multiply_few<float, decltype(storage)>(call, block); });
  }
}

template <class R>
void run(const ProductCall& call) {
  // Blocks of rows first; columns are cut too where there are fewer blocks than a few per thread.
  const auto blocks_of = [&](const Group& g, int64_t cuts, auto&& each) {
    const int64_t lanes = call.outer ? call.a_lanes : g.count;
    const Shape<R> shape(call.outer ? g.count : call.depth);
    const int64_t rows = pieces(lanes, shape.row_block);
    const int64_t tiles = pieces(call.b_lanes, Lanes<R>::kColumns);
    const int64_t columns = smaller(cuts, tiles);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        const auto at = [&](int64_t k) { return smaller(tiles * k / columns * Lanes<R>::kColumns, call.b_lanes); };
        each(Block{&g, lanes * r / rows, lanes * (r + 1) / rows, at(c), at(c + 1)});
      }
    }
  };
  int64_t count = 0;
  for (int64_t g = 0; g < call.group_count; ++g) blocks_of(call.groups[g], 1, [&](const Block&) { ++count; });
  const int threads = max_threads();
  const int64_t cuts = threads == 1 || count == 0 ? 1 : pieces(4 * threads, count);
  count = 0;
  for (int64_t g = 0; g < call.group_count; ++g) blocks_of(call.groups[g], cuts, [&](const Block&) { ++count; });
  const std::unique_ptr<Block[]> blocks(new Block[static_cast<std::size_t>(count)]);
  Block* next = blocks.get();
  for (int64_t g = 0; g < call.group_count; ++g) blocks_of(call.groups[g], cuts, [&](const Block& b) { *next++ = b; });
  // Whoever is free takes the next: experts differ in size.
  std::atomic<int64_t> taken{0};
  parallel_for(smaller<int64_t>(threads, count), 1, [&](int64_t, int64_t) {
    for (int64_t k = taken.fetch_add(1); k < count; k = taken.fetch_add(1))
      multiply_block<R>(call, blocks[static_cast<std::size_t>(k)]);
  });
}

}  // namespace

void grouped_product(const moe::ProductCall& call) {
  note_simd_level();
  if (call.a.dtype == Dtype::kFloat64) return run<double>(call);
  run<float>(call);
}

#include "core/simd_end.hpp"
