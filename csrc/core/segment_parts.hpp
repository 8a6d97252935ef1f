// SPDX-License-Identifier: Apache-2.0
// What is known of one column of one stretch of a segment, and how two such parts become one: shared by the CPU and the
// CUDA loops. Parts are kept in double, whatever the values are.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/dtype.hpp"
#include "core/macros.hpp"
#include "core/segments.hpp"

namespace hotloop::segments {

// In the type of the maths; the smallest value is the largest of the negated ones.
template <Reduction kReduction, class Storage>
HOTLOOP_INLINE auto value_of(Storage x) {
  return kReduction == Reduction::kMin ? -to_float(x) : to_float(x);
}

// The part of a segment without values, the neutral element of merge. kMean is a kSum that is divided at the end.
template <Reduction kReduction>
HOTLOOP_INLINE constexpr Part nothing() {
  return {kReduction == Reduction::kSum ? 0.0 : -std::numeric_limits<double>::infinity(), 0.0, -1};
}

// Of the largest values the first NaN counts, else the first of equal ones, in whatever order parts come.
HOTLOOP_INLINE bool larger(const Part& more, const Part& part) {
  const bool nan = part.value != part.value, more_nan = more.value != more.value;
  if (nan != more_nan) return more_nan;
  if (!nan && more.value != part.value) return more.value > part.value;
  return more.at >= 0 && (part.at < 0 || more.at < part.at);
}

template <Reduction kReduction>
HOTLOOP_INLINE void merge(Part& part, const Part& more) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if constexpr (kReduction == Reduction::kSum) {
    part.value += more.value;
    part.weight += more.weight;
  } else if constexpr (kReduction == Reduction::kLogSumExp) {
    if (more.weight == 0.0) return;
    if (part.weight == 0.0) {
      part = more;
    } else if (part.value != part.value || more.value != more.value) {
      part.value = std::numeric_limits<double>::quiet_NaN();
    } else {
      const double largest = part.value > more.value ? part.value : more.value;
      if (largest == kInfinity) {
        part.weight = 1.0;  // whatever the rest is
      } else {
        part.weight = part.weight * ::exp(part.value - largest) + more.weight * ::exp(more.value - largest);
      }
      part.value = largest;
    }
  } else {
    if (larger(more, part)) part = more;
  }
}

// The result of a whole segment, of which `count` values count.
template <Reduction kReduction>
HOTLOOP_INLINE double result_of(const Part& part, bool mean, double count) {
  double x = part.value;
  if constexpr (kReduction == Reduction::kMin) x = -x;
  if constexpr (kReduction == Reduction::kLogSumExp) x = part.weight > 0.0 ? x + ::log(part.weight) : x;
  if (mean) x = count > 0.0 ? x / count : 0.0;
  return x;
}

// The factor of the gradient of a log-sum-exp. Where the result is -inf so are all values, and any finite number in its
// place makes the factor 0.
template <class R>
HOTLOOP_INLINE R shifted(R x, R lse) {
  return x - (lse == -std::numeric_limits<R>::infinity() ? R(0) : lse);
}

}  // namespace hotloop::segments
