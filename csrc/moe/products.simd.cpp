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

#include "moe/product_panels.hpp"

namespace {

// Of a block: a panel of rows, 14 KiB, stays in L1, and every 256 terms have a sum of their own, which rounds less.
constexpr int64_t kDepth = 256;
constexpr int64_t kPackedBytes = 512 * 1024;  // of columns: half of an L2
constexpr int64_t kPackedRowsBytes = 2 * 1024 * 1024;
constexpr int64_t kLeastRows = 8 * kMostRows, kMostBlockRows = 24 * kMostRows;
constexpr int64_t kFewRows = 8;

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
