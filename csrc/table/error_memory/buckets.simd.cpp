// SPDX-License-Identifier: Apache-2.0
// SimHash buckets. Compiled without a * b + c in one rounding (CMakeLists.txt): a sample falls into the same bucket on
// every machine.
#include <cstdint>

#include "core/simd.hpp"
#include "table/error_memory/error_memory.hpp"
#include "table/error_memory/tile.hpp"

#include "core/simd_begin.hpp"

void pack_projections(const table::BucketCall& call, float* panels) {
  constexpr std::int64_t kSlots = table::Panel<float>::kSlots;
  const std::int64_t columns = call.repeats * call.bits, dim = call.dim;
  for (std::int64_t c = 0; c < (columns + kSlots - 1) / kSlots * kSlots; ++c) {
    float* out = panels + c / kSlots * kSlots * dim + c % kSlots;
    for (std::int64_t j = 0; j < dim; ++j) out[j * kSlots] = c < columns ? call.projections[c * dim + j] : 0.0f;
  }
}

void bucket_rows(const table::BucketCall& call, const table::BucketRange& range) {
  note_simd_level();
  constexpr std::int64_t kSlots = table::Panel<float>::kSlots;
  const std::int64_t columns = call.repeats * call.bits, dim = call.dim, bits = call.bits;
  for (std::int64_t g = range.begin; g < range.end; ++g) {
    const std::int64_t first = g * table::kGroup;
    const std::int64_t here = call.rows - first < table::kGroup ? call.rows - first : table::kGroup;
    for (std::int64_t j = 0; j < dim; ++j) {
      for (std::int64_t q = 0; q < table::kGroup; ++q) {
        range.group[j * table::kGroup + q] = q < here ? call.hidden[(first + q) * dim + j] : 0.0f;
      }
    }
    for (std::int64_t q = 0; q < here; ++q) {
      for (std::int64_t r = 0; r < call.repeats; ++r) call.buckets[(first + q) * call.repeats + r] = 0;
    }
    // A repeat's bits may lie in two tiles: each adds its own.
    for (std::int64_t c0 = 0; c0 < columns; c0 += table::kMostTileSlots) {
      const std::int64_t left = columns - c0;
      const std::int64_t count = left < table::kMostTileSlots ? left : table::kMostTileSlots;
      for (std::int64_t c = 0; c < count; c += kSlots) {
        table::multiply_panel(range.group, range.panels + (c0 + c) * dim, dim, range.tile + c);
      }
      for (std::int64_t q = 0; q < here; ++q) {
        const float* row = range.tile + q * table::kMostTileSlots;
        std::int32_t* buckets = call.buckets + (first + q) * call.repeats;
        for (std::int64_t c = c0; c < c0 + count;) {
          const std::int64_t r = c / bits, l0 = c % bits;
          const std::int64_t n = bits - l0 < c0 + count - c ? bits - l0 : c0 + count - c;
          const float* z = row + (c - c0);
          std::int32_t bucket = 0;
#pragma omp simd reduction(| : bucket)
          for (std::int32_t l = 0; l < static_cast<std::int32_t>(n); ++l) bucket |= (z[l] > 0.0f ? 1 : 0) << l;
          buckets[r] |= bucket << l0;
          c += n;
        }
      }
    }
  }
}

#include "core/simd_end.hpp"
