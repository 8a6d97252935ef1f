// SPDX-License-Identifier: Apache-2.0
// The passes over a logits row. A chunk of the row is converted to logits in an L1 buffer: half types widened, the
// second model mixed in, the bias added, divided by the temperature. The weights are computed from the buffer. Sums are
// of multiples of one unit and small enough for a double, hence exact, so lanes, threads and chunks may add in any
// order.
#include "decode/rows.hpp"

#include <atomic>
#include <bit>
#include <cstdint>
#include <limits>

#include "core/bisect.hpp"
#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "core/simd.hpp"
#include "decode/heads.hpp"

#include "core/simd_begin.hpp"

namespace {

using namespace hotloop::decode;

// Chunks worth a thread: 32768 tokens, about 7 us of exponentials. A busy machine makes a smaller share dear: starting
// a second thread then takes longer than the row.
constexpr std::int64_t kGrainChunks = 64;

template <class R>
HOTLOOP_INLINE R negative_infinity() {
  return -std::numeric_limits<R>::infinity();
}

template <class Storage, class R>
HOTLOOP_INLINE void widen(const Storage* x, std::int64_t count, R* z) {
#pragma GCC ivdep
  for (std::int64_t j = 0; j < count; ++j) z[j] = static_cast<R>(to_float(x[j]));
}

template <class R>
HOTLOOP_INLINE void add_bias(const RowSource& row, std::int64_t first, std::int64_t count, R* z) {
  std::int64_t at = first_where(row.biases, [&](std::int64_t i) { return row.bias_ids[i] >= first; });
  for (; at < row.biases && row.bias_ids[at] < first + count; ++at) {
    z[row.bias_ids[at] - first] = z[row.bias_ids[at] - first] + static_cast<R>(row.bias[at]);
  }
}

// Logits of a chunk, or its probabilities clamped to [0, 1].
template <class Storage, class R>
HOTLOOP_INLINE void load(const RowSource& row, std::int64_t first, std::int64_t count, R* z) {
  widen(static_cast<const Storage*>(row.data) + first, count, z);
  if (!row.logits) {
    int wrong = 0;
#pragma omp simd reduction(| : wrong)
    for (std::int64_t j = 0; j < count; ++j) {
      wrong |= is_probability(z[j]) ? 0 : 1;
      z[j] = given_probability(z[j]);
    }
    if (wrong != 0) refuse(row);
    return;
  }
  if (row.reference != nullptr) {
    R second[kChunk];
    widen(static_cast<const Storage*>(row.reference) + first, count, second);
    const R mine = static_cast<R>(1.0 - row.mixture), theirs = static_cast<R>(row.mixture);
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) z[j] = mine * z[j] + theirs * second[j];
  }
  if (row.biases > 0) add_bias(row, first, count, z);
  const R scale = static_cast<R>(row.scale);
  if (scale != R(1)) {
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) z[j] = z[j] * scale;
  }
}

template <class R>
HOTLOOP_INLINE R largest(const R* z, std::int64_t count) {
  R maximum = negative_infinity<R>();
#pragma omp simd reduction(max : maximum)
  for (std::int64_t j = 0; j < count; ++j) maximum = z[j] > maximum ? z[j] : maximum;
  return maximum;
}

// Weights of a loaded chunk, the untruncated ones.
template <class R>
HOTLOOP_INLINE void weigh(const RowLaw& law, const R* z, std::int64_t count, double* w) {
  if (!law.source.logits) {
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) w[j] = to_weight_grid(static_cast<double>(z[j]));
    return;
  }
  float e[kChunk];
  const R max = static_cast<R>(law.max);
#pragma GCC ivdep
  for (std::int64_t j = 0; j < count; ++j) e[j] = exp_weight(static_cast<float>(z[j] - max));
#pragma GCC ivdep
  for (std::int64_t j = 0; j < count; ++j) w[j] = to_weight_grid(static_cast<double>(e[j]));
}

template <class R>
HOTLOOP_INLINE void truncate(const RowLaw& law, const R* z, std::int64_t count, double* w) {
  const R threshold = static_cast<R>(law.threshold);
  const double least = law.min_weight;
#pragma GCC ivdep
  for (std::int64_t j = 0; j < count; ++j) {
    const double reached = z[j] >= threshold ? w[j] : 0.0;
    w[j] = reached >= least ? reached : 0.0;
  }
}

// Nothing but a temperature between the stored numbers and the logits: the common case, taken without a buffer.
HOTLOOP_INLINE bool plain(const RowSource& row) { return row.logits && row.reference == nullptr && row.biases == 0; }

template <class Storage, class R>
HOTLOOP_INLINE R plain_largest(const RowSource& row, std::int64_t first, std::int64_t count) {
  const Storage* x = static_cast<const Storage*>(row.data) + first;
  R maximum = negative_infinity<R>();
#pragma omp simd reduction(max : maximum)
  for (std::int64_t j = 0; j < count; ++j) {
    const R value = static_cast<R>(to_float(x[j]));
    maximum = value > maximum ? value : maximum;
  }
  return maximum;
}

template <class Storage, class R>
HOTLOOP_INLINE void plain_exponentials(const RowSource& row, R max, std::int64_t first, std::int64_t count, float* e) {
  const Storage* x = static_cast<const Storage*>(row.data) + first;
  const R scale = static_cast<R>(row.scale);
#pragma GCC ivdep
  for (std::int64_t j = 0; j < count; ++j) {
    e[j] = exp_weight(static_cast<float>(static_cast<R>(to_float(x[j])) * scale - max));
  }
}

// In units: the last bits of what to_weight_grid rounds are the weight as a whole number.
template <class Storage, class R>
HOTLOOP_INLINE std::uint64_t plain_mass(const RowSource& row, R max, std::int64_t first, std::int64_t count) {
  float e[kChunk];
  plain_exponentials<Storage>(row, max, first, count, e);
  std::uint64_t total = 0;
#pragma omp simd reduction(+ : total)
  for (std::int64_t j = 0; j < count; ++j)
    total += std::bit_cast<std::uint64_t>(static_cast<double>(e[j]) + kWeightRound);
  return total - static_cast<std::uint64_t>(count) * std::bit_cast<std::uint64_t>(kWeightRound);
}

// No truncation either.
HOTLOOP_INLINE bool whole(const RowLaw& law) {
  return law.threshold == negative_infinity<double>() && !(law.min_weight > 0.0);
}

HOTLOOP_INLINE double sum(const double* x, std::int64_t count) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (std::int64_t j = 0; j < count; ++j) total += x[j];
  return total;
}

template <class Storage>
void weights_of(const RowLaw& law, std::int64_t first, std::int64_t count, double* w) {
  using R = typename Accumulate<Storage>::type;
  alignas(64) R z[kChunk];
  load<Storage>(law.source, first, count, z);
  weigh(law, z, count, w);
  truncate(law, z, count, w);
}

template <class Storage>
void probs_of(const RowLaw& law, std::int64_t first, std::int64_t count, double* p) {
  using R = typename Accumulate<Storage>::type;
  if (law.greedy) {
    for (std::int64_t j = 0; j < count; ++j) p[j] = first + j == law.best ? 1.0 : 0.0;
    return;
  }
  if (law.as_given) {
    alignas(64) R z[kChunk];
    load<Storage>(law.source, first, count, z);
    for (std::int64_t j = 0; j < count; ++j) p[j] = static_cast<double>(z[j]);
    return;
  }
  const double inverse = law.inverse;
  if (plain(law.source) && whole(law)) {
    float e[kChunk];
    plain_exponentials<Storage>(law.source, static_cast<typename Accumulate<Storage>::type>(law.max), first, count, e);
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) p[j] = to_weight_grid(static_cast<double>(e[j])) * inverse;
    return;
  }
  weights_of<Storage>(law, first, count, p);
#pragma GCC ivdep
  for (std::int64_t j = 0; j < count; ++j) p[j] = p[j] * inverse;
}

HOTLOOP_INLINE std::int64_t tokens_of(const RowSource& row, std::int64_t chunk) {
  const std::int64_t left = row.vocabulary - chunk * kChunk;
  return left < kChunk ? left : kChunk;
}

// f(storage, chunk, first, count) for every chunk, and the sum of what it returns.
template <class F>
std::uint64_t over_chunks(const RowSource& row, F&& f) {
  std::atomic<std::uint64_t> total{0};
  dispatch_float(row.dtype, "decode", "values", [&](auto storage) {
    parallel_for(chunk_count(row.vocabulary), kGrainChunks, [&](std::int64_t begin, std::int64_t end) {
      std::uint64_t units = 0;
      for (std::int64_t c = begin; c < end; ++c) units += f(storage, c, c * kChunk, tokens_of(row, c));
      total.fetch_add(units, std::memory_order_relaxed);
    });
  });
  return total.load();
}

}  // namespace

double row_max(const RowSource& row, double* chunk_max) {
  note_simd_level();
  over_chunks(row, [&](auto storage, std::int64_t c, std::int64_t first, std::int64_t count) -> std::uint64_t {
    using Storage = decltype(storage);
    using R = typename Accumulate<Storage>::type;
    if (plain(row)) {
      chunk_max[c] = static_cast<double>(plain_largest<Storage, R>(row, first, count));
      return 0;
    }
    alignas(64) R z[kChunk];
    load<Storage>(row, first, count, z);
    chunk_max[c] = static_cast<double>(largest(z, count));
    return 0;
  });
  double maximum = negative_infinity<double>();
  for (std::int64_t c = 0; c < chunk_count(row.vocabulary); ++c) {
    maximum = chunk_max[c] > maximum ? chunk_max[c] : maximum;
  }
  return maximum;
}

std::uint64_t row_mass(const RowLaw& law, const double* chunk_max, std::uint64_t* chunk_mass) {
  const bool in_place = plain(law.source) && whole(law);
  return over_chunks(law.source, [&](auto storage, std::int64_t c, std::int64_t first, std::int64_t count) {
    // Everything in the chunk weighs 0: see exp_weight.
    if (chunk_max != nullptr && law.source.logits && chunk_max[c] - law.max < -30.0001) return chunk_mass[c] = 0;
    using Storage = decltype(storage);
    using R = typename Accumulate<Storage>::type;
    if (in_place) return chunk_mass[c] = plain_mass<Storage, R>(law.source, static_cast<R>(law.max), first, count);
    alignas(64) double w[kChunk];
    weights_of<Storage>(law, first, count, w);
    return chunk_mass[c] = weight_units(sum(w, count));
  });
}

std::uint64_t row_entropy(const RowLaw& law, const double* chunk_max) {
  return over_chunks(law.source, [&](auto storage, std::int64_t c, std::int64_t first, std::int64_t count) {
    using Storage = decltype(storage);
    using R = typename Accumulate<Storage>::type;
    if (law.source.logits && chunk_max[c] - law.max < -30.0001) return std::uint64_t{0};
    alignas(64) R z[kChunk];
    alignas(64) double w[kChunk];
    load<Storage>(law.source, first, count, z);
    weigh(law, z, count, w);
    const double max = law.max;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) {
      const double below = max - static_cast<double>(z[j]);
      w[j] = to_weight_grid(w[j] > 0.0 ? w[j] * below : 0.0);
    }
    return weight_units(sum(w, count));
  });
}

void row_weights(const RowLaw& law, std::int64_t first, std::int64_t count, double* weights) {
  dispatch_float(law.source.dtype, "decode", "values",
                 [&](auto storage) { weights_of<decltype(storage)>(law, first, count, weights); });
}

void row_probs(const RowLaw& law, std::int64_t first, std::int64_t count, double* probs) {
  dispatch_float(law.source.dtype, "decode", "values",
                 [&](auto storage) { probs_of<decltype(storage)>(law, first, count, probs); });
}

void row_logits(const RowSource& row, std::int64_t first, std::int64_t count, double* z) {
  dispatch_float(row.dtype, "decode", "values", [&](auto storage) {
    using R = typename Accumulate<decltype(storage)>::type;
    alignas(64) R loaded[kChunk];
    load<decltype(storage)>(row, first, count, loaded);
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) z[j] = static_cast<double>(loaded[j]);
  });
}

void residual_chunk(const ResidualCall& call, std::int64_t first, std::int64_t count, double* left) {
  alignas(64) double q[kChunk];
  double edited[kChunk];
  HOTLOOP_SIMD_NAMESPACE::row_probs(*call.p, first, count, left);
  const double a = call.a, b = call.b;
  const std::int64_t begin = first_where(call.edit_count, [&](std::int64_t i) { return call.edits[i].id >= first; });
  std::int64_t end = begin;
  for (; end < call.edit_count && call.edits[end].id < first + count; ++end) {
    edited[end - begin] = call.edits[end].spared ? residual(a, left[call.edits[end].id - first], 0.0, 0.0) : 0.0;
  }
  if (call.q != nullptr) {
    HOTLOOP_SIMD_NAMESPACE::row_probs(*call.q, first, count, q);
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) left[j] = residual(a, left[j], b, q[j]);
  } else {
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) left[j] = residual(a, left[j], 0.0, 0.0);
  }
  for (std::int64_t i = begin; i < end; ++i) left[call.edits[i].id - first] = edited[i - begin];
}

std::uint64_t row_residual(const ResidualCall& call, std::uint64_t* chunk_mass) {
  std::atomic<std::uint64_t> total{0};
  const RowSource& row = call.p->source;
  parallel_for(chunk_count(row.vocabulary), kGrainChunks, [&](std::int64_t begin, std::int64_t end) {
    alignas(64) double left[kChunk];
    std::uint64_t units = 0;
    for (std::int64_t c = begin; c < end; ++c) {
      const std::int64_t count = tokens_of(row, c);
      HOTLOOP_SIMD_NAMESPACE::residual_chunk(call, c * kChunk, count, left);
      units += chunk_mass[c] = residual_units(sum(left, count));
    }
    total.fetch_add(units, std::memory_order_relaxed);
  });
  return total.load();
}

#include "core/simd_end.hpp"
