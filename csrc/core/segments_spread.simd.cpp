// SPDX-License-Identifier: Apache-2.0
// The gradient of reductions over segments: what belongs to a segment is brought back to its rows. A block of rows
// finds its segments first, from ids or by walking the offsets, and is then written in one pass: a single column by
// gathered slopes, several columns row by row. The largest values have their rows written down by forward.
#include <cstdint>
#include <limits>

#include "core/bisect.hpp"
#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "core/segment_parts.hpp"
#include "core/segments.hpp"
#include "core/vmath.hpp"

#include "core/simd_begin.hpp"

namespace {

using namespace hotloop::segments;

constexpr std::int64_t kBlock = 1024;

// The segments of rows [begin, begin + count), from ids or by walking the offsets from segment `s` on.
void owners(const SpreadCall& call, std::int64_t begin, std::int64_t count, std::int64_t& s, std::int64_t* out) {
  if (call.groups.ids != nullptr) {
    return with_integer(call.groups.ids_dtype, [&](auto id) {
      const auto* ids = static_cast<const decltype(id)*>(call.groups.ids) + begin;
      for (std::int64_t i = 0; i < count; ++i) out[i] = ids[i];
    });
  }
  const std::int64_t* offsets = call.groups.offsets;
  std::int64_t i = 0;
  while (i < count) {
    while (offsets[s + 1] <= begin + i) ++s;
    const std::int64_t left = offsets[s + 1] - begin;
    const std::int64_t until = left < count ? left : count;
    for (; i < until; ++i) out[i] = s;
  }
}

// The segment of a row; 0 where ids say it.
std::int64_t owner_of(const SpreadCall& call, std::int64_t row) {
  if (call.groups.ids != nullptr) return 0;
  return first_where(call.groups.count - 1, [&](std::int64_t s) { return call.groups.offsets[s + 1] > row; });
}

template <class Storage>
void spread_largest(const SpreadCall& call) {
  using R = typename Accumulate<Storage>::type;
  const std::int64_t columns = call.values.columns;
  Storage* out = static_cast<Storage*>(call.result);
  const R* grad = static_cast<const R*>(call.grad);
  parallel_for(call.values.n * columns, 65536, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) out[i] = Storage{};
  });
  // A row is in one segment, so no two of these write to the same place.
  parallel_for(call.groups.count, 4096, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t s = begin; s < end; ++s) {
      for (std::int64_t j = 0; j < columns; ++j) {
        const std::int64_t row = call.rows[s * columns + j];
        if (row >= 0) put(out[row * columns + j], grad[s * columns + j]);
      }
    }
  });
}

// x = exp(x), for x <= 0. A function of its own: over an array of the caller GCC does not vectorise it.
template <class R>
__attribute__((noinline)) void weigh(R* x, std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) x[i] = vexp_weight(x[i]);
}

// One column.
template <class Storage>
void spread_block(const SpreadCall& call, std::int64_t begin, std::int64_t count, const std::int64_t* owner) {
  using R = typename Accumulate<Storage>::type;
  R slope[kBlock];
  const R* grad = static_cast<const R*>(call.grad);
  for (std::int64_t i = 0; i < count; ++i) slope[i] = grad[owner[i]];
  if (call.reduction == Reduction::kMean) {
    for (std::int64_t i = 0; i < count; ++i) slope[i] /= static_cast<R>(call.counts[owner[i]]);
  }
  if (call.reduction == Reduction::kLogSumExp) {
    R x[kBlock];
    const R* total = static_cast<const R*>(call.out);
    const std::int64_t stride = call.values.row_stride;
    const Storage* values = static_cast<const Storage*>(call.values.data) + begin * stride;
    for (std::int64_t i = 0; i < count; ++i) x[i] = shifted<R>(to_float(values[i * stride]), total[owner[i]]);
    weigh(x, count);
    for (std::int64_t i = 0; i < count; ++i) slope[i] *= x[i];
  }
  if (call.groups.mask != nullptr) {
    const std::uint8_t* mask = call.groups.mask + begin;
    for (std::int64_t i = 0; i < count; ++i) slope[i] = mask[i] != 0 ? slope[i] : R(0);
  }
  Storage* out = static_cast<Storage*>(call.result) + begin;
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) put(out[i], slope[i]);
}

template <class Storage>
void spread_row(const SpreadCall& call, std::int64_t row, std::int64_t owner) {
  using R = typename Accumulate<Storage>::type;
  const Values& v = call.values;
  const R* grad = static_cast<const R*>(call.grad) + owner * v.columns;
  Storage* out = static_cast<Storage*>(call.result) + row * v.columns;
  if (call.groups.mask != nullptr && call.groups.mask[row] == 0) {
    for (std::int64_t j = 0; j < v.columns; ++j) out[j] = Storage{};
  } else if (call.reduction == Reduction::kLogSumExp) {
    const R* total = static_cast<const R*>(call.out) + owner * v.columns;
    const Storage* values = static_cast<const Storage*>(v.data) + row * v.row_stride;
    if (v.column_stride == 1) {
#pragma GCC ivdep
      for (std::int64_t j = 0; j < v.columns; ++j) {
        put(out[j], grad[j] * vexp_weight(shifted<R>(to_float(values[j]), total[j])));
      }
    } else {
      for (std::int64_t j = 0; j < v.columns; ++j) {
        put(out[j], grad[j] * vexp_weight(shifted<R>(to_float(values[j * v.column_stride]), total[j])));
      }
    }
  } else {
    const R divisor = call.reduction == Reduction::kMean ? static_cast<R>(call.counts[owner]) : R(1);
#pragma GCC ivdep
    for (std::int64_t j = 0; j < v.columns; ++j) put(out[j], grad[j] / divisor);
  }
}

template <class Storage>
void spread(const SpreadCall& call) {
  const std::int64_t n = call.values.n, columns = call.values.columns;
  if (columns == 0) return;
  if (call.reduction == Reduction::kMax || call.reduction == Reduction::kMin) return spread_largest<Storage>(call);
  const std::int64_t grain = 1 + 32 / columns;  // blocks worth a thread
  parallel_for((n + kBlock - 1) / kBlock, grain, [&](std::int64_t first, std::int64_t last) {
    std::int64_t owner[kBlock];
    std::int64_t s = owner_of(call, first * kBlock);
    for (std::int64_t b = first; b < last; ++b) {
      const std::int64_t begin = b * kBlock, count = n - begin < kBlock ? n - begin : kBlock;
      owners(call, begin, count, s, owner);
      if (columns == 1) {
        spread_block<Storage>(call, begin, count, owner);
      } else {
        for (std::int64_t i = 0; i < count; ++i) spread_row<Storage>(call, begin + i, owner[i]);
      }
    }
  });
}

}  // namespace

void segment_spread(const SpreadCall& call) {
  note_simd_level();
  with_float(call.values.dtype, [&](auto storage) { spread<decltype(storage)>(call); });
}

#include "core/simd_end.hpp"
