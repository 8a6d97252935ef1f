// SPDX-License-Identifier: Apache-2.0
// Forward of the pass over rows (see row_pass.hpp).
#include "moe/row_pass.hpp"

#include <atomic>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/dtype.hpp"
#include "core/parallel.hpp"

#include "core/simd_begin.hpp"

namespace {

#include "moe/row_access.hpp"

template <class Rule, class R>
class Step {
 public:
  explicit Step(const StepCall& call) : call_(call) {
    for (int i = 0; i < Rule::kNumbers; ++i) numbers_[i] = static_cast<R>(call.numbers[i]);
  }

  bool rows(std::int64_t begin, std::int64_t end) {
    bool agree = true;
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t first = 0; first < call_.columns; first += kChunk) {
        move(t, first, call_.columns - first < kChunk ? call_.columns - first : kChunk, &agree);
      }
      if (call_.norm.kind != NormKind::kNone) normalize(t);
    }
    return agree;
  }

 private:
  static constexpr int kStates = Rule::kStates;
  static constexpr bool kNormOnly = std::is_same_v<Rule, Lookahead>;
  static constexpr int kSome = kStates > 0 ? kStates : 1;  // an array has at least one element

  // The rule on a chunk of a row.
  void move(std::int64_t t, std::int64_t first, std::int64_t n, bool* agree) {
    if constexpr (kNormOnly) return;
    const R* z = mixture(call_.mixture, t, first, n, z_, out_, agree);
    const R* x = load(call_.x, t, first, n, x_);
    R* out = target(call_.out, t, first, out_);
    const R* before[kSome];
    R* after[kSome];
    for (int i = 0; i < kStates; ++i) {
      before[i] = load(call_.state[i], t, first, n, state_[i]);
      after[i] = target(call_.out_state[i], t, first, state_[i]);
    }
    advance(x, before, z, n, out, after);
    store(call_.out, t, first, n, out);
    for (int i = 0; i < kStates; ++i) store(call_.out_state[i], t, first, n, after[i]);
  }

  void advance(const R* x, const R* const* before, const R* z, std::int64_t n, R* out, R* const* after) const {
    const R* from[kSome];
    R* to[kSome];
    R p[Rule::kNumbers + 1];
    for (int i = 0; i < kStates; ++i) {
      from[i] = before[i];
      to[i] = after[i];
    }
    for (int i = 0; i < Rule::kNumbers; ++i) p[i] = numbers_[i];
#pragma GCC ivdep
    for (std::int64_t j = 0; j < n; ++j) {
      R s[kSome];
      HOTLOOP_UNROLL
      for (int i = 0; i < kStates; ++i) s[i] = from[i][j];
      out[j] = Rule::template step<R>(x[j], s, z[j], p, p);
      HOTLOOP_UNROLL
      for (int i = 0; i < kStates; ++i) to[i][j] = s[i];
    }
  }

  // What is normalised: the row as it was stored, looking ahead along the state if the rule does.
  const R* row(std::int64_t t, std::int64_t first, std::int64_t n) {
    const auto reads = [](const RowsOut& a) { return Rows{a.data, a.dtype, a.stride}; };
    const R* x = load(kNormOnly ? call_.x : reads(call_.out), t, first, n, x_);
    if constexpr (Rule::kAhead < 0) {
      return x;
    } else {
      const R* s = load(kNormOnly ? call_.state[0] : reads(call_.out_state[0]), t, first, n, state_[0]);
      const R alpha = numbers_[Rule::kAhead];
#pragma GCC ivdep
      for (std::int64_t j = 0; j < n; ++j) x_[j] = x[j] + alpha * s[j];
      return x_;
    }
  }

  template <class F>
  void each_chunk(F&& f) {
    for (std::int64_t first = 0; first < call_.columns; first += kChunk) {
      f(first, call_.columns - first < kChunk ? call_.columns - first : kChunk);
    }
  }

  void normalize(std::int64_t t) {
    const auto columns = static_cast<double>(call_.columns);
    double sum = 0.0, squares = 0.0;
    if (call_.norm.kind == NormKind::kLayer) {
      each_chunk([&](std::int64_t first, std::int64_t n) { sum += row_sum(row(t, first, n), n); });
    }
    const R mean = static_cast<R>(sum / columns);
    each_chunk([&](std::int64_t first, std::int64_t n) { squares += row_squares(row(t, first, n), n, mean); });
    const R scale = static_cast<R>(1.0 / std::sqrt(squares / columns + call_.norm.eps));
    each_chunk([&](std::int64_t first, std::int64_t n) {
      const R* h = row(t, first, n);
      const R* weight = static_cast<const R*>(call_.weight) + first;
      const R* bias = static_cast<const R*>(call_.bias) + first;
      R* to = target(call_.normed, t, first, out_);
#pragma GCC ivdep
      for (std::int64_t j = 0; j < n; ++j) to[j] = (h[j] - mean) * scale * weight[j] + bias[j];
      store(call_.normed, t, first, n, to);
    });
    if (call_.statistics.data != nullptr) {
      R* found = static_cast<R*>(call_.statistics.data) + 2 * t;
      found[0] = mean;
      found[1] = scale;
    }
  }

  const StepCall& call_;
  R numbers_[Rule::kNumbers + 1] = {};
  R x_[kChunk], z_[kChunk], out_[kChunk], state_[kSome][kChunk];
};

template <class Rule, class R>
bool step(const StepCall& call) {
  std::atomic<bool> agree{true};
  parallel_for(call.tokens, grain_of(call.columns, call.mixture.slots.k), [&](std::int64_t begin, std::int64_t end) {
    Step<Rule, R> mine(call);
    if (!mine.rows(begin, end)) agree = false;
  });
  return agree;
}

}  // namespace

bool moe_step(const StepCall& call) {
  note_simd_level();
  return with_depth_rule(call.rule, [&](auto rule) {
    return call.wide ? step<decltype(rule), double>(call) : step<decltype(rule), float>(call);
  });
}

#include "core/simd_end.hpp"
