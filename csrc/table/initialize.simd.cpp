#include "table/initialize.hpp"

#include <atomic>
#include <cstdint>

#include "core/philox.hpp"
#include "core/simd.hpp"
#include "core/vmath.hpp"

#include "core/simd_begin.hpp"

namespace {

using table::Initializer;

constexpr int kBlocks = 16;  // of four elements: one vector of counters

// cos and sin of a whole turn times u, u in (0, 1], by Taylor polynomials on an eighth of a turn.
HOTLOOP_INLINE void turn(float u, float& c, float& s) {
  const float quarters = u * 4.0f;
  const float k = static_cast<float>(static_cast<int>(quarters + 0.5f));
  const float x = (quarters - k) * 1.57079632679f;  // at most pi / 4 in size
  const float x2 = x * x;
  const float sin_x = x * (1.0f + x2 * (-1.6666667e-1f + x2 * (8.333334e-3f + x2 * (-1.984127e-4f + x2 * 2.75573e-6f))));
  const float cos_x = 1.0f + x2 * (-0.5f + x2 * (4.1666668e-2f + x2 * (-1.3888889e-3f + x2 * 2.4801587e-5f)));
  const int q = static_cast<int>(k) & 3;
  const float a = (q & 1) != 0 ? sin_x : cos_x;
  const float b = (q & 1) != 0 ? cos_x : sin_x;
  c = (q == 1 || q == 2) ? -a : a;
  s = q >= 2 ? -b : b;
}

template <bool kGauss>
HOTLOOP_INLINE void draw(float first, float second, std::uint64_t seed, std::uint64_t key, std::int64_t block, std::int64_t count,
                         float* out) {
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
        const float radius = __builtin_sqrtf(-2.0f * vlog(u[pair][i]));
        float c, s;
        turn(u[pair + 1][i], c, s);
        u[pair][i] = first + second * (radius * c);
        u[pair + 1][i] = first + second * (radius * s);
      }
    }
  } else {
    const float width = second - first;
    for (int w = 0; w < 4; ++w) {
#pragma GCC ivdep
      for (int i = 0; i < kBlocks; ++i) u[w][i] = first + width * u[w][i];
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
    if (kind == Initializer::kUniform) draw<false>(first, second, seed, key, j / 4, count, out + j);
    else draw<true>(first, second, seed, key, j / 4, count, out + j);
  }
}

#include "core/simd_end.hpp"
