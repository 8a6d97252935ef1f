// SPDX-License-Identifier: Apache-2.0
#include "table/store/initialize.hpp"

#include <atomic>
#include <cstdint>

#include "core/philox.hpp"
#include "core/simd.hpp"
#include "table/store/first_values.hpp"

#include "core/simd_begin.hpp"

namespace {

using table::box_muller;
using table::Initializer;
using table::stretched;

constexpr int kBlocks = 16;  // of four elements: one vector of counters

template <bool kGauss>
HOTLOOP_INLINE void draw(float first, float second, std::uint64_t seed, std::uint64_t key, std::int64_t block,
                         std::int64_t count, float* out) {
  float u[4][kBlocks];
#pragma GCC ivdep
  for (int i = 0; i < kBlocks; ++i) {
    const Philox4x32 r = philox(seed, static_cast<std::uint64_t>(block + i), key);
    u[0][i] = uniform_open_closed(r.word[0]);
    u[1][i] = uniform_open_closed(r.word[1]);
    u[2][i] = uniform_open_closed(r.word[2]);
    u[3][i] = uniform_open_closed(r.word[3]);
  }
  if constexpr (kGauss) {
    for (int pair = 0; pair < 4; pair += 2) {
#pragma GCC ivdep
      for (int i = 0; i < kBlocks; ++i) {
        box_muller(first, second, u[pair][i], u[pair + 1][i]);
      }
    }
  } else {
    const float width = second - first;
    for (int w = 0; w < 4; ++w) {
#pragma GCC ivdep
      for (int i = 0; i < kBlocks; ++i) u[w][i] = stretched(first, width, u[w][i]);
    }
  }
  if (count == 4 * kBlocks) {
    for (int i = 0; i < kBlocks; ++i) {
      for (int w = 0; w < 4; ++w) out[4 * i + w] = u[w][i];
    }
  } else {
    for (std::int64_t j = 0; j < count; ++j) out[j] = u[j % 4][j / 4];
  }
}

}  // namespace

void table_initialize_row(Initializer kind, float first, float second, std::uint64_t seed, std::uint64_t key,
                          std::int64_t dim, float* out) {
  if (kind == Initializer::kConstant) {
    for (std::int64_t j = 0; j < dim; ++j) out[j] = first;
    return;
  }
  for (std::int64_t j = 0; j < dim; j += 4 * kBlocks) {
    const std::int64_t count = dim - j < 4 * kBlocks ? dim - j : 4 * kBlocks;
    if (kind == Initializer::kUniform)
      draw<false>(first, second, seed, key, j / 4, count, out + j);
    else
      draw<true>(first, second, seed, key, j / 4, count, out + j);
  }
}

#include "core/simd_end.hpp"
