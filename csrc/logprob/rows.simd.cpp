// SPDX-License-Identifier: Apache-2.0
// CPU row loops of one lm_head. A row of a tile is taken in chunks that fit L1: the chunk is converted to z
// once, its maximum found, and the sums of exponentials follow from the copy in L1. The tile itself is
// read once from wherever the matrix product left it (L2 or L3) and, for the gradient, written once.
#include "logprob/rows.hpp"

#include <atomic>
#include <cstdint>
#include <limits>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "logprob/heads.hpp"
#include "logprob/row_chunks.hpp"

#include "core/simd_begin.hpp"

namespace {

using namespace hotloop::logprob;

template <class Storage, bool kCap, bool kAll>
void statistics_rows(const StatisticsCall& call) {
  using R = typename Accumulate<Storage>::type;
  const auto tile = as_matrix<const Storage>(call.tile, "row_statistics", "tile", false);
  const LogitMap<R> logit = logit_map<R>(call.transform);
  const R* bias = static_cast<const R*>(call.bias.data);
  const std::int64_t n = tile.rows;
  R* statistics = static_cast<R*>(call.statistics);
  parallel_for(n, grain_rows(tile.cols), [&](std::int64_t begin, std::int64_t end) {
    alignas(64) R z[kChunk];
    for (std::int64_t i = begin; i < end; ++i) {
      const Storage* row = tile.row(i);
      R running_max = statistics[kMax * n + i];
      R sum = statistics[kSumExp * n + i];
      R z_sum = statistics[kSumZExp * n + i];
      R square_sum = statistics[kSumExp2 * n + i];
      R plain_sum = statistics[kSumZ * n + i];
      for (std::int64_t first = 0; first < tile.cols; first += kChunk) {
        const std::int64_t count = tile.cols - first < kChunk ? tile.cols - first : kChunk;
        const R chunk_max = load_logits<kCap>(row + first, bias == nullptr ? nullptr : bias + first, count, logit, z);
        if (chunk_max > running_max) {
          const R rescale = vexp_weight(running_max - chunk_max);
          // The weighted sum is of z - max and not of z: the entropy is then exact to the rounding of log p, and
          // not to that of z. It moves with the maximum (of nothing yet, it stays 0).
          z_sum = sum > R(0) ? rescale * (z_sum + (running_max - chunk_max) * sum) : z_sum;
          sum *= rescale;
          square_sum *= rescale * rescale;
          running_max = chunk_max;
          if (call.argmax != nullptr) {
            std::int64_t at = 0;  // the first of equal maxima, as torch.argmax
            while (z[at] != chunk_max) ++at;
            call.argmax[i] = call.first_column + first + at;
          }
        }
        // A chunk of -inf only adds nothing (and -inf - -inf would be NaN); NaN still reaches the sum.
        const R shift = running_max == -std::numeric_limits<R>::infinity() ? R(0) : running_max;
        R s = 0, sz = 0, s2 = 0, sp = 0;
#pragma omp simd reduction(+ : s, sz, s2, sp)
        for (std::int64_t j = 0; j < count; ++j) {
          const R e = vexp_weight(z[j] - shift);
          s += e;
          if (kAll) {
            sz += e == R(0) ? R(0) : e * (z[j] - shift);
            s2 += e * e;
            sp += z[j];
          }
        }
        sum += s;
        z_sum += sz;
        square_sum += s2;
        plain_sum += sp;
        const std::int64_t label = call.labels[i] - call.first_column - first;
        if (label >= 0 && label < count) statistics[kLabelZ * n + i] = z[label];
      }
      statistics[kMax * n + i] = running_max;
      statistics[kSumExp * n + i] = sum;
      if (kAll) {
        statistics[kSumZExp * n + i] = z_sum;
        statistics[kSumExp2 * n + i] = square_sum;
        statistics[kSumZ * n + i] = plain_sum;
      }
    }
  });
}

template <class Storage, bool kCap>
void gradient_rows(const GradientCall& call) {
  using R = typename Accumulate<Storage>::type;
  const auto tile = as_matrix<Storage>(call.tile, "row_gradient", "tile", true);
  const LogitMap<R> logit = logit_map<R>(call.transform);
  const R* bias = static_cast<const R*>(call.bias.data);
  const std::int64_t n = tile.rows;
  const R* coefficients = static_cast<const R*>(call.coefficients);
  parallel_for(n, grain_rows(tile.cols), [&](std::int64_t begin, std::int64_t end) {
    alignas(64) R z[kChunk];
    for (std::int64_t i = begin; i < end; ++i) {
      Storage* row = tile.row(i);
      const RowGradient<R> g{coefficients[i], coefficients[n + i], coefficients[2 * n + i], coefficients[3 * n + i],
                             coefficients[4 * n + i]};
      for (std::int64_t first = 0; first < tile.cols; first += kChunk) {
        const std::int64_t count = tile.cols - first < kChunk ? tile.cols - first : kChunk;
        load_logits<kCap>(row + first, bias == nullptr ? nullptr : bias + first, count, logit, z);
        Storage* out = row + first;
        const std::int64_t label = call.labels[i] - call.first_column - first;
        const bool here = label >= 0 && label < count;
        const R label_z = here ? z[label] : R(0);
#pragma omp simd
        for (std::int64_t j = 0; j < count; ++j) z[j] = g.at(z[j]) * logit.template slope<kCap>(z[j]);
        store_chunk(z, count, out);
        if (here) put(out[label], (g.at(label_z) + coefficients[5 * n + i]) * logit.template slope<kCap>(label_z));
      }
    }
  });
}

}  // namespace

void row_statistics(const logprob::StatisticsCall& call) {
  note_simd_level();
  dispatch_float(call.tile.dtype, "row_statistics", "tile", [&](auto storage) {
    using Storage = decltype(storage);
    const bool cap = call.transform.softcap > 0;
    if (cap && call.all) return statistics_rows<Storage, true, true>(call);
    if (cap) return statistics_rows<Storage, true, false>(call);
    if (call.all) return statistics_rows<Storage, false, true>(call);
    return statistics_rows<Storage, false, false>(call);
  });
}

void row_gradient(const logprob::GradientCall& call) {
  note_simd_level();
  dispatch_float(call.tile.dtype, "row_gradient", "tile", [&](auto storage) {
    using Storage = decltype(storage);
    return call.transform.softcap > 0 ? gradient_rows<Storage, true>(call) : gradient_rows<Storage, false>(call);
  });
}

#include "core/simd_end.hpp"
