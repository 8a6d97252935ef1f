// SPDX-License-Identifier: Apache-2.0
// Formulas of one logit: the map from the matrix product to the scaled logit z, and the gradients of the row
// statistics and of the divergences between two lm_heads with respect to z. No loop, no memory.
#pragma once

#include "core/macros.hpp"
#include "core/vmath.hpp"

namespace hotloop::logprob {

// z = softcap(scale * u) / temperature, softcap(y) = cap * tanh(y / cap).
template <class R>
struct LogitMap {
  R scale;
  R cap;  // used where kCap
  R inverse_temperature;

  template <bool kCap>
  HOTLOOP_INLINE R forward(R u) const {
    const R y = u * scale;
    return (kCap ? cap * vtanh(y / cap) : y) * inverse_temperature;
  }
  // dz/du at z = forward(u).
  template <bool kCap>
  HOTLOOP_INLINE R slope(R z) const {
    const R straight = scale * inverse_temperature;
    if (!kCap) return straight;
    const R t = z / (cap * inverse_temperature);
    return straight * (R(1) - t * t);
  }
};

// Every statistic of a row has a gradient of one form: with p = exp(z - lse),
//   p * (a + b z + c p) + d, plus e at the label.
// logp: a = -1, e = 1; lse: a = 1; entropy: a = lse - H, b = -1; sum p^2: a = -2 sum p^2, c = 2;
// sum z: d = 1. Each is multiplied by what comes from above and the five are added up.
template <class R>
struct RowGradient {
  R lse, a, b, c, d;
  HOTLOOP_INLINE R at(R z) const {
    const R p = vexp_weight(z - lse);
    // A weight of 0 silences the logit: one of -inf has b z = NaN, even with b = 0.
    return (p == R(0) ? R(0) : p * (a + b * z + c * p)) + d;
  }
};

// log of a mixture probability, 1e-37 <= m <= 1: no special cases but NaN, which m - m carries over.
HOTLOOP_INLINE double log_mixture(double m) { return vlog(m); }
#if defined(__CUDACC__)
HOTLOOP_INLINE float log_mixture(float m) { return vlog(m); }
#else
HOTLOOP_INLINE float log_mixture(float m) { return detail::log_normal(m, 0) + (m - m); }
#endif

// Student q, teacher p. Gradient with respect to the student's z, before upstream weights:
//   KL(p||q): q - p        KL(q||p): q (log q - log p - KL(q||p))
//   beta KL(p||M) + (1 - beta) KL(q||M), M = beta p + (1 - beta) q: (1 - beta) q (log(q/M) - KL(q||M))
template <class R>
struct DivergenceGradient {
  R lse_student, lse_teacher;
  R forward, reverse, jsd;  // upstream weights of the three
  R reverse_kl, student_mixture_kl;
  R beta;

  template <bool kJsd>
  HOTLOOP_INLINE R at(R s, R t) const {
    const R log_q = s - lse_student;
    const R log_p = t - lse_teacher;
    const R q = vexp_weight(log_q);
    const R p = vexp_weight(log_p);
    const R ratio = q > R(0) ? log_q - log_p - reverse_kl : R(0);
    R g = forward * (q - p) + (reverse != R(0) ? reverse * q * ratio : R(0));
    if (kJsd) {
      const R mixture = log_mixture(beta * p + (R(1) - beta) * q + R(1e-37));
      g += jsd * (R(1) - beta) * (q > R(0) ? q * (log_q - mixture - student_mixture_kl) : R(0));
    }
    return g;
  }
};

}  // namespace hotloop::logprob
