// SPDX-License-Identifier: Apache-2.0
// One row under its summed gradient, by the 32 lanes of a warp: a lane has every 32nd element and reads no other
// lane's. Formulas and the order of sums are those of the CPU (core/rules.hpp, table/rows/row_rules.simd.cpp): sixteen
// interleaved sums, folded in halves. Compiled without contraction of a * b + c the bits are the same, except for
// Adam's expm1.
#pragma once

#include <cstdint>

#include "core/philox.hpp"
#include "core/rules.hpp"
#include "kernels/table/store.cuh"
#include "table/rows/rounding.hpp"

namespace hotloop::table::gpu {

// Sum of term(j) over the row, the same for all lanes.
template <class Term>
HOTLOOP_BOTH inline float sum_over(std::int64_t dim, int lane, Term&& term) {
  float sum = 0.0f;
  for (std::int64_t j = lane; j - lane < dim; j += kWarp) {
    const float x = j < dim ? term(j) : 0.0f;
    const float later = cuda::shuffle_xor(x, kWarp / 2);  // of the lower half: the element 16 further on
    sum += x;
    sum += later;
  }
  for (int distance = kWarp / 4; distance > 0; distance /= 2) sum += cuda::shuffle_xor(sum, distance);
  return cuda::shuffle(sum, 0);  // the upper half added in another order
}

template <class Term>
HOTLOOP_BOTH inline float max_over(std::int64_t dim, int lane, Term&& term) {
  float most = 0.0f;
  for (std::int64_t j = lane; j < dim; j += kWarp) {
    const float x = term(j);
    most = x > most ? x : most;
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float other = cuda::shuffle_xor(most, distance);
    most = other > most ? other : most;
  }
  return most;
}

// The weights of a row. Element j rounds by the bits that table/rows/row_rules.hpp gives it.
template <class Storage>
struct Weights {
  Storage* data;
  std::int64_t dim;
  std::uint64_t random;
  bool stochastic;
  int lane;

  HOTLOOP_INLINE float operator()(std::int64_t j) const { return to_float(data[j]); }
  HOTLOOP_BOTH void set(std::int64_t j, float x) const {
    if constexpr (sizeof(Storage) == 2) {
      if (stochastic) {
        const std::int64_t e = j % 64;
        const Philox4x32 r = philox(random, 0, static_cast<std::uint64_t>(j / 64 * 8 + e % 8));
        const std::int64_t w = e % 32 / 8;
        const std::uint32_t word = w == 0 ? r.word[0] : w == 1 ? r.word[1] : w == 2 ? r.word[2] : r.word[3];
        data[j].bits = round_by(Storage{}, x, e < 32 ? word & 0xFFFFu : word >> 16);
        return;
      }
    }
    put(data[j], x);
  }
  template <class F>
  HOTLOOP_BOTH void each(F&& f) const {  // w[j] = f(j, w[j])
    for (std::int64_t j = lane; j < dim; j += kWarp) set(j, f(j, (*this)(j)));
  }
};

template <class Storage>
HOTLOOP_BOTH inline void adam_rows(const RuleSpec& p, const float* grad, const Weights<Storage>& w, float* state) {
  const std::int64_t dim = w.dim;
  const auto g = [&](std::int64_t j, float x) { return decayed_gradient(p, grad[j], x); };
  const float step = p.step > 0 ? state[0] : state[0] + 1.0f;
  const Adam::Row row = Adam::row(p, p.step > 0 ? static_cast<float>(p.step) : step);
  if (!p.rowwise) {
    float* average = state + 1;
    float* square = average + dim;
    w.each([&](std::int64_t j, float x) { return Adam::weight(p, row, g(j, x), x, average[j], square[j]); });
  } else {
    float* average = state + 2;
    float moment = state[1];
    const float squares = sum_over(dim, w.lane, [&](std::int64_t j) {
      const float x = p.l2_decay == 0.0f ? grad[j] : g(j, w(j));
      return x * x;
    });
    Adam::second_moment(p, squares / static_cast<float>(dim), moment);
    const float rate = ratio(row.rate, Adam::denominator(p, row, moment));
    w.each([&](std::int64_t j, float x) { return p.keep * x - rate * Adam::direction(p, g(j, x), average[j]); });
    cuda::warp_barrier();
    if (w.lane == 0) state[1] = moment;
  }
  cuda::warp_barrier();
  if (w.lane == 0) state[0] = step;
}

template <class Storage>
HOTLOOP_BOTH inline void ftrl_rows(const RuleSpec& p, const float* grad, const Weights<Storage>& w, float* z) {
  float* n = z + w.dim;
  if (!p.group) {
    w.each([&](std::int64_t j, float x) {
      Ftrl::advance(p, grad[j], x, z[j], n[j]);
      return Ftrl::weight(p, z[j], n[j]);
    });
    return;
  }
  const float squares = sum_over(w.dim, w.lane, [&](std::int64_t j) {
    Ftrl::advance(p, grad[j], w(j), z[j], n[j]);
    return z[j] * z[j];
  });
  const float shrink = Ftrl::shrink(p, square_root(squares));
  w.each([&](std::int64_t j, float) { return Ftrl::group_weight(p, shrink, z[j], n[j]); });
}

template <class Storage>
HOTLOOP_BOTH inline void group_adagrad_rows(const RuleSpec& p, const float* grad, const Weights<Storage>& w,
                                            float* state) {
  float sum = state[0];
  const auto g = [&](std::int64_t j, float x) { return decayed_gradient(p, grad[j], x); };
  const float largest = max_over(w.dim, w.lane, [&](std::int64_t j) {
    const float x = g(j, w(j));
    return x * x;
  });
  const float rate = GroupAdagrad::rate(p, largest, sum);
  const auto moved = [&](std::int64_t j, float x) { return GroupAdagrad::weight(rate, g(j, x), x); };
  float shrink = 1.0f;
  if (p.l2 > 0.0f) {
    const float squares = sum_over(w.dim, w.lane, [&](std::int64_t j) {
      const float y = moved(j, w(j));
      return y * y;
    });
    shrink = GroupAdagrad::shrink(p, rate, square_root(squares));
  }
  w.each([&](std::int64_t j, float x) { return GroupAdagrad::shrunk(shrink, moved(j, x)); });
  cuda::warp_barrier();
  if (w.lane == 0) state[0] = sum;
}

template <class Storage>
HOTLOOP_BOTH inline void update_row(const RuleSpec& p, const float* grad, const Weights<Storage>& w, float* state) {
  const auto g = [&](std::int64_t j, float x) { return decayed_gradient(p, grad[j], x); };
  switch (p.rule) {
    case Rule::kRowwiseAdagrad: {
      float sum = state[0];
      const float squares = sum_over(w.dim, w.lane, [&](std::int64_t j) {
        const float x = p.l2_decay == 0.0f ? grad[j] : g(j, w(j));
        return x * x;
      });
      const float rate = RowwiseAdagrad::rate(p, squares / static_cast<float>(w.dim), sum);
      w.each([&](std::int64_t j, float x) { return RowwiseAdagrad::weight(p, rate, g(j, x), x); });
      cuda::warp_barrier();
      if (w.lane == 0) state[0] = sum;
      return;
    }
    case Rule::kAdagrad:
      w.each([&](std::int64_t j, float x) { return Adagrad::weight(p, g(j, x), x, state[j]); });
      return;
    case Rule::kAdam:
      adam_rows(p, grad, w, state);
      return;
    case Rule::kFtrl:
      ftrl_rows(p, grad, w, state);
      return;
    case Rule::kGroupAdagrad:
      group_adagrad_rows(p, grad, w, state);
      return;
    default:
      w.each([&](std::int64_t j, float x) { return Sgd::weight(p, g(j, x), x); });
  }
}

}  // namespace hotloop::table::gpu
