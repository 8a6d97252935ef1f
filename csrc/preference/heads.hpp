// SPDX-License-Identifier: Apache-2.0
// The preference losses of one pair (or one answer), one struct per formula (core/head.hpp), and the list of them.
// Symbols: pc, pr log-probability of the chosen and rejected answer under the policy, rc, rr the same
// under the reference; dw = pc - rc, dl = pr - rr, h = dw - dl. Papers and defaults: docs/papers.md.
#pragma once

#include "core/formulas.hpp"
#include "core/head.hpp"
#include "core/vmath.hpp"

namespace hotloop::preference {

using pointwise::Head;

template <class T, class R = Real<T>>
HOTLOOP_INLINE T margin(const T* d, const R* c) {  // h, with d = pc, pr and c = rc, rr
  return (d[0] - c[0]) - (d[1] - c[1]);
}

// -- a logistic link on beta h, and what surrounds it ------------------------------------------------

struct Dpo : Head<2, 2, 1> {  // p: beta
  HOTLOOP_HEAD("dpo") { return vsoftplus(-(margin(d, c) * p[0])); }
};
struct SoftLabelDpo : Head<2, 3, 1> {  // c: rc, rr, label; p: beta
  HOTLOOP_HEAD("soft_label_dpo") { return logistic(margin(d, c) * p[0], c[2]); }
};
struct ConservativeDpo : Head<2, 3, 1> {  // c: rc, rr, label smoothing; p: beta
  HOTLOOP_HEAD("conservative_dpo") { return logistic(margin(d, c) * p[0], R(1) - c[2]); }
};
struct RobustDpo : Head<2, 3, 1> {  // c: rc, rr, eps; p: beta
  HOTLOOP_HEAD("robust_dpo") {
    const T x = margin(d, c) * p[0];
    return vsoftplus(-x) - x * (c[2] / (R(1) - R(2) * c[2]));
  }
};
struct NormDpo : Head<2, 4, 1> {  // c: rc, rr, nc, nr; p: beta
  HOTLOOP_HEAD("dpo_norm") { return vsoftplus(-(((d[0] - c[0]) / count(c[2]) - (d[1] - c[1]) / count(c[3])) * p[0])); }
};
struct FlexDpo : Head<2, 2, 3> {  // p: beta of the chosen, beta of the rejected, weight of -pc
  HOTLOOP_HEAD("flex_dpo") { return vsoftplus(-((d[0] - c[0]) * p[0] - (d[1] - c[1]) * p[1])) - d[0] * p[2]; }
};
struct ConditionalDpo : Head<2, 2, 1> {  // the reference counts only where it agrees with the label
  HOTLOOP_HEAD("dpo_conditional") {
    const R reference = c[0] - c[1];
    return vsoftplus(-(((d[0] - d[1]) - (reference > R(0) ? reference : R(0))) * p[0]));
  }
};
// f-divergence DPO: the log-ratio u becomes s(u). Exponents stop at 80 so that float32 stays finite.
template <class R>
HOTLOOP_INLINE R exponent_cap() {
  return R(80);
}
struct ForwardKlDpo : Head<2, 2, 1> {
  HOTLOOP_HEAD("dpo_forward_kl") { return vsoftplus(-((score<T>(d[0] - c[0]) - score<T>(d[1] - c[1])) * p[0])); }
  template <class T>
  static HOTLOOP_INLINE T score(const T& u) {  // 1 - exp(-u)
    const T x = -u;
    const T capped = select(value_of(x) > exponent_cap<Real<T>>(), T(exponent_cap<Real<T>>()), x);
    return -vexpm1(capped);
  }
};
struct JensenShannonDpo : Head<2, 2, 1> {
  HOTLOOP_HEAD("dpo_js") {  // s(u) = ln 2 + log sigma(u); ln 2 cancels
    return vsoftplus(-((vsoftplus(-(d[1] - c[1])) - vsoftplus(-(d[0] - c[0]))) * p[0]));
  }
};
struct AlphaDpo : Head<2, 2, 2> {  // p: beta, a - 1 (not 0); s(u) = (exp((a - 1) u) - 1) / (a - 1)
  HOTLOOP_HEAD("dpo_alpha") { return vsoftplus(-((score<T>(d[0] - c[0], p[1]) - score<T>(d[1] - c[1], p[1])) * p[0])); }
  template <class T, class R = Real<T>>
  static HOTLOOP_INLINE T score(const T& u, R a) {
    const T x = u * a;
    const T capped = select(value_of(x) > exponent_cap<R>(), T(exponent_cap<R>()), x);
    return vexpm1(capped) / a;
  }
};
// softplus(-beta h) + weight (e - er): the optimistic and pessimistic forms, e being the log-probability of
// a third answer (or of the chosen one again).
struct DpoPlusLinear : Head<3, 3, 2> {  // d: pc, pr, e; c: rc, rr, er; p: beta, weight
  HOTLOOP_HEAD("dpo_plus_linear") { return vsoftplus(-(margin(d, c) * p[0])) + (d[2] - c[2]) * p[1]; }
};
struct Xpo : Head<3, 2, 2> {
  HOTLOOP_HEAD("xpo") { return vsoftplus(-(margin(d, c) * p[0])) + d[2] * p[1]; }
};
struct RpoAverage : Head<2, 3, 2> {  // c: rc, rr, nc; p: beta, weight of -pc / nc
  HOTLOOP_HEAD("rpo_average") { return vsoftplus(-(margin(d, c) * p[0])) - d[0] / count(c[2]) * p[1]; }
};
struct Modpo : Head<2, 3, 2> {  // c: rc, rr, offset; p: beta, 1 / w0
  HOTLOOP_HEAD("modpo") { return vsoftplus(-((margin(d, c) * p[0] - c[2]) * p[1])); }
};
struct ModpoHinge : Head<2, 3, 2> {
  HOTLOOP_HEAD("modpo_hinge") { return vrelu(R(1) - (margin(d, c) * p[0] - c[2]) * p[1]); }
};

// -- a square on h -------------------------------------------------------------------------------------

struct Ipo : Head<2, 4, 1> {  // c: rc, rr, nc, nr; p: 1 / tau
  HOTLOOP_HEAD("ipo") { return square((d[0] - c[0]) / count(c[2]) - (d[1] - c[1]) / count(c[3]) - R(0.5) * p[0]); }
};
struct OnlineIpo : Head<2, 5, 1> {  // c: rc, rr, nc, nr, P(first preferred); p: 1 / tau
  HOTLOOP_HEAD("online_ipo") {
    return square((d[0] - c[0]) / count(c[2]) - (d[1] - c[1]) / count(c[3]) - (c[4] - R(0.5)) * p[0]);
  }
};
struct XpoIpo : Head<3, 2, 2> {  // d: pc, pr, e; p: 1 / beta, weight of e
  HOTLOOP_HEAD("xpo_ipo") { return square(margin(d, c) - R(0.5) * p[0]) + d[2] * p[1]; }
};
struct Inpo : Head<2, 5, 2> {  // c: rc, rr, tc, tr, label; p: tau / eta, 1 / eta
  HOTLOOP_HEAD("inpo") {
    const R anchor = p[0] * (c[0] - c[1]) + (R(1) - p[0]) * (c[2] - c[3]);
    return square((d[0] - d[1]) - anchor - (c[4] - R(0.5)) * p[1]);
  }
};
struct Sppo : Head<1, 2, 1> {  // d: l; c: r, win rate; p: eta
  HOTLOOP_HEAD("sppo") { return square(d[0] - c[0] - p[0] * (c[1] - R(0.5))); }
};
struct SppoHard : Head<2, 2, 1> {  // p: 1 / beta
  HOTLOOP_HEAD("sppo_hard") { return square(d[0] - c[0] - R(0.5) * p[0]) + square(d[1] - c[1] + R(0.5) * p[0]); }
};
struct Srpo : Head<6, 1, 3> {  // d: t_wl, t_lw, t_ll, t_ww, g_w, g_l; c: label; p: beta, w_joint, w_dag
  HOTLOOP_HEAD("srpo") {
    const R label = c[0] - R(0.5);
    const T improve = R(0.5) * (square(label - (d[0] - d[2]) * p[0]) + square(label + (d[1] - d[3]) * p[0]));
    const T joint = square(label - (d[0] - d[1] + d[4] - d[5]) * (R(0.5) * p[0]));
    return joint * p[1] + improve * p[2];
  }
};

// -- other links ---------------------------------------------------------------------------------------

struct SlicHinge : Head<3, 2, 3> {  // d: pc, pr, target; p: beta, delta, weight of -target
  HOTLOOP_HEAD("slic_hinge") { return vrelu(p[1] - margin(d, c) * p[0]) - d[2] * p[2]; }
};
struct ExoPair : Head<2, 2, 3> {  // p: beta, log(1 - eps), log(eps)
  HOTLOOP_HEAD("exo_pair") {
    const T x = margin(d, c) * p[0];
    return vsigmoid(x) * (-vsoftplus(-x) - p[1]) + vsigmoid(-x) * (-vsoftplus(x) - p[2]);
  }
};
struct ApoZero : Head<2, 2, 1> {
  HOTLOOP_HEAD("apo_zero") { return vsigmoid(-((d[0] - c[0]) * p[0])) + vsigmoid((d[1] - c[1]) * p[0]); }
};
struct ApoDown : Head<2, 2, 1> {
  HOTLOOP_HEAD("apo_down") { return vsigmoid((d[0] - c[0]) * p[0]) + vsigmoid(-(margin(d, c) * p[0])); }
};
struct NcaPair : Head<2, 2, 1> {
  HOTLOOP_HEAD("nca_pair") {
    const T chosen = (d[0] - c[0]) * p[0];
    const T rejected = (d[1] - c[1]) * p[0];
    return vsoftplus(-chosen) + (vsoftplus(chosen) + vsoftplus(rejected)) * R(0.5);
  }
};
struct Kto : Head<1, 3, 3> {  // d: l; c: r, desirable (1 or 0), z0; p: beta, weight desirable, weight undesirable
  HOTLOOP_HEAD("kto") {
    const T x = (d[0] - c[0] - c[2]) * p[0];
    return vsigmoid(x * (R(1) - R(2) * c[1])) * (c[1] * p[1] + (R(1) - c[1]) * p[2]);
  }
};
struct Bco : Head<1, 4, 1> {  // d: l; c: r, desirable (1 or 0), delta, density weight; p: beta
  HOTLOOP_HEAD("bco") {
    const T x = (d[0] - c[0]) * p[0] - c[2];
    // Chosen, not multiplied by 0: a density weight need not be a number where the answer is desirable.
    return vsoftplus(x * (R(1) - R(2) * c[1])) * select(c[1] > R(0.5), R(1), c[3]);
  }
};
struct BcoPair : Head<2, 3, 1> {  // c: rc, rr, delta; p: beta
  HOTLOOP_HEAD("bco_pair") { return vsoftplus(c[2] - (d[0] - c[0]) * p[0]) + vsoftplus((d[1] - c[1]) * p[0] - c[2]); }
};

// -- without a reference -------------------------------------------------------------------------------

struct Orpo : Head<3, 0, 1> {  // d: mean log-probability chosen, rejected, NLL; p: weight of the odds ratio
  HOTLOOP_HEAD("orpo") { return d[2] + vsoftplus(log_odds<T>(d[1]) - log_odds<T>(d[0])) * p[0]; }
  // An answer of probability 1, or an empty one, has infinite odds and no gradient: stop just below 0.
  template <class T>
  static HOTLOOP_INLINE T log_odds(const T& a) {
    constexpr Real<T> kTop = Real<T>(-0x1p-24);
    const T capped = select(value_of(a) > kTop, T(kTop), a);
    return capped - vlog1mexp(capped);
  }
};
// c: nc, nr, label smoothing.
struct AlphaPo : Head<3, 3, 4> {  // d: pc, pr, NLL; p: beta, weight of the NLL, alpha (not 0), gamma
  HOTLOOP_HEAD("alpha_po") {
    const T chosen = -vexpm1(-(d[0] / count(c[0]) * p[2])) / p[2];
    const T rejected = -vexpm1(-(d[1] / count(c[1]) * p[2])) / p[2];
    return logistic((chosen - rejected) * p[0] - p[3], R(1) - c[2]) + d[2] * p[1];
  }
};
struct SimPo : Head<3, 3, 3> {  // d: pc, pr, NLL; p: beta, gamma, weight of the NLL
  HOTLOOP_HEAD("simpo") {
    return logistic((d[0] / count(c[0]) - d[1] / count(c[1])) * p[0] - p[1], R(1) - c[2]) + d[2] * p[2];
  }
};
struct Cpl : Head<2, 1, 1> {  // d: advantage of segments 1, 2; c: P(2 preferred); p: bias lam on the loser
  HOTLOOP_HEAD("cpl") { return vsoftplus(d[0] * p[0] - d[1]) * c[0] + vsoftplus(d[1] * p[0] - d[0]) * (R(1) - c[0]); }
};

// -- many terms ----------------------------------------------------------------------------------------

// d: log-ratios of ground truth g, revised a, original o, a weighted by s, o weighted by s, g with masked
// image, a weighted by v, a with masked image weighted by v. p: beta, copo weight, anchor weight, anchor d,
// sign of the anchor of the two rejected-side pairs (+1: chosen only, -1: as released).
struct OpaDpo : Head<8, 0, 5> {
  HOTLOOP_HEAD("opa_dpo") {
    const R beta = p[0];
    const T language = vsoftplus(-((d[0] - d[2]) * beta)) + vsoftplus(-((d[3] - d[4]) * beta));
    const T image = vsoftplus(-((d[0] - d[5]) * beta)) + vsoftplus(-((d[6] - d[7]) * beta));
    const T anchor = R(2) * vsoftplus(-(d[0] * beta - p[3])) + vsoftplus(-((d[3] * beta - p[3]) * p[4])) +
                     vsoftplus(-((d[6] * beta - p[3]) * p[4]));
    return language + image * p[1] + anchor * p[2];
  }
};

using Heads = pointwise::HeadList<Dpo, SoftLabelDpo, ConservativeDpo, RobustDpo, NormDpo, FlexDpo, ConditionalDpo,
                                  ForwardKlDpo, JensenShannonDpo, AlphaDpo, DpoPlusLinear, Xpo, RpoAverage, Modpo,
                                  ModpoHinge, Ipo, OnlineIpo, XpoIpo, Inpo, Sppo, SppoHard, Srpo, SlicHinge, ExoPair,
                                  ApoZero, ApoDown, NcaPair, Kto, Bco, BcoPair, Orpo, AlphaPo, SimPo, Cpl, OpaDpo>;

}  // namespace hotloop::preference
