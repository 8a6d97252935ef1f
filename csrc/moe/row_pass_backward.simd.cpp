// SPDX-License-Identifier: Apache-2.0
// Backward of the pass over rows (see row_pass.hpp): per token the norm, then the rule by dual numbers, then the slopes
// of its expert rows and of their weights.
#include "moe/row_pass.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtype.hpp"
#include "core/parallel.hpp"

#include "core/simd_begin.hpp"

namespace {

#include "moe/row_access.hpp"
#include "moe/row_stream.hpp"

template <class Rule, class R, bool kOfNumbers>
class Back {
 public:
  explicit Back(const BackwardCall& call) : call_(call) {
    for (int i = 0; i < Rule::kNumbers; ++i) numbers_[i] = static_cast<R>(call.numbers[i]);
    const std::int64_t bytes = call.mixture.slots.rows * call.columns * item_size(call.slope_rows.dtype);
    past_caches_ = bytes >= kLarge;
  }

  void block(std::int64_t b) {
    const std::int64_t begin = b * call_.block, end = begin + call_.block;
    if (call_.parts != nullptr) {
      sums_ = static_cast<R*>(call_.parts) + 2 * b * call_.columns;
      for (std::int64_t j = 0; j < 2 * call_.columns; ++j) sums_[j] = R(0);
    }
    for (double& x : totals_) x = 0.0;
    dots_ = call_.weight_parts + b * call_.mixture.slots.k;
    for (std::int64_t t = begin; t < end && t < call_.tokens; ++t) token(t);
    if constexpr (kOfNumbers) {
      for (int i = 0; i < kMaxSlopes; ++i) call_.number_parts[b * kMaxSlopes + i] = totals_[i];
    }
  }

 private:
  static constexpr int kStates = Rule::kStates;
  static constexpr int kSome = kStates > 0 ? kStates : 1;
  using Slopes = DepthSlopes<Rule, kOfNumbers>;
  static constexpr int kSlopes = Slopes::kSlopes;
  static constexpr bool kNormOnly = std::is_same_v<Rule, Lookahead>;
  static constexpr bool kReads = Rule::kCurved || kOfNumbers;  // x, s and z

  void token(std::int64_t t) {
    const bool normed = call_.norm.kind != NormKind::kNone;
    if (normed) begin_norm(t);
    for (std::int64_t i = 0; i < call_.mixture.slots.k; ++i) dots_[i] = 0.0;
    for (std::int64_t first = 0; first < call_.columns; first += kChunk) {
      const std::int64_t n = call_.columns - first < kChunk ? call_.columns - first : kChunk;
      const R* grad = load(call_.grad, t, first, n, grad_);
      const R* grad_state[kSome];
      for (int i = 0; i < kStates; ++i) grad_state[i] = load(call_.grad_state[i], t, first, n, grad_state_[i]);
      if (normed) {
        through_norm(t, first, n);
#pragma GCC ivdep
        for (std::int64_t j = 0; j < n; ++j) grad_[j] = grad[j] + norm_[j];
        grad = grad_;
        if constexpr (Rule::kAhead >= 0) {
          const R alpha = numbers_[Rule::kAhead];
          const R* behind = grad_state[0];
#pragma GCC ivdep
          for (std::int64_t j = 0; j < n; ++j) grad_state_[0][j] = behind[j] + alpha * norm_[j];
          grad_state[0] = grad_state_[0];
          if constexpr (kOfNumbers) {
            const R* s = load(call_.after_state, t, first, n, x_);
            totals_[Rule::kSlopes] += row_dot(norm_, s, n);
          }
        }
      }
      through_rule(t, first, n, grad, grad_state);
    }
    if (call_.slope_weights.data != nullptr) {
      const Slots& s = call_.mixture.slots;
      for (std::int64_t i = 0; i < s.k; ++i) put_number<R>(call_.slope_weights, t, i, dots_[i]);
    }
  }

  // What was normalised.
  const R* row(std::int64_t t, std::int64_t first, std::int64_t n) {
    const R* x = load(call_.after, t, first, n, x_);
    if constexpr (Rule::kAhead < 0) {
      return x;
    } else {
      const R* s = load(call_.after_state, t, first, n, z_);
      const R alpha = numbers_[Rule::kAhead];
#pragma GCC ivdep
      for (std::int64_t j = 0; j < n; ++j) x_[j] = x[j] + alpha * s[j];
      return x_;
    }
  }

  // With y = (h - mean) * scale: norm_ = weight * grad and y_ = y on a chunk.
  void weigh(std::int64_t t, std::int64_t first, std::int64_t n) {
    const R* h = row(t, first, n);
    const R* g = load(call_.grad_normed, t, first, n, norm_);
    const R* weight = static_cast<const R*>(call_.weight) + first;
    const R mean = mean_, scale = scale_;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < n; ++j) {
      y_[j] = (h[j] - mean) * scale;
      norm_[j] = g[j] * weight[j];
    }
  }

  void begin_norm(std::int64_t t) {
    const R* found = static_cast<const R*>(call_.statistics.data) + 2 * t;
    mean_ = found[0];
    scale_ = found[1];
    double sum = 0.0, along = 0.0;
    for (std::int64_t first = 0; first < call_.columns; first += kChunk) {
      const std::int64_t n = call_.columns - first < kChunk ? call_.columns - first : kChunk;
      weigh(t, first, n);
      if (call_.norm.kind == NormKind::kLayer) sum += row_sum(norm_, n);
      along += row_dot(norm_, y_, n);
    }
    const auto columns = static_cast<double>(call_.columns);
    mean_grad_ = static_cast<R>(sum / columns);
    along_ = static_cast<R>(along / columns);
  }

  // norm_ = the slope of the row that was normalised; adds up those of weight and bias.
  void through_norm(std::int64_t t, std::int64_t first, std::int64_t n) {
    if (call_.columns > kChunk) weigh(t, first, n);  // else begin_norm has left them
    const R scale = scale_, mean_grad = mean_grad_, along = along_;
    if (sums_ != nullptr) {
      const R* g = load(call_.grad_normed, t, first, n, x_);
      R* of_weight = sums_ + first;
      R* of_bias = sums_ + call_.columns + first;
#pragma GCC ivdep
      for (std::int64_t j = 0; j < n; ++j) {
        of_weight[j] += g[j] * y_[j];
        of_bias[j] += g[j];
      }
    }
#pragma GCC ivdep
    for (std::int64_t j = 0; j < n; ++j) norm_[j] = scale * (norm_[j] - mean_grad - y_[j] * along);
  }

  void through_rule(std::int64_t t, std::int64_t first, std::int64_t n, const R* grad, const R* const* grad_state) {
    const R* x = zeros_;
    const R* z = zeros_;
    const R* state[kSome];
    R* slope_state[kSome];
    for (int i = 0; i < kStates; ++i) {
      state[i] = kReads ? load(call_.state[i], t, first, n, state_[i]) : zeros_;
      slope_state[i] = target(call_.slope_state[i], t, first, slope_state_[i]);
    }
    if constexpr (kReads && !kNormOnly) {
      bool agree = true;  // forward has looked
      x = load(call_.x, t, first, n, x_);
      z = mixture(call_.mixture, t, first, n, z_, y_, &agree);
    }
    R* slope_x = target(call_.slope_x, t, first, slope_x_);
    R* slope_z = call_.mixture.slots.k > 0 ? slope_z_ : target(call_.slope_rows, t, first, slope_z_);
    slopes(n, x, state, z, grad, grad_state, slope_x, slope_state, slope_z);
    store(call_.slope_x, t, first, n, slope_x);
    for (int i = 0; i < kStates; ++i) store(call_.slope_state[i], t, first, n, slope_state[i]);
    for (int i = 0; i < kSlopes; ++i) totals_[i] += row_sum(slope_number_[i], n);
    store(call_.slope_shared, t, first, n, slope_z);
    if (call_.mixture.slots.k == 0) {
      store(call_.slope_rows, t, first, n, slope_z);
    } else {
      with_float(call_.mixture.rows.dtype, [&](auto storage) { to_slots<decltype(storage)>(t, first, n, slope_z); });
    }
  }

  // Reads x[j] and the like and writes slope_x[j] and the like, by the rule on dual numbers.
  void slopes(std::int64_t n, const R* x, const R* const* state, const R* z, const R* grad, const R* const* grad_state,
              R* slope_x, R* const* slope_state, R* slope_z) {
    const R* from[kSome];
    const R* above[kSome];
    R* to[kSome];
    R* of_number[kSlopes + 1];
    for (int i = 0; i < kStates; ++i) {
      from[i] = state[i];
      above[i] = grad_state[i];
      to[i] = slope_state[i];
    }
    for (int i = 0; i < kSlopes; ++i) of_number[i] = slope_number_[i];
    R p[Rule::kNumbers + 1];
    for (int i = 0; i < Rule::kNumbers; ++i) p[i] = numbers_[i];
#pragma GCC ivdep
    for (std::int64_t j = 0; j < n; ++j) {
      R s[kSome], g[kSome + 1], slope[Slopes::kVariables];
      g[0] = grad[j];
      HOTLOOP_UNROLL
      for (int i = 0; i < kStates; ++i) {
        g[i + 1] = above[i][j];
        s[i] = from[i][j];
      }
      Slopes::at(x[j], s, z[j], p, g, slope);
      slope_x[j] = slope[0];
      slope_z[j] = slope[1];
      HOTLOOP_UNROLL
      for (int i = 0; i < kStates; ++i) to[i][j] = slope[2 + i];
      HOTLOOP_UNROLL
      for (int i = 0; i < kSlopes; ++i) of_number[i][j] = slope[2 + kStates + i];
    }
  }

  // slope of a row = weight * slope of z; slope of its weight = <slope of z, row>.
  template <class S>
  void to_slots(std::int64_t t, std::int64_t first, std::int64_t n, const R* slope_z) {
    const Mixture& m = call_.mixture;
    const bool reads = call_.slope_weights.data != nullptr, writes = call_.slope_rows.data != nullptr;
    const auto row_of = [&](std::int64_t slot) -> const S* {
      if (!reads || slot >= call_.tokens * m.slots.k) return nullptr;
      const std::int64_t row = m.slots.row_of_slot[slot];
      return row < 0 || row >= m.slots.rows ? nullptr
                                            : static_cast<const S*>(m.rows.data) + row * m.rows.stride + first;
    };
    for (std::int64_t i = 0; i < m.slots.k; ++i) {
      const std::int64_t slot = t * m.slots.k + i, row = m.slots.row_of_slot[slot];
      if (!m.slots.agree(slot, row)) continue;
      const R weight = m.weights.data != nullptr ? number_at<R>(m.weights, t, i) : R(1);
      S* to = writes ? static_cast<S*>(call_.slope_rows.data) + row * call_.slope_rows.stride + first : nullptr;
      if (reads && writes) {
        const S* y = row_of(slot);
        const S* next = row_of(slot + 1);
        dots_[i] += dot_and_scale(slope_z, y, weight, n, to, next != nullptr ? next : y, past_caches_);
      } else if (reads) {
        dots_[i] += row_dot(slope_z, row_of(slot), n);
      } else if (writes) {
#pragma GCC ivdep
        for (std::int64_t j = 0; j < n; ++j) put_narrow(to[j], weight * slope_z[j]);
      }
    }
  }

  const BackwardCall& call_;
  R numbers_[Rule::kNumbers + 1] = {};
  R mean_ = 0, scale_ = 0, mean_grad_ = 0, along_ = 0;
  R* sums_ = nullptr;
  double* dots_ = nullptr;
  bool past_caches_ = false;
  double totals_[kMaxSlopes] = {};
  R zeros_[kChunk] = {};
  R x_[kChunk], y_[kChunk], z_[kChunk], grad_[kChunk], norm_[kChunk], state_[kSome][kChunk], grad_state_[kSome][kChunk];
  R slope_x_[kChunk], slope_z_[kChunk], slope_state_[kSome][kChunk], slope_number_[kSlopes + 1][kChunk];
};

template <class Rule, class R>
void run(const BackwardCall& call) {
  parallel_for(call.blocks, call.grain, [&](std::int64_t begin, std::int64_t end) {
    if (call.slope_numbers != nullptr) {
      Back<Rule, R, true> mine(call);
      for (std::int64_t b = begin; b < end; ++b) mine.block(b);
    } else {
      Back<Rule, R, false> mine(call);
      for (std::int64_t b = begin; b < end; ++b) mine.block(b);
    }
    fence();
  });
}

}  // namespace

void moe_step_backward(const BackwardCall& call) {
  note_simd_level();
  with_depth_rule(call.rule,
                  [&](auto rule) { call.wide ? run<decltype(rule), double>(call) : run<decltype(rule), float>(call); });
}

#include "core/simd_end.hpp"
