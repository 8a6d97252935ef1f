// SPDX-License-Identifier: Apache-2.0
// Stochastic rounding of one weight to a half type, for the loops of the CPU and of the GPU.
#pragma once

#include <bit>
#include <cstdint>

#include "core/dtype.hpp"
#include "core/macros.hpp"

namespace hotloop::table {

// To one of the two neighbours of x, up with the probability that x is on the way, in steps of 2^-16 (bfloat16, and
// float16 below its normal numbers) or 2^-13. What the type holds stays as it is; NaN and infinity too.
HOTLOOP_INLINE std::uint16_t round_by(BFloat16, float x, std::uint32_t r) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? static_cast<std::uint16_t>((bits + r) >> 16) : bfloat16_bits(x);
}
HOTLOOP_INLINE float on_half_grid(float x, std::uint32_t r) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t size = bits & 0x7fffffffu;
  const std::uint32_t is_normal = mask_above(size, 0x387fffffu);
  const std::uint32_t is_finite = ~mask_above(size, 0x7f7fffffu);
  const std::uint32_t normal = (size + (r >> 3)) & ~0x1fffu;
  // Below 2^-14 the step is 2^-24 everywhere.
  const float steps = std::bit_cast<float>(size & ~is_normal) * 0x1p24f;
  const std::int32_t whole = static_cast<std::int32_t>(steps);
  const float left = steps - static_cast<float>(whole);
  const std::int32_t up = static_cast<float>(static_cast<std::int32_t>(r)) * 0x1p-16f < left ? 1 : 0;
  const std::uint32_t small = std::bit_cast<std::uint32_t>(static_cast<float>(whole + up) * 0x1p-24f);
  const std::uint32_t rounded = (is_normal & normal) | (~is_normal & small) | (bits & 0x80000000u);
  return std::bit_cast<float>((is_finite & rounded) | (~is_finite & bits));
}
HOTLOOP_INLINE std::uint16_t round_by(Float16, float x, std::uint32_t r) { return half_bits(on_half_grid(x, r)); }

}  // namespace hotloop::table
