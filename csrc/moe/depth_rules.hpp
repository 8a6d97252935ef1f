// SPDX-License-Identifier: Apache-2.0
// Depth rules: how one number of the residual stream moves in a sparse layer. x is the stream, z the mixture of the
// experts, s the states that travel from layer to layer of one forward pass, p the numbers of the call. `step` writes
// the new states into s and returns the new x. It is written over a number type T: with plain numbers it is the layer,
// with dual numbers its gradient; T is also the type of the first kSlopes numbers, which may have a gradient.
#pragma once

#include "core/dual.hpp"
#include "core/macros.hpp"

namespace hotloop::moe {

inline constexpr int kMaxStates = 3;
inline constexpr int kMaxNumbers = 10;
inline constexpr int kMaxSlopes = 3;  // and the lookahead's

// kAhead: the norm is that of x + p[kAhead] * s[0] behind the step; -1: of x.
// kCurved: the gradient depends on x, s and z, and not only on the numbers.
template <int States, int Numbers, int Slopes, int Ahead = -1, bool Curved = false>
struct DepthRule {
  static constexpr int kStates = States;
  static constexpr int kNumbers = Numbers;
  static constexpr int kSlopes = Slopes;
  static constexpr int kAhead = Ahead;
  static constexpr bool kCurved = Curved;
  static_assert(States <= kMaxStates && Numbers <= kMaxNumbers && Slopes <= kMaxSlopes);
};

// q: the numbers with a gradient, the first of p.
#define HOTLOOP_DEPTH_STEP                                                                        \
  template <class T, class R = Real<T>>                                                           \
  static HOTLOOP_INLINE T step([[maybe_unused]] T x, [[maybe_unused]] T* s, [[maybe_unused]] T z, \
                               [[maybe_unused]] const T* q, [[maybe_unused]] const R* p)

struct Combine : DepthRule<0, 0, 0> {
  HOTLOOP_DEPTH_STEP { return z; }
};

struct Residual : DepthRule<0, 0, 0> {
  HOTLOOP_DEPTH_STEP { return x + z; }
};

struct Momentum : DepthRule<1, 2, 2> {  // s: m; p: mu, gamma
  HOTLOOP_DEPTH_STEP {
    s[0] = q[0] * s[0] + q[1] * z;
    return x - s[0];
  }
};

// s: p, v, m; p: mu, gamma2, gamma1, beta1, 1 - beta1, beta2, 1 - beta2, 1 - kappa, eps
struct Adam : DepthRule<3, 9, 2, -1, true> {
  HOTLOOP_DEPTH_STEP {
    s[0] = p[3] * s[0] + p[4] * z;
    s[1] = p[5] * s[1] + p[6] * (z * z);
    s[2] = q[0] * s[2] + q[1] * z;
    return p[7] * x - p[2] * (s[0] / root(s[1] + p[8]));
  }
  static HOTLOOP_INLINE float root(float v) { return __builtin_sqrtf(v); }
  static HOTLOOP_INLINE double root(double v) { return __builtin_sqrt(v); }
  template <class R, int N>
  static HOTLOOP_INLINE Dual<R, N> root(const Dual<R, N>& v) {
    const R found = root(v.value);
    return chain(v, found, R(0.5) / found);
  }
};

struct Robust : DepthRule<1, 3, 2, 2> {  // s: d; p: mu, gamma, alpha
  HOTLOOP_DEPTH_STEP {
    s[0] = q[0] * s[0] - q[1] * z;
    return x + s[0];
  }
};

struct Lookahead : DepthRule<1, 1, 0, 0> {  // s: d; p: alpha; the norm alone, of x + alpha * d
  HOTLOOP_DEPTH_STEP { return x; }
};

#undef HOTLOOP_DEPTH_STEP

// The gradient of a rule, by dual numbers: slope[0] is that of x, then z, the states, and with kOfNumbers the numbers.
template <class Rule, bool kOfNumbers>
struct DepthSlopes {
  static constexpr int kStates = Rule::kStates;
  static constexpr int kSlopes = kOfNumbers ? Rule::kSlopes : 0;
  static constexpr int kVariables = 2 + kStates + kSlopes;

  // g: the gradients of the new x and of the new states.
  template <class R>
  static HOTLOOP_INLINE void at(R x, const R* s, R z, const R* p, const R* g, R* slope) {
    using T = Dual<R, kVariables>;
    T after[kStates + 1], q[Rule::kSlopes + 1];
    HOTLOOP_UNROLL
    for (int i = 0; i < kStates; ++i) after[i] = T::variable(s[i], 2 + i);
    HOTLOOP_UNROLL
    for (int i = 0; i < Rule::kSlopes; ++i) q[i] = i < kSlopes ? T::variable(p[i], 2 + kStates + i) : T(p[i]);
    const T out = Rule::template step<T>(T::variable(x, 0), after, T::variable(z, 1), q, p);
    HOTLOOP_UNROLL
    for (int v = 0; v < kVariables; ++v) {
      slope[v] = g[0] * out.d[v];
      HOTLOOP_UNROLL
      for (int i = 0; i < kStates; ++i) slope[v] += g[i + 1] * after[i].d[v];
    }
  }
};

enum class Depth : int { kCombine, kResidual, kMomentum, kAdam, kRobust, kLookahead };

template <class F>
HOTLOOP_INLINE decltype(auto) with_depth_rule(Depth rule, F&& f) {
  switch (rule) {
    case Depth::kCombine:
      return f(Combine{});
    case Depth::kResidual:
      return f(Residual{});
    case Depth::kMomentum:
      return f(Momentum{});
    case Depth::kAdam:
      return f(Adam{});
    case Depth::kRobust:
      return f(Robust{});
    default:
      return f(Lookahead{});
  }
}

}  // namespace hotloop::moe
