// SPDX-License-Identifier: Apache-2.0
// The update rules of optimizers (SGD, Adagrad, Adam, FTRL ...): one formula each for the rows of a table and the
// tensors of a model. No loop here: a rule says what one element of a row, or the scalars of a row, become under a
// gradient; the loops are in table/rows/row_rules.simd.cpp and kernels/table/row_update.cuh.
//
// g is the gradient after l2 decay, w a weight, the rest is state, changed in place. Every step is one IEEE operation
// in float32, and files that include this are compiled without contraction of a * b + c: any instruction set gives
// the same bits. Papers, defaults and what differs from Monolith: python/hotloop/core/rules.py.
#pragma once

#include <cstdint>

#include "core/macros.hpp"
#include "core/vmath.hpp"

namespace hotloop {

enum class Rule : std::int32_t { kSgd, kRowwiseAdagrad, kAdagrad, kAdam, kFtrl, kGroupAdagrad };

// A rule as its user states it. What a rule has no use for stays at zero.
struct RuleParameters {
  Rule rule = Rule::kSgd;
  double lr = 0, eps = 0, beta1 = 0, beta2 = 0, weight_decay = 0, initial_accumulator_value = 0;
  double beta = 0, l1 = 0, l2 = 0;
  bool decoupled = false;        // weight decay apart from the gradient
  bool nesterov = false;         // Adam
  bool uncorrected_eps = false;  // Adam: eps beside the square root before bias correction, as TensorFlow has it
  bool rowwise = false;          // Adam: one second moment per row
  bool group = false;            // FTRL: l1 on the norm of the row
  bool stochastic_rounding = false;
  std::int64_t step = 0;  // Adam: the step number of all rows; 0: each row counts its own
};

// The same, ready for the loops: made by `resolve`.
struct RuleSpec {
  Rule rule;
  float lr, eps, weight_decay, initial_accumulator_value, beta, l1, l2;
  float l2_decay, keep;           // weight decay inside the gradient, and the factor on weights when it is apart
  float rest1, rest2;             // 1 - beta, rounded once
  float of_gradient, of_average;  // Adam's direction: 0 and 1, with Nesterov's momentum 1 - beta1 and beta1
  double log_beta1, log_beta2;
  bool uncorrected_eps, rowwise, group, stochastic_rounding;
  std::int64_t step;
};
RuleSpec resolve(const RuleParameters& parameters);

// The float32 state of a row: scalars first, then vectors of dim.
//   sgd               -
//   rowwise adagrad   sum
//   adagrad           sum[dim]
//   adam              step, exp_avg[dim], exp_avg_sq[dim]
//   adam, row-wise    step, exp_avg_sq, exp_avg[dim]
//   ftrl              z[dim], n[dim]
//   group adagrad     sum
inline constexpr int kMostScalars = 2;
inline constexpr int kMostVectors = 2;
std::int64_t state_scalars(const RuleSpec& spec);
std::int64_t state_vectors(const RuleSpec& spec);
std::int64_t state_floats(const RuleSpec& spec, std::int64_t dim);
void init_state(const RuleSpec& spec, std::int64_t dim, float* state);

#if defined(__CUDA_ARCH__)
HOTLOOP_INLINE float square_root(float x) { return ::__fsqrt_rn(x); }
#else
HOTLOOP_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
#endif

// a / d, and 0 where d is 0: a row that never saw a gradient, without eps, stays where it is.
HOTLOOP_INLINE float ratio(float a, float d) { return d == 0.0f ? 0.0f : a / d; }

// 0 decay leaves the gradient alone even where the weight is infinite.
HOTLOOP_INLINE float decayed_gradient(const RuleSpec& p, float g, float w) {
  return p.l2_decay == 0.0f ? g : g + p.l2_decay * w;
}

// x moved towards `to` by the share `rest`, from the end that is nearer: all of the way is exactly `to`.
HOTLOOP_INLINE float toward(float x, float to, float rest) {
  const float way = to - x;
  return rest < 0.5f ? x + rest * way : to - (1.0f - rest) * way;
}

struct Sgd {
  static HOTLOOP_INLINE float weight(const RuleSpec& p, float g, float w) { return p.keep * w - p.lr * g; }
};

// One sum of mean squares per row.
struct RowwiseAdagrad {
  static HOTLOOP_INLINE float rate(const RuleSpec& p, float mean_square, float& sum) {
    sum += mean_square;
    return ratio(p.lr, square_root(sum) + p.eps);
  }
  static HOTLOOP_INLINE float weight(const RuleSpec& p, float rate, float g, float w) { return p.keep * w - rate * g; }
};

struct Adagrad {
  static HOTLOOP_INLINE float weight(const RuleSpec& p, float g, float w, float& sum) {
    sum += g * g;
    return p.keep * w - ratio(p.lr * g, square_root(sum) + p.eps);
  }
};

struct Adam {
  // What is the same for all elements of a row at its step t: w -= rate * m / (sqrt(v) * scale + eps).
  struct Row {
    float rate, scale;
  };
  // 1 - beta^t by expm1 of t log(beta): as exact at t = 1 as late, where a stored power beta^t would have lost digits.
  static HOTLOOP_INLINE Row row(const RuleSpec& p, float t) {
    const float correction1 = -vexpm1(static_cast<float>(static_cast<double>(t) * p.log_beta1));
    const float root2 = square_root(-vexpm1(static_cast<float>(static_cast<double>(t) * p.log_beta2)));
    const float rate = p.lr / correction1;
    return {p.uncorrected_eps ? rate * root2 : rate, p.uncorrected_eps ? 1.0f : 1.0f / root2};
  }
  static HOTLOOP_INLINE void second_moment(const RuleSpec& p, float square, float& v) {
    v = toward(v, square, p.rest2);
  }
  static HOTLOOP_INLINE float denominator(const RuleSpec& p, const Row& row, float v) {
    return square_root(v) * row.scale + p.eps;
  }
  // What moves the weight; m is moved on.
  static HOTLOOP_INLINE float direction(const RuleSpec& p, float g, float& m) {
    m = toward(m, g, p.rest1);
    return p.of_gradient * g + p.of_average * m;
  }
  static HOTLOOP_INLINE float weight(const RuleSpec& p, const Row& row, float g, float w, float& m, float& v) {
    second_moment(p, g * g, v);
    return p.keep * w - ratio(row.rate * direction(p, g, m), denominator(p, row, v));
  }
};

// z is the sum of gradients less what proximal terms took back, n the sum of squares; the weight is a function of both.
struct Ftrl {
  static HOTLOOP_INLINE void advance(const RuleSpec& p, float g, float w, float& z, float& n) {
    const float before = square_root(n);
    n += g * g;
    // (sqrt(n + g^2) - sqrt(n)) / lr, without the difference of two numbers that are nearly the same.
    const float sigma = ratio(g * g, (square_root(n) + before) * p.lr);
    z += g - sigma * w;
  }
  static HOTLOOP_INLINE float denominator(const RuleSpec& p, float n) {
    return (p.beta + square_root(n)) / p.lr + p.l2;
  }
  static HOTLOOP_INLINE float weight(const RuleSpec& p, float z, float n) {
    const float size = z < 0.0f ? -z : z;
    const float beyond = ratio(size - p.l1, denominator(p, n));
    const float moved = z < 0.0f ? beyond : -beyond;
    return size <= p.l1 ? 0.0f : moved;
  }
  // l1 on the norm of z over the row: the whole row is 0, or shrinks by one factor.
  static HOTLOOP_INLINE float shrink(const RuleSpec& p, float norm) { return norm <= p.l1 ? 0.0f : 1.0f - p.l1 / norm; }
  static HOTLOOP_INLINE float group_weight(const RuleSpec& p, float shrink, float z, float n) {
    return shrink == 0.0f ? 0.0f : -(shrink * ratio(z, denominator(p, n)));
  }
};

// The catalogue's z = g - w / eta is -y / eta with y = w - eta g: the proximal step of l2 times the norm, which keeps y
// exact where l2 is 0.
struct GroupAdagrad {
  static HOTLOOP_INLINE float rate(const RuleSpec& p, float max_square, float& sum) {
    sum += max_square;
    return ratio(p.lr, p.beta + square_root(sum));
  }
  static HOTLOOP_INLINE float weight(float rate, float g, float w) { return w - rate * g; }
  static HOTLOOP_INLINE float shrink(const RuleSpec& p, float rate, float norm) {
    const float bound = p.l2 * rate;
    return norm <= bound ? 0.0f : 1.0f - bound / norm;
  }
  static HOTLOOP_INLINE float shrunk(float shrink, float y) { return shrink == 0.0f ? 0.0f : shrink * y; }
};

}  // namespace hotloop
