// SPDX-License-Identifier: Apache-2.0
// Similarities of queries to a range of slots, and what of them may be among the k best: see memory.hpp.
#include <cstdint>
#include <limits>

#include "core/dtype.hpp"
#include "core/simd.hpp"
#include "table/error_memory/error_memory.hpp"
#include "table/error_memory/tile.hpp"

#include "core/simd_begin.hpp"

namespace {

using namespace hotloop::table;

// Divides the slots of a panel by their norms, each summed in double: the square of no finite float32 overflows. A norm
// below the smallest normal number makes the slot 0, one that is not finite NaN.
template <class R>
void normalise(R* panel, std::int64_t dim) {
  constexpr std::int64_t kSlots = Panel<R>::kSlots;
  alignas(64) double sum[kSlots] = {};
  alignas(64) R inverse[kSlots];
  for (std::int64_t j = 0; j < dim; ++j) {
#pragma GCC ivdep
    for (std::int64_t s = 0; s < kSlots; ++s) {
      const double x = static_cast<double>(panel[j * kSlots + s]);
      sum[s] += x * x;
    }
  }
  for (std::int64_t s = 0; s < kSlots; ++s) {
    const double norm = __builtin_sqrt(sum[s]);
    const double one_over = norm < static_cast<double>(std::numeric_limits<float>::min()) ? 0.0 : 1.0 / norm;
    const bool finite = sum[s] <= std::numeric_limits<double>::max();
    inverse[s] = finite ? static_cast<R>(one_over) : std::numeric_limits<R>::quiet_NaN();
  }
  for (std::int64_t j = 0; j < dim; ++j) {
#pragma GCC ivdep
    for (std::int64_t s = 0; s < kSlots; ++s) panel[j * kSlots + s] *= inverse[s];
  }
}

// Slots after the last are NaN, which is similar to nothing.
template <class Storage, class R>
void pack_slots(const ScanCall<R>& call, std::int64_t from, std::int64_t count, R* panels) {
  constexpr std::int64_t kSlots = Panel<R>::kSlots;
  const std::int64_t dim = call.keys.shape[1], slots = call.keys.shape[0];
  const std::int64_t padded = (count + kPanelAlign - 1) / kPanelAlign * kPanelAlign;
  for (std::int64_t s0 = 0; s0 < padded; s0 += kSlots) {
    R* panel = panels + s0 * dim;
    for (std::int64_t s = 0; s < kSlots; ++s) {
      R* out = panel + s;
      if (s0 + s >= count) {
        for (std::int64_t j = 0; j < dim; ++j) out[j * kSlots] = std::numeric_limits<R>::quiet_NaN();
        continue;
      }
      std::int64_t slot = call.first + from + s0 + s;
      slot = slot < slots ? slot : slot - slots;
      const Storage* x = static_cast<const Storage*>(call.keys.data) + slot * call.keys.stride[0];
      for (std::int64_t j = 0; j < dim; ++j) out[j * kSlots] = static_cast<R>(to_float(x[j]));
    }
    normalise(panel, dim);
  }
}

template <std::int64_t kCount, class R>
HOTLOOP_INLINE bool any_above(const R* x, R least) {
  int any = 0;
#pragma omp simd reduction(| : any)
  for (std::int64_t s = 0; s < kCount; ++s) any |= x[s] > least ? 1 : 0;
  return any != 0;
}

template <class R>
void keep_candidates(const R* row, std::int64_t count, std::int64_t from, Candidates<R>& found) {
  for (std::int64_t s0 = 0; s0 < count; s0 += kLook) {
    if (!any_above<kLook>(row + s0, found.least)) continue;
    for (std::int64_t s1 = s0; s1 < s0 + kLook; s1 += kWalk) {
      if (!any_above<kWalk>(row + s1, found.least)) continue;
      if (found.count + kWalk > found.capacity) hotloop::table::compact(found);
      // Every one is written, and the next one over it unless it counts: no branch to predict.
      const R least = found.least;
      auto* items = found.items;
      std::int64_t n = found.count;
      for (std::int64_t s = s1; s < s1 + kWalk; ++s) {
        items[n] = Candidate<R>::make(row[s], from + s);
        n += row[s] > least ? 1 : 0;
      }
      found.count = n;
    }
  }
}

template <class Storage, class R>
void scan(const ScanCall<R>& call) {
  constexpr std::int64_t kSlots = Panel<R>::kSlots;
  const std::int64_t dim = call.keys.shape[1], block = block_slots<R>(dim);
  for (std::int64_t from = call.begin; from < call.end; from += block) {
    const std::int64_t count = call.end - from < block ? call.end - from : block;
    pack_slots<Storage, R>(call, from, count, call.panels);
    for (std::int64_t q0 = 0; q0 < call.count; q0 += kGroup) {
      const R* queries = call.queries + q0 * dim;
      const std::int64_t padded = (count + kPanelAlign - 1) / kPanelAlign * kPanelAlign;
      for (std::int64_t s = 0; s < padded; s += kSlots) {
        multiply_panel(queries, call.panels + s * dim, dim, call.tile + s);
      }
      const std::int64_t here = call.count - q0 < kGroup ? call.count - q0 : kGroup;
      for (std::int64_t q = 0; q < here; ++q) {
        keep_candidates(call.tile + q * kMostTileSlots, count, from, call.found[q0 + q]);
      }
    }
  }
}

}  // namespace

void scan_slots(const table::ScanCall<float>& call) {
  note_simd_level();
  with_row_type(call.keys.dtype, [&](auto storage) { scan<decltype(storage)>(call); });
}

void scan_slots(const table::ScanCall<double>& call) {
  note_simd_level();
  scan<double, double>(call);
}

#include "core/simd_end.hpp"
