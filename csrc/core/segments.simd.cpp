// SPDX-License-Identifier: Apache-2.0
// CPU loops over segments (see segments.hpp for the tiles and the order of additions).
//
// A work item is one tile of positions and one group of columns. Rows with contiguous columns are taken 256 columns at
// a time, each a lane of its own that goes down the rows. A single column is taken along the segment: a block of it is
// read in place, or gathered, converted and masked into a buffer in L1, and reduced in sixteen interleaved lanes, so
// that operations do not wait for each other. A log-sum-exp takes two passes over a block in cache: the largest value,
// then the sum of exponentials. Rows with ids and few columns are added one by one to what each stretch of rows knows
// of every segment; a log-sum-exp goes over the rows twice, first for the largest values of all segments.
#include "core/segments.hpp"
#include "core/segment_parts.hpp"

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/bisect.hpp"
#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "core/vmath.hpp"

#include "core/simd_begin.hpp"

namespace {

using namespace hotloop::segments;

constexpr std::int64_t kLanes = 16;
constexpr std::int64_t kBlock = 1024;     // elements of a column: 4 KiB of float32
constexpr std::int64_t kBlockRows = 256;  // rows of a group of columns: at most 256 KiB of float32
constexpr std::int64_t kColumns = 256;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

inline bool is_nan(double x) { return x != x; }

template <Reduction kReduction, class R>
constexpr R identity() {
  return kReduction == Reduction::kSum ? R(0) : -std::numeric_limits<R>::infinity();
}

// Columns [first, first + width) of the result of segment s.
template <Reduction kReduction, class R>
void write(const ReduceCall& call, std::int64_t s, std::int64_t first, std::int64_t width, const Part* part) {
  R* out = static_cast<R*>(call.out) + s * call.values.columns + first;
  const bool mean = call.reduction == Reduction::kMean;
  const double count = mean ? static_cast<double>(call.counts[s]) : 0.0;
  for (std::int64_t j = 0; j < width; ++j) {
    out[j] = static_cast<R>(result_of<kReduction>(part[j], mean, count));
    if (call.rows != nullptr) call.rows[s * call.values.columns + first + j] = part[j].at;
  }
}

// The sum of all lanes. Lane k takes lane k + 8, then k + 4, k + 2 and k + 1: one order on every instruction set.
template <class R>
inline double sum_of(R* lane) {
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t k = 0; k < half; ++k) lane[k] += lane[k + half];
  }
  return static_cast<double>(lane[0]);
}

// The last elements of a block, with nothing behind them.
template <class R>
inline void pad(const R* x, std::int64_t count, R fill, R* out) {
  for (std::int64_t k = 0; k < kLanes; ++k) out[k] = k < count ? x[k] : fill;
}

template <class R>
double block_sum(const R* x, std::int64_t count) {
  if (count < kLanes) {  // by shape too
    R sum = R(0);
    for (std::int64_t i = 0; i < count; ++i) sum += x[i];
    return static_cast<double>(sum);
  }
  R lane[kLanes] = {}, rest[kLanes];
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t k = 0; k < kLanes; ++k) lane[k] += x[i + k];
  }
  pad(x + i, count - i, R(0), rest);
  for (std::int64_t k = 0; k < kLanes; ++k) lane[k] += rest[k];
  return sum_of(lane);
}

// NaN if there is one. The order does not show, so lanes are as wide as the machine likes.
template <class R>
R block_largest(const R* x, std::int64_t count) {
  R largest = -std::numeric_limits<R>::infinity();
  int bad = 0;
#pragma omp simd reduction(max : largest) reduction(| : bad)
  for (std::int64_t i = 0; i < count; ++i) {
    largest = x[i] > largest ? x[i] : largest;
    bad |= static_cast<int>(x[i] != x[i]);
  }
  return bad != 0 ? std::numeric_limits<R>::quiet_NaN() : largest;
}

template <class R>
double block_weight(const R* x, std::int64_t count, R largest) {
  R lane[kLanes] = {}, rest[kLanes];
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t k = 0; k < kLanes; ++k) lane[k] += vexp_weight(x[i + k] - largest);
  }
  pad(x + i, count - i, -std::numeric_limits<R>::infinity(), rest);
  for (std::int64_t k = 0; k < kLanes; ++k) lane[k] += vexp_weight(rest[k] - largest);
  return sum_of(lane);
}

// What a block of a column holds: `x` dense, left-out elements being the identity.
template <Reduction kReduction, class R>
Part reduce_block(const R* x, std::int64_t count) {
  if constexpr (kReduction == Reduction::kSum) {
    return {block_sum(x, count), 0.0, -1};
  } else {
    const R largest = block_largest(x, count);
    Part part{static_cast<double>(largest), 1.0, -1};
    if constexpr (kReduction == Reduction::kLogSumExp) {
      if (part.value == -kInfinity) part.weight = 0.0;
      if (part.value - part.value == 0.0) part.weight = block_weight(x, count, largest);
    }
    return part;
  }
}

// One group of columns, [first, first + width), of the values of a call.
template <Reduction kReduction, class Storage>
class Reducer {
 public:
  using R = typename Accumulate<Storage>::type;

  Reducer(const ReduceCall& call, std::int64_t first, std::int64_t width)
      : call_(call),
        data_(static_cast<const Storage*>(call.values.data) + first * call.values.column_stride),
        first_(first),
        width_(width) {}

  void tile(std::int64_t t) {
    const Groups& g = call_.groups;
    const std::int64_t n = call_.values.n, begin = t * call_.tile;
    const std::int64_t end = begin + call_.tile < n ? begin + call_.tile : n;
    // The first segment that begins at or behind the tile's first position.
    std::int64_t s = first_where(g.count, [&](std::int64_t i) { return g.offsets[i] >= begin; });
    if (s > 0 && g.offsets[s] > begin && begin < n) {  // segment s - 1 goes on
      reduce(begin, g.offsets[s] < end ? g.offsets[s] : end, parts_of(2 * t));
    }
    Part part[kColumns];
    for (; s < g.count && (g.offsets[s] < end || end == n); ++s) {
      if (g.offsets[s + 1] <= end) {
        reduce(g.offsets[s], g.offsets[s + 1], part);
        finish(s, part);
      } else {
        reduce(g.offsets[s], end, parts_of(2 * t + 1));
        if (first_ == 0) call_.begun[t] = s;
      }
    }
  }

  // Merges the parts of the segment that begins in tile t and goes on behind it.
  void span(std::int64_t t) {
    const std::int64_t s = call_.begun[t];
    Part* whole = parts_of(2 * t + 1);
    for (std::int64_t u = t + 1;; ++u) {
      const Part* more = parts_of(2 * u);
      for (std::int64_t j = 0; j < width_; ++j) merge<kReduction>(whole[j], more[j]);
      if (call_.groups.offsets[s + 1] <= (u + 1) * call_.tile) break;
    }
    finish(s, whole);
  }

 private:
  Part* parts_of(std::int64_t i) const { return call_.parts + i * call_.values.columns + first_; }

  std::int64_t row_at(std::int64_t position) const { return call_.order != nullptr ? call_.order[position] : position; }
  bool counts(std::int64_t row) const { return call_.groups.mask == nullptr || call_.groups.mask[row] != 0; }

  void reduce(std::int64_t begin, std::int64_t end, Part* part) {
    for (std::int64_t j = 0; j < width_; ++j) part[j] = nothing<kReduction>();
    if (width_ == 1) {
      for (std::int64_t i = begin; i < end; i += kBlock) {
        along(i, end - i < kBlock ? end - i : kBlock, part[0]);
      }
    } else {
      for (std::int64_t i = begin; i < end; i += kBlockRows) {
        across(i, end - i < kBlockRows ? end - i : kBlockRows, part);
      }
    }
  }

  void along(std::int64_t begin, std::int64_t count, Part& part) {
    constexpr bool kDirect = DtypeOf<Storage>::value == DtypeOf<R>::value && kReduction != Reduction::kMin;
    const std::int64_t stride = call_.values.row_stride;
    const Groups& g = call_.groups;
    const R* x = buffer_;
    bool in_place = false;
    if constexpr (kDirect) {
      in_place = stride == 1 && call_.order == nullptr && g.mask == nullptr;
      if (in_place) x = data_ + begin;
    }
    if (!in_place) {
      if (call_.order != nullptr) {
        for (std::int64_t i = 0; i < count; ++i) buffer_[i] = value(data_[call_.order[begin + i] * stride]);
      } else if (stride == 1) {
        const Storage* from = data_ + begin;
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) buffer_[i] = value(from[i]);
      } else {
        for (std::int64_t i = 0; i < count; ++i) buffer_[i] = value(data_[(begin + i) * stride]);
      }
      if (g.mask != nullptr) {
        for (std::int64_t i = 0; i < count; ++i) {
          buffer_[i] = g.mask[row_at(begin + i)] != 0 ? buffer_[i] : identity<kReduction, R>();
        }
      }
    }
    Part block = reduce_block<kReduction>(x, count);
    if constexpr (kReduction == Reduction::kMax || kReduction == Reduction::kMin) {
      if (call_.rows != nullptr && (block.value > part.value || is_nan(block.value) || part.at < 0)) {
        const bool bad = is_nan(block.value);
        for (std::int64_t i = 0; i < count && block.at < 0; ++i) {
          const bool is = bad ? x[i] != x[i] : static_cast<double>(x[i]) == block.value;
          if (is && counts(row_at(begin + i))) block.at = row_at(begin + i);
        }
        if (block.at < 0) return;  // all of the block is left out
      }
    }
    merge<kReduction>(part, block);
  }

  // Rows [begin, begin + count) of all columns of the group.
  void across(std::int64_t begin, std::int64_t count, Part* part) {
    const std::int64_t width = width_;
    R best[kColumns], sum[kColumns], poison[kColumns];
    for (std::int64_t j = 0; j < kColumns; ++j) {
      best[j] = identity<kReduction, R>();
      sum[j] = poison[j] = R(0);
    }
    bool any = false;
    for (std::int64_t i = begin; i < begin + count; ++i) {
      const std::int64_t row = row_at(i);
      if (!counts(row)) continue;
      any = true;
      const Storage* x = data_ + row * call_.values.row_stride;
      if constexpr (kReduction == Reduction::kSum) {
#pragma GCC ivdep
        for (std::int64_t j = 0; j < width; ++j) sum[j] += value(x[j]);
      } else {
#pragma GCC ivdep
        for (std::int64_t j = 0; j < width; ++j) {
          const R v = value(x[j]);
          best[j] = v > best[j] ? v : best[j];
          poison[j] = v != v ? R(1) : poison[j];
        }
      }
    }
    if (!any) return;
    if constexpr (kReduction == Reduction::kLogSumExp) {
      for (std::int64_t i = begin; i < begin + count; ++i) {
        const std::int64_t row = row_at(i);
        if (!counts(row)) continue;
        const Storage* x = data_ + row * call_.values.row_stride;
#pragma GCC ivdep
        for (std::int64_t j = 0; j < width; ++j) sum[j] += vexp_weight(value(x[j]) - best[j]);
      }
    }
    for (std::int64_t j = 0; j < width; ++j) {
      const bool bad = poison[j] != R(0);
      Part block = nothing<kReduction>();
      if constexpr (kReduction == Reduction::kSum) {
        block.value = static_cast<double>(sum[j]);
      } else {
        block.value = bad ? kNan : static_cast<double>(best[j]);
      }
      if constexpr (kReduction == Reduction::kLogSumExp) {
        const bool finite = !bad && block.value - block.value == 0.0;
        block.weight = finite ? static_cast<double>(sum[j]) : block.value == -kInfinity ? 0.0 : 1.0;
      }
      if constexpr (kReduction == Reduction::kMax || kReduction == Reduction::kMin) {
        if (call_.rows != nullptr && (block.value > part[j].value || bad || part[j].at < 0)) {
          for (std::int64_t i = begin; block.at < 0; ++i) {
            const std::int64_t row = row_at(i);
            const R v = value(data_[row * call_.values.row_stride + j]);
            if ((bad ? v != v : v == best[j]) && counts(row)) block.at = row;
          }
        }
      }
      merge<kReduction>(part[j], block);
    }
  }

  void finish(std::int64_t s, const Part* part) const { write<kReduction, R>(call_, s, first_, width_, part); }

  static HOTLOOP_INLINE R value(Storage x) { return value_of<kReduction>(x); }

  const ReduceCall& call_;
  const Storage* data_;
  std::int64_t first_, width_;
  alignas(64) R buffer_[kBlock];
};

// What one stretch of rows with ids knows, each (count, columns).
struct Sums {
  double* value;
  double* weight;    // kLogSumExp
  std::int64_t* at;  // kMax and kMin, if rows are wanted; else nullptr
};

// Adds rows [begin, end) one by one.
template <Reduction kReduction, class Storage, class Id>
void add_rows(const ReduceCall& call, const Id* ids, std::int64_t begin, std::int64_t end, const Sums& sums) {
  // One column after the other, by pointers of its own: over columns inside, GCC checks for overlaps at every row.
  const std::int64_t columns = call.values.columns, stride = call.values.row_stride;
  const std::uint8_t* const mask = call.groups.mask;
  for (std::int64_t j = 0; j < columns; ++j) {
    const Storage* const x = static_cast<const Storage*>(call.values.data) + j * call.values.column_stride;
    double* const values = sums.value + j;
    std::int64_t* const at = sums.at != nullptr ? sums.at + j : nullptr;
    for (std::int64_t i = begin; i < end; ++i) {
      if (mask != nullptr && mask[i] == 0) continue;
      const std::int64_t to = ids[i] * columns;
      const auto found = static_cast<double>(value_of<kReduction>(x[i * stride]));
      double& value = values[to];
      if constexpr (kReduction == Reduction::kSum) {
        value += found;
      } else if (at == nullptr) {
        value = found > value || is_nan(found) ? found : value;  // nothing is above NaN
      } else if ((found > value || is_nan(found) || at[to] < 0) && !is_nan(value)) {
        value = found;
        at[to] = i;
      }
    }
  }
}

// x = exp(x), for x <= 0. A function of its own: over an array of the caller GCC does not vectorise it.
template <class R>
__attribute__((noinline)) void weigh(R* x, std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) x[i] = vexp_weight(x[i]);
}

// Adds exp(x - the largest of the segment) for rows [begin, end).
template <class Storage, class Id>
void add_weights(const ReduceCall& call, const Id* ids, std::int64_t begin, std::int64_t end, const double* largest,
                 double* weight) {
  using R = typename Accumulate<Storage>::type;
  const Values& v = call.values;
  R x[kBlock];
  for (std::int64_t j = 0; j < v.columns; ++j) {
    const Storage* const data = static_cast<const Storage*>(v.data) + j * v.column_stride;
    for (std::int64_t b = begin; b < end; b += kBlock) {
      const std::int64_t count = end - b < kBlock ? end - b : kBlock;
      for (std::int64_t i = 0; i < count; ++i) {
        x[i] = to_float(data[(b + i) * v.row_stride]) - static_cast<R>(largest[ids[b + i] * v.columns + j]);
      }
      weigh(x, count);
      for (std::int64_t i = 0; i < count; ++i) {
        const bool counts = call.groups.mask == nullptr || call.groups.mask[b + i] != 0;
        weight[ids[b + i] * v.columns + j] += counts ? static_cast<double>(x[i]) : 0.0;
      }
    }
  }
}

template <Reduction kReduction, class Storage, class Id>
void reduce_by_ids(const ReduceCall& call, const Id* ids) {
  using R = typename Accumulate<Storage>::type;
  const std::int64_t count = call.groups.count, columns = call.values.columns, size = count * columns;
  const auto sums_of = [&](std::int64_t t) {
    return Sums{call.value + t * size, call.weight + t * size, call.at != nullptr ? call.at + t * size : nullptr};
  };
  const auto each_stretch = [&](auto&& body) {  // body(sums, begin, end)
    const std::int64_t n = call.values.n, all = call.stretches;
    parallel_for(all, 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t t = first; t < last; ++t) body(sums_of(t), n * t / all, n * (t + 1) / all);
    });
  };
  each_stretch([&](const Sums& mine, std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = 0; k < size; ++k) mine.value[k] = nothing<kReduction>().value;
    for (std::int64_t k = 0; mine.at != nullptr && k < size; ++k) mine.at[k] = -1;
    add_rows<kReduction, Storage>(call, ids, begin, end, mine);
  });
  const Sums whole = sums_of(0);
  for (std::int64_t t = 1; t < call.stretches; ++t) {
    const Sums more = sums_of(t);
    for (std::int64_t k = 0; k < size; ++k) {
      Part part{whole.value[k], 0.0, whole.at != nullptr ? whole.at[k] : -1};
      merge<kReduction == Reduction::kSum ? kReduction : Reduction::kMax>(
          part, {more.value[k], 0.0, more.at != nullptr ? more.at[k] : -1});
      whole.value[k] = part.value;
      if (whole.at != nullptr) whole.at[k] = part.at;
    }
  }
  if constexpr (kReduction == Reduction::kLogSumExp) {
    each_stretch([&](const Sums& mine, std::int64_t begin, std::int64_t end) {
      for (std::int64_t k = 0; k < size; ++k) mine.weight[k] = 0.0;
      add_weights<Storage>(call, ids, begin, end, whole.value, mine.weight);
    });
    for (std::int64_t t = 1; t < call.stretches; ++t) {
      for (std::int64_t k = 0; k < size; ++k) whole.weight[k] += sums_of(t).weight[k];
    }
  }
  if (call.counts != nullptr) {
    for (std::int64_t s = 0; s < count; ++s) call.counts[s] = 0;
    for (std::int64_t i = 0; i < call.values.n; ++i) {
      call.counts[ids[i]] += call.groups.mask == nullptr || call.groups.mask[i] != 0 ? 1 : 0;
    }
  }
  for (std::int64_t s = 0; s < count; ++s) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const std::int64_t k = s * columns + j;
      const double value = whole.value[k];
      const bool finite = kReduction == Reduction::kLogSumExp && value - value == 0.0;
      const Part part{value, finite ? whole.weight[k] : 1.0, whole.at != nullptr ? whole.at[k] : -1};
      write<kReduction, R>(call, s, j, 1, &part);
    }
  }
}

template <Reduction kReduction, class Storage>
void reduce(const ReduceCall& call) {
  const Values& v = call.values;
  if (call.stretches > 0) {
    return with_integer(call.groups.ids_dtype, [&](auto id) {
      reduce_by_ids<kReduction, Storage>(call, static_cast<const decltype(id)*>(call.groups.ids));
    });
  }
  const std::int64_t wide = v.column_stride == 1 ? kColumns : 1;
  const std::int64_t groups = (v.columns + wide - 1) / wide;
  const auto reducer = [&](std::int64_t group) {
    const std::int64_t first = group * wide;
    return Reducer<kReduction, Storage>(call, first, v.columns - first < wide ? v.columns - first : wide);
  };
  // Two tiles are worth a thread.
  parallel_for(call.tiles * groups, 2, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) reducer(item % groups).tile(item / groups);
  });
  for (std::int64_t t = 0; t < call.tiles; ++t) {
    if (call.begun[t] < 0) continue;
    for (std::int64_t group = 0; group < groups; ++group) reducer(group).span(t);
  }
}

template <class Storage>
void reduce_any(const ReduceCall& call) {
  switch (call.reduction) {
    case Reduction::kMax:
      return reduce<Reduction::kMax, Storage>(call);
    case Reduction::kMin:
      return reduce<Reduction::kMin, Storage>(call);
    case Reduction::kLogSumExp:
      return reduce<Reduction::kLogSumExp, Storage>(call);
    default:
      return reduce<Reduction::kSum, Storage>(call);
  }
}

}  // namespace

void segment_reduce(const ReduceCall& call) {
  note_simd_level();
  with_float(call.values.dtype, [&](auto storage) { reduce_any<decltype(storage)>(call); });
}

#include "core/simd_end.hpp"
