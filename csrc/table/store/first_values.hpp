// SPDX-License-Identifier: Apache-2.0
// How draws become the first values of a row: the formulas, for the loops of the CPU and of the GPU. Files that include
// this are compiled without contraction of a * b + c, and the bits are the same everywhere.
#pragma once

#include <cstdint>

#include "core/macros.hpp"
#include "core/philox.hpp"
#include "core/rules.hpp"
#include "core/vmath.hpp"
#include "table/store/layout.hpp"

namespace hotloop::table {

// cos and sin of a whole turn times u, u in (0, 1], by Taylor polynomials on an eighth of a turn.
HOTLOOP_INLINE void turn(float u, float& c, float& s) {
  const float quarters = u * 4.0f;
  const float k = static_cast<float>(static_cast<int>(quarters + 0.5f));
  const float x = (quarters - k) * 1.57079632679f;  // at most pi / 4 in size
  const float x2 = x * x;
  const float sin_x =
      x * (1.0f + x2 * (-1.6666667e-1f + x2 * (8.333334e-3f + x2 * (-1.984127e-4f + x2 * 2.75573e-6f))));
  const float cos_x = 1.0f + x2 * (-0.5f + x2 * (4.1666668e-2f + x2 * (-1.3888889e-3f + x2 * 2.4801587e-5f)));
  const int q = static_cast<int>(k) & 3;
  const float a = (q & 1) != 0 ? sin_x : cos_x;
  const float b = (q & 1) != 0 ? cos_x : sin_x;
  c = (q == 1 || q == 2) ? -a : a;
  s = q >= 2 ? -b : b;
}

// Two uniform numbers in (0, 1] to two normal ones.
HOTLOOP_INLINE void box_muller(float mean, float deviation, float& u, float& v) {
  const float radius = square_root(-2.0f * vlog_portable(u));
  float c, s;
  turn(v, c, s);
  u = mean + deviation * (radius * c);
  v = mean + deviation * (radius * s);
}

HOTLOOP_INLINE float stretched(float low, float width, float u) { return low + width * u; }

// Elements 4 block to 4 block + 3 of a row: see initialize.hpp.
HOTLOOP_INLINE void first_values(Initializer kind, float first, float second, std::uint64_t seed, std::uint64_t key,
                                 std::int64_t block, float (&out)[4]) {
  if (kind == Initializer::kConstant) {
    for (float& x : out) x = first;
    return;
  }
  const Philox4x32 r = philox(seed, static_cast<std::uint64_t>(block), key);
  for (int w = 0; w < 4; ++w) out[w] = uniform_open_closed(r.word[w]);
  if (kind == Initializer::kUniform) {
    for (float& x : out) x = stretched(first, second - first, x);
    return;
  }
  box_muller(first, second, out[0], out[1]);
  box_muller(first, second, out[2], out[3]);
}

}  // namespace hotloop::table
