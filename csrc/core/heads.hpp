// SPDX-License-Identifier: Apache-2.0
// Two heads that use every kind of column, for the tests of the pointwise loop itself.
#pragma once

#include "core/formulas.hpp"
#include "core/head.hpp"

namespace hotloop::core {

// Clipped policy surrogate of one token. d: log-probability; c: its old value, advantage (of the group); p: lower and
// upper clip; out: ratio, whether the clip is in force, k3 estimate of the divergence from the old policy.
struct ClippedSurrogate : pointwise::Head<1, 1, 2, 1, 3> {
  HOTLOOP_HEAD("clipped_surrogate") {
    const T log_ratio = d[0] - c[0];
    const T ratio = vexp(log_ratio);
    const R low = R(1) - p[0], high = R(1) + p[1];
    const T clipped = select(value_of(ratio) < low, T(low), select(value_of(ratio) > high, T(high), ratio));
    const T plain = -(ratio * c[1]), bounded = -(clipped * c[1]);
    const bool bound = value_of(bounded) > value_of(plain);
    out[0] = value_of(ratio);
    out[1] = bound ? R(1) : R(0);
    out[2] = value_of(log_ratio) + (vexp(-value_of(log_ratio)) - R(1));
    return select(bound, bounded, plain);
  }
};

// k3 estimate of a divergence without a gradient. c: log-probability, the reference's.
struct K3 : pointwise::Head<0, 2, 0> {
  HOTLOOP_HEAD("k3") { return vexpm1(c[1] - c[0]) - (c[1] - c[0]); }
};

using Heads = pointwise::HeadList<ClippedSurrogate, K3>;

}  // namespace hotloop::core
