// SPDX-License-Identifier: Apache-2.0
// Shared by the row loops of one lm_head and of two.
#pragma once

#include <cstdint>
#include <limits>

#include "core/dtype.hpp"
#include "core/macros.hpp"
#include "logprob/heads.hpp"
#include "logprob/rows.hpp"

namespace hotloop::logprob {

// 1024 float logits are 4 KiB: two chunks (student and teacher) and their sources stay in a 32 KiB L1.
inline constexpr std::int64_t kChunk = 1024;

// Rows worth a thread: about 16k logits, 10 us.
HOTLOOP_INLINE std::int64_t grain_rows(std::int64_t columns) { return 1 + 16384 / (columns + 1); }

template <class R>
HOTLOOP_INLINE LogitMap<R> logit_map(const Transform& t) {
  // No cap is a cap too large to matter: two lm_heads of which one is capped run the same code.
  const double cap = t.softcap > 0 ? t.softcap : 1e30;
  return {static_cast<R>(t.scale), static_cast<R>(cap), static_cast<R>(1.0 / t.temperature)};
}

template <bool kCap, bool kBias, class Storage, class R>
HOTLOOP_INLINE R load_chunk(const Storage* row, const R* bias, std::int64_t count, const LogitMap<R>& logit, R* z) {
  R maximum = -std::numeric_limits<R>::infinity();
#pragma omp simd reduction(max : maximum)
  for (std::int64_t j = 0; j < count; ++j) {
    R u = static_cast<R>(to_float(row[j]));
    if (kBias) u += bias[j];
    const R value = logit.template forward<kCap>(u);
    z[j] = value;
    maximum = value > maximum ? value : maximum;
  }
  return maximum;
}

// Converts `count` logits to z and returns their maximum; NaN does not become the maximum.
template <bool kCap, class Storage, class R>
HOTLOOP_INLINE R load_logits(const Storage* row, const R* bias, std::int64_t count, const LogitMap<R>& logit, R* z) {
  return bias == nullptr ? load_chunk<kCap, false>(row, bias, count, logit, z)
                         : load_chunk<kCap, true>(row, bias, count, logit, z);
}

// Writes a chunk of results in the tile's type. A loop of its own: folded into the arithmetic before it,
// the conversion to a half type keeps GCC from vectorising either.
template <class Storage, class R>
HOTLOOP_INLINE void store_chunk(const R* x, std::int64_t count, Storage* row) {
#pragma GCC ivdep
  for (std::int64_t j = 0; j < count; ++j) put(row[j], x[j]);
}

}  // namespace hotloop::logprob
