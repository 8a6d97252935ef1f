// SPDX-License-Identifier: Apache-2.0
// The product of eight vectors with a panel of slots. A panel holds two vector registers of slots, dimension by
// dimension, so that every slot's sum runs over the dimensions in order, whatever the instruction set. Included by
// *.simd.cpp only, before core/simd_begin.hpp; everything is inlined there.
#pragma once

#include <cstdint>

#include "core/macros.hpp"
#include "table/error_memory/error_memory.hpp"

namespace hotloop::table {

// Nameless: every level has its own.
namespace {

#if HOTLOOP_SIMD_LEVEL == 2
constexpr std::int64_t kVectorBytes = 64;
constexpr int kAtOnce = 8;  // sixteen sums of the 32 registers
#elif HOTLOOP_SIMD_LEVEL == 1
constexpr std::int64_t kVectorBytes = 32;
constexpr int kAtOnce = 4;  // eight sums of the 16 registers
#else
constexpr std::int64_t kVectorBytes = 16;
constexpr int kAtOnce = 4;
#endif

template <class R>
struct Panel {
  typedef R Vector __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr std::int64_t kLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(R));
  static constexpr std::int64_t kSlots = 2 * kLanes;
};

// tile[q * kMostTileSlots + s] = <query q, slot s>.
template <class R>
HOTLOOP_INLINE void multiply_panel(const R* queries, const R* panel, std::int64_t dim, R* tile) {
  using Vector = typename Panel<R>::Vector;
  for (int q0 = 0; q0 < kGroup; q0 += kAtOnce) {
    Vector low[kAtOnce] = {}, high[kAtOnce] = {};
    const Vector* slots = reinterpret_cast<const Vector*>(panel);
    const R* query = queries + q0;
    for (std::int64_t j = 0; j < dim; ++j) {
      const Vector a = slots[2 * j], b = slots[2 * j + 1];
      HOTLOOP_UNROLL
      for (int q = 0; q < kAtOnce; ++q) {
        low[q] += query[j * kGroup + q] * a;
        high[q] += query[j * kGroup + q] * b;
      }
    }
    HOTLOOP_UNROLL
    for (int q = 0; q < kAtOnce; ++q) {
      Vector* out = reinterpret_cast<Vector*>(tile + (q0 + q) * kMostTileSlots);
      out[0] = low[q];
      out[1] = high[q];
    }
  }
}

}  // namespace

}  // namespace hotloop::table
