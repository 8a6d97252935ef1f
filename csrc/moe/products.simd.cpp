// SPDX-License-Identifier: Apache-2.0
#include "moe/products.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "core/dtype.hpp"
#include "core/parallel.hpp"

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
constexpr int64_t kDepth = 512;               // of a block: a panel of rows, 28 KiB, stays in L1
constexpr int64_t kPackedBytes = 512 * 1024;  // of columns: half of an L2
constexpr int64_t kPackedRowsBytes = 2 * 1024 * 1024;
constexpr int64_t kLeastRows = 8 * kMostRows, kMostBlockRows = 24 * kMostRows;
constexpr int64_t kFewRows = 4;  // up to here a weight is read once, as it lies

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

// c (rows, kColumns) = start or 0 or c, + a b^T over packed panels: a (depth, rows), b (depth, kColumns).
template <class R, int kRows>
void tile(const R* a, const R* b, int64_t depth, R* c, int64_t c_stride, bool add, const R* start) {
  using V = typename Lanes<R>::Vector;
  constexpr int kCount = Lanes<R>::kCount;
  V sum[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const R* from = add ? c + i * c_stride : start;
      sum[i][v] = *reinterpret_cast<const V*>(from + v * kCount);
    }
  }
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
    for (int v = 0; v < 2; ++v) *reinterpret_cast<V*>(c + i * c_stride + v * kCount) = sum[i][v];
  }
}

template <class R>
using Tile = void (*)(const R*, const R*, int64_t, R*, int64_t, bool, const R*);

template <class R, int... kRows>
constexpr Tile<R> tile_of(int rows, std::integer_sequence<int, kRows...>) {
  constexpr Tile<R> kTiles[] = {&tile<R, kRows + 1>...};
  return kTiles[rows - 1];
}

// -- packing ------------------------------------------------------------------------------------------------

// Which row of the data row r of a group is.
HOTLOOP_INLINE int64_t row_at(const Operand& o, int64_t r) { return o.slots == nullptr ? r : o.slots[r] / o.choices; }

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
  for (int64_t i = 0; i < width; ++i) {
    if (i >= lanes) {
      for (int64_t d = 0; d < depth; ++d) to[d * width + i] = R(0);
    } else if (rows_are_lanes || o.slots == nullptr) {
      const int64_t at = rows_are_lanes ? row_at(o, lane + i) : lane + i;
      const S* from = data + at * o.lane_stride + first * o.depth_stride;
      for (int64_t d = 0; d < depth; ++d) to[d * width + i] = static_cast<R>(to_float(from[d * o.depth_stride]));
    } else {
      for (int64_t d = 0; d < depth; ++d) {
        const S* from = data + (lane + i) * o.lane_stride + row_at(o, first + d) * o.depth_stride;
        to[d * width + i] = static_cast<R>(to_float(*from));
      }
    }
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

template <class R>
void multiply(const ProductCall& call, const Block& block) {
  constexpr int64_t kColumns = Lanes<R>::kColumns;
  const Group& group = *block.group;
  const bool outer = call.outer;
  const int64_t depth = outer ? group.count : call.depth;
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
  for (int64_t d = 0; d < depth; d += shape.depth_block) {
    const int64_t here = smaller(shape.depth_block, depth - d);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t i = panels.begin(p), width = panels.begin(p + 1) - i;
      const int64_t lane = block.i0 + i + (outer ? 0 : a_rows);
      pack_any(call.a, a_expert, !outer, lane, width, d + (outer ? a_rows : 0), here, width,
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
        pack_any(call.b, group.expert, false, j + v, smaller(kColumns, columns - v), d + (outer ? b_rows : 0), here,
                 kColumns, packed_b + v * here);
      }
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t i = panels.begin(p);
        const int width = static_cast<int>(panels.begin(p + 1) - i);
        const Tile<R> run = tile_of<R>(width, std::make_integer_sequence<int, kMostRows>{});
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
      multiply<R>(call, blocks[static_cast<std::size_t>(k)]);
  });
}

}  // namespace

void grouped_product(const moe::ProductCall& call) {
  note_simd_level();
  if (call.a.dtype == Dtype::kFloat64) return run<double>(call);
  run<float>(call);
}

#include "core/simd_end.hpp"
