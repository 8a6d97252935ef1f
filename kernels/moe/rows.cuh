// SPDX-License-Identifier: Apache-2.0
// Forward of the pass over rows, and permute. A block per token: it looks up the expert rows of the token, adds them on
// strips of eight columns, moves states and stream by the depth rule of the CPU (csrc/moe/depth_rules.hpp), and keeps
// what was stored in shared memory for the norm. Every number is read and written once.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels/moe/blocks.cuh"
#include "kernels/moe/strips.cuh"
#include "moe/depth_rules.hpp"
#include "moe/row_pass.hpp"

namespace hotloop::moe::gpu {

// Of a row that is normalised in shared memory.
inline constexpr std::int64_t kMostKept = 32 << 10;

template <class Rule, class R>
struct StepRows {
  static constexpr int kMostThreads = kMostRowThreads;
  static constexpr int kStates = Rule::kStates, kSome = kStates > 0 ? kStates : 1;
  static constexpr bool kNormOnly = std::is_same_v<Rule, Lookahead>;
  static constexpr bool kAnyOut = std::is_same_v<Rule, Combine>;  // its result may be of another width
  StepCall call;
  Numbers numbers;
  MixtureRows<R> mixture;
  Source x, state[kSome], weight, bias;
  Target out, out_state[kSome], normed;

  StepRows(const StepCall& given, const Numbers& n)
      : call(given),
        numbers(n),
        mixture(given.mixture),
        x(given.x),
        weight(given.norm.weight),
        bias(given.norm.bias),
        out(given.out),
        normed(given.normed) {
    for (int i = 0; i < kStates; ++i) {
      state[i] = Source(given.state[i]);
      out_state[i] = Target(given.out_state[i]);
    }
  }

  HOTLOOP_INLINE std::int64_t blocks() const { return call.tokens; }
  HOTLOOP_INLINE int threads() const { return threads_for(call.columns); }
  HOTLOOP_INLINE bool norms() const { return call.norm.kind != NormKind::kNone; }
  HOTLOOP_INLINE bool keeps() const {
    return norms() && call.columns * static_cast<std::int64_t>(sizeof(R)) <= kMostKept;
  }
  HOTLOOP_BOTH std::int64_t shared_bytes() const {
    Arrays arrays(nullptr);
    static_cast<void>(Shared(arrays, *this));
    return arrays.bytes();
  }

  struct Shared {
    SlotsOf<R> slots;
    double* of_warp;  // twice
    R* kept;
    HOTLOOP_BOTH Shared(Arrays& arrays, const StepRows& body)
        : slots(arrays, body.mixture.k),
          of_warp(arrays.take<double>(2 * (kMostThreads / kWarp))),
          kept(arrays.take<R>(body.keeps() ? (body.call.columns + kStrip - 1) / kStrip * kStrip : 0)) {}
  };

  HOTLOOP_BOTH void operator()(std::int64_t t, int thread, void* memory) const {
    Arrays arrays(memory);
    const Shared shared(arrays, *this);
    if (mixture.k > 0) {
      shared.slots.read(call.mixture, t, thread, threads());
      cuda::block_barrier();
    }
    R p[Rule::kNumbers + 1] = {};
    numbers.template read<Rule::kNumbers>(p);
    if (!kNormOnly || keeps()) {
      each_strip(thread, threads(), call.columns, [&](std::int64_t column, int n) {
        if (n > 0) move(t, column, n, p, shared);
      });
    }
    if (norms()) normalize(t, thread, p, shared);
  }

 private:
  // The rule on a strip.
  HOTLOOP_BOTH void move(std::int64_t t, std::int64_t column, int n, const R* p, const Shared& shared) const {
    R v[kStrip], s[kSome][kStrip] = {};
    load(x, t, column, n, v);
    HOTLOOP_UNROLL
    for (int i = 0; i < kStates; ++i) load(state[i], t, column, n, s[i]);
    if constexpr (!kNormOnly) {
      R z[kStrip];
      mixture.read(shared.slots, t, column, n, z);
      HOTLOOP_UNROLL
      for (int j = 0; j < kStrip; ++j) {
        R mine[kSome];
        HOTLOOP_UNROLL
        for (int i = 0; i < kStates; ++i) mine[i] = s[i][j];
        v[j] = Rule::template step<R>(v[j], mine, z[j], p, p);
        HOTLOOP_UNROLL
        for (int i = 0; i < kStates; ++i) s[i][j] = mine[i];
      }
      store<kAnyOut>(out, t, column, n, v);
      HOTLOOP_UNROLL
      for (int i = 0; i < kStates; ++i) store(out_state[i], t, column, n, s[i]);
    }
    if (!keeps()) return;
    ahead(v, s[0], p);
    HOTLOOP_UNROLL
    for (int j = 0; j < kStrip; ++j) shared.kept[column + j] = v[j];
  }

  static HOTLOOP_INLINE void ahead([[maybe_unused]] R* v, [[maybe_unused]] const R* s, [[maybe_unused]] const R* p) {
    if constexpr (Rule::kAhead >= 0) {
      HOTLOOP_UNROLL
      for (int j = 0; j < kStrip; ++j) v[j] += p[Rule::kAhead] * s[j];
    }
  }

  // What is normalised: the row as it was stored, looking ahead along the state if the rule does; 0 beyond its end.
  HOTLOOP_BOTH void row(std::int64_t t, std::int64_t column, int n, const R* p, const Shared& shared, R* h) const {
    if (keeps() && n > 0) {
      HOTLOOP_UNROLL
      for (int j = 0; j < kStrip; ++j) h[j] = shared.kept[column + j];
      return;
    }
    R s[kStrip] = {};
    if constexpr (kNormOnly) {
      load(x, t, column, n, h);
      load(state[0], t, column, n, s);
    } else {
      load<kAnyOut, true>(Source({out.data, out.dtype, out.stride}), t, column, n, h);
      if constexpr (Rule::kAhead >= 0) {
        load<false, true>(Source({out_state[0].data, out_state[0].dtype, out_state[0].stride}), t, column, n, s);
      }
    }
    ahead(h, s, p);
  }

  HOTLOOP_BOTH void normalize(std::int64_t t, int thread, const R* p, const Shared& shared) const {
    const auto columns = static_cast<double>(call.columns);
    double sum = 0.0;
    R part = R(0), h[kStrip];
    if (call.norm.kind == NormKind::kLayer) {
      each_strip(thread, threads(), call.columns, [&](std::int64_t column, int n) {
        row(t, column, n, p, shared, h);
        HOTLOOP_UNROLL
        for (int j = 0; j < kStrip; ++j) part += j < n ? h[j] : R(0);
      });
      sum = sum_of_block(part, shared.of_warp, thread, threads());
    }
    const R mean = static_cast<R>(sum / columns);
    part = R(0);
    each_strip(thread, threads(), call.columns, [&](std::int64_t column, int n) {
      row(t, column, n, p, shared, h);
      HOTLOOP_UNROLL
      for (int j = 0; j < kStrip; ++j) part += j < n ? (h[j] - mean) * (h[j] - mean) : R(0);
    });
    const double squares = sum_of_block(part, shared.of_warp + kMostThreads / kWarp, thread, threads());
    const R scale = static_cast<R>(1.0 / sqrt(squares / columns + call.norm.eps));
    each_strip(thread, threads(), call.columns, [&](std::int64_t column, int n) {
      if (n <= 0) return;
      row(t, column, n, p, shared, h);
      R factor[kStrip], beside[kStrip];
      load<true>(bias, 0, column, n, beside);
      load<true>(weight, 0, column, n, factor);
      HOTLOOP_UNROLL
      for (int j = 0; j < kStrip; ++j) {
        h[j] = (h[j] - mean) * scale * (weight.data != nullptr ? factor[j] : R(1)) + beside[j];
      }
      store(normed, t, column, n, h);
    });
    if (call.statistics.data == nullptr || thread != 0) return;
    R* const found = static_cast<R*>(call.statistics.data) + 2 * t;
    found[0] = mean;
    found[1] = scale;
  }
};

// out[r] = x[slot_of_row[r] / k], or zeros; a warp per row.
struct PermuteRows {
  static constexpr int kMostThreads = 4 * kWarp;
  Source x;
  Target out;
  Slots slots;
  std::int64_t tokens, columns;

  HOTLOOP_INLINE std::int64_t blocks() const { return (slots.rows + 3) / 4; }
  HOTLOOP_INLINE int threads() const { return kMostThreads; }
  HOTLOOP_INLINE std::int64_t shared_bytes() const { return 0; }
  HOTLOOP_BOTH void operator()(std::int64_t block, int thread, void*) const {
    const std::int64_t r = block * 4 + thread / kWarp;
    if (r >= slots.rows) return;
    const std::int64_t slot = slots.slot_of_row[r], all = tokens * slots.k;
    const bool reads = slot >= 0 && slot < all && slots.row_of_slot[slot] == r;
    const std::int64_t t = reads ? slot / slots.k : 0;
    with_float(x.dtype, [&](auto storage) {
      using Storage = decltype(storage);
      each_strip(thread % kWarp, kWarp, columns, [&](std::int64_t column, int n) {
        if (n <= 0) return;
        Strip<Storage> strip{};
        if (reads) strip = strip_at(static_cast<const Storage*>(x.data) + t * x.stride + column, n, x.packed);
        put_strip(strip, static_cast<Storage*>(out.data) + r * out.stride + column, n, out.packed);
      });
    });
  }
};

// Calls run(body).
template <class Run>
void step(const StepCall& call, const Numbers& numbers, Run&& run) {
  with_depth_rule(call.rule, [&](auto rule) {
    using Rule = decltype(rule);
    call.wide ? run(StepRows<Rule, double>(call, numbers)) : run(StepRows<Rule, float>(call, numbers));
  });
}
template <class Run>
void permute(const Rows& x, std::int64_t tokens, std::int64_t columns, const Slots& slots, const RowsOut& out,
             Run&& run) {
  run(PermuteRows{Source(x), Target(out), slots, tokens, columns});
}

}  // namespace hotloop::moe::gpu
