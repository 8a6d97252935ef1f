// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a draw: what one token weighs under a row of logits or probabilities, what is left of it after
// a rejection, and where a uniform number falls. Every step is one IEEE operation on given types, and every sum is
// of whole numbers, so the order of a sum does not matter: any instruction set, any split over threads or blocks,
// the reference in NumPy and the GPU emit the same tokens for the same seed. Files that include this are compiled
// without contraction of a * b + c into one operation (-ffp-contract=off, -fmad=false).
#pragma once

#include <cstdint>
#include <limits>

#include "core/macros.hpp"
#include "core/philox.hpp"
#include "core/vmath.hpp"

namespace hotloop::decode {

// Weights are multiples of 2^-42 in [0, 1]: 1024 of them add up in a double without rounding, 2^21 in 64 bits.
// Against the softmax the law is off by at most 2^-23 + V * 2^-43 in total variation: the rounding of the exponential
// in float32, and that to the grid (1.5e-8 at V = 131072).
inline constexpr double kWeightUnit = 0x1p-42;
inline constexpr std::int64_t kMaxVocabulary = std::int64_t{1} << 21;
// What a rejection leaves, as a share of the law, is a multiple of 2^-51: all of it adds up in a double.
inline constexpr double kResidualUnit = 0x1p-51;

// e^x for x <= 0 in float32, 0 below -30 (where the grid rounds to 0 anyway) and for NaN.
HOTLOOP_INLINE float exp_weight(float x) {
  constexpr float kLeast = -30.0f;
  const float clamped = x >= kLeast ? x : kLeast;
  const ::hotloop::detail::ExpParts e = ::hotloop::detail::exp_parts(clamped);
  const float y = (1.0f + e.y) * ::hotloop::detail::power_of_two(e.k);
  return x >= kLeast ? y : 0.0f;
}

// To the nearest multiple of the unit, ties to even: adding 1.5 * 2^52 units leaves no bit below the unit.
inline constexpr double kWeightRound = 1.5 * 0x1p52 * kWeightUnit;
HOTLOOP_INLINE double to_weight_grid(double w) { return (w + kWeightRound) - kWeightRound; }
HOTLOOP_INLINE double to_residual_grid(double r) {
  constexpr double kRound = 1.5 * 0x1p52 * kResidualUnit;
  return (r + kRound) - kRound;
}

// 1 / temperature, as the logits of a row are multiplied by it: `largest` of them times it stays finite, so that every
// temperature above 0 has a law. Where the product overflows, the largest becomes half of the largest number instead.
// No weight depends on it: logits that differ do so by 2^-25 of the largest at least, which is then past 2^100, and the
// law lies evenly on the tokens of the largest logit.
template <class R>
HOTLOOP_INLINE R scale_of(double temperature, R largest) {
  constexpr R kMost = std::numeric_limits<R>::max();
  const double inverse = 1.0 / temperature;
  R scale = inverse < static_cast<double>(kMost) ? static_cast<R>(inverse) : kMost;
  if (!(scale > R(0))) scale = std::numeric_limits<R>::denorm_min();  // 0 * -inf is NaN
  const R size = largest < R(0) ? -largest : largest;
  return size * scale <= kMost ? scale : kMost / R(2) / size;
}

// Weight of a logit z under the largest logit of its row.
template <class R>
HOTLOOP_INLINE double logit_weight(R z, R max) {
  return to_weight_grid(static_cast<double>(exp_weight(static_cast<float>(z - max))));
}
// Whether a number can be a probability; rounding may leave it a little above 1.
template <class R>
HOTLOOP_INLINE bool is_probability(R p) {
  return p >= R(0) && p <= R(1.001);
}
// A probability as it was given; what is none (NaN, negative, above 1) does no harm.
template <class R>
HOTLOOP_INLINE R given_probability(R p) {
  const R positive = p > R(0) ? p : R(0);
  return positive < R(1) ? positive : R(1);
}

HOTLOOP_INLINE std::uint64_t weight_units(double w) { return static_cast<std::uint64_t>(w * (1.0 / kWeightUnit)); }
HOTLOOP_INLINE std::uint64_t residual_units(double r) { return static_cast<std::uint64_t>(r * (1.0 / kResidualUnit)); }

// Whether a token of this weight passes min-p, whose bound is relative to the largest weight.
HOTLOOP_INLINE bool passes_min_p(double weight, double largest, double min_p) { return weight >= min_p * largest; }

// What is left of a token whose draft was rejected: max(a p - b q, 0).
HOTLOOP_INLINE double residual(double a, double p, double b, double q) {
  const double left = a * p - b * q;
  return to_residual_grid(left > 0.0 ? left : 0.0);
}

// A draft token is accepted if u <= p / q. With u in (0, 1], p = q always passes and p = 0 never does.
HOTLOOP_INLINE bool accepts(double u, double p, double q) { return p > 0.0 && u * q <= p; }

// Two uniforms in (0, 1] of 53 bits per position of a request and per try at that position. Sampling and verifying
// draw from different domains, so that one seed may serve the draft model and its verifier.
enum Domain : std::uint64_t { kSampling = 0, kVerification = 1 };
struct Uniforms {
  double accept;
  double pick;
};
HOTLOOP_INLINE double uniform53(std::uint32_t high, std::uint32_t low) {
  const std::uint64_t bits = (static_cast<std::uint64_t>(high) << 32) | low;
  return static_cast<double>((bits >> 11) + 1) * 0x1p-53;
}
HOTLOOP_INLINE Uniforms draw(std::uint64_t seed, std::uint64_t request, std::uint64_t position, std::uint64_t attempt,
                             Domain domain) {
  const std::uint64_t item = (request & 0xffffffffu) | ((attempt & 0xffffffu) << 32) | (domain << 56);
  const Philox4x32 words = philox(seed, position, item);
  return {uniform53(words.word[0], words.word[1]), uniform53(words.word[2], words.word[3])};
}

// The draw of u among `mass` units: the token at which the running sum of units first reaches this number, 1 to mass.
HOTLOOP_INLINE std::uint64_t target_units(double u, std::uint64_t mass) {
  const double wanted = u * static_cast<double>(mass);
  std::uint64_t units = static_cast<std::uint64_t>(wanted);
  units += static_cast<double>(units) < wanted ? 1 : 0;
  units = units < 1 ? 1 : units;
  return units < mass ? units : mass;
}

// Typical acceptance (Medusa): the least probability of a token that counts as typical.
HOTLOOP_INLINE double typical_threshold(double entropy, double epsilon, double alpha) {
  const double scaled = alpha * vexp(-entropy);
  return scaled < epsilon ? scaled : epsilon;
}

}  // namespace hotloop::decode
