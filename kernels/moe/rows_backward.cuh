// SPDX-License-Identifier: Apache-2.0
// Backward of the pass over rows. A block per run of tokens, one of them at a time: two sums of the norm, then strip by
// strip the norm, the rule by dual numbers, and the slopes of the expert rows and of their weights. What belongs to all
// tokens, the slopes of the norm's weight and bias and of the numbers, is added in a block over its tokens and leaves
// it as a part; parts are merged in order, in double, by a launch of their own. How many tokens make a run depends on
// the shape, so bits do not depend on the device.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/moe/blocks.cuh"
#include "kernels/moe/strips.cuh"
#include "moe/depth_rules.hpp"
#include "moe/row_pass.hpp"

namespace hotloop::moe::gpu {

// Sums of a block that are in shared memory.
inline constexpr std::int64_t kMostSums = 32 << 10;
inline constexpr std::int64_t kMostRuns = 1024;

// What blocks leave.
template <class R>
struct RowParts {
  std::int64_t run = 1, runs = 0;  // tokens of a block, blocks
  R* sums = nullptr;               // (runs, 2, columns): of the norm's weight and bias
  double* numbers = nullptr;       // (runs, kMaxSlopes)

  RowParts(const BackwardCall& call, Arrays& arrays, std::int64_t most_runs = kMostRuns) {
    const bool of_norm = call.slope_norm_weight.data != nullptr || call.slope_norm_bias.data != nullptr;
    const bool of_numbers = call.slope_numbers != nullptr;
    if (of_norm || of_numbers) run = (call.tokens + most_runs - 1) / most_runs;
    run = run < 1 ? 1 : run;
    runs = (call.tokens + run - 1) / run;
    if (of_norm) sums = arrays.take<R>(runs * 2 * call.columns);
    if (of_numbers) numbers = arrays.take<double>(runs * kMaxSlopes);
  }
};

template <class Rule, class R, bool kOfNumbers>
struct StepBack {
  static constexpr int kMostThreads = kMostRowThreads;
  static constexpr int kStates = Rule::kStates, kSome = kStates > 0 ? kStates : 1;
  static constexpr bool kNormOnly = std::is_same_v<Rule, Lookahead>;
  static constexpr bool kAnyOut = std::is_same_v<Rule, Combine>;  // its result may be of another width
  using Slopes = DepthSlopes<Rule, kOfNumbers>;
  static constexpr bool kReads = Rule::kCurved || kOfNumbers;  // x, s and z
  BackwardCall call;
  Numbers numbers;
  RowParts<R> parts;
  MixtureRows<R> mixture;
  Source x, state[kSome], weight, after, after_state, grad, grad_state[kSome], grad_normed;
  Target slope_x, slope_state[kSome], slope_rows, slope_shared;

  StepBack(const BackwardCall& given, const Numbers& n, const RowParts<R>& p)
      : call(given),
        numbers(n),
        parts(p),
        mixture(given.mixture),
        x(given.x),
        weight(given.norm.weight),
        after(given.after),
        after_state(given.after_state),
        grad(given.grad),
        grad_normed(given.grad_normed),
        slope_x(given.slope_x),
        slope_rows(given.slope_rows),
        slope_shared(given.slope_shared) {
    for (int i = 0; i < kStates; ++i) {
      state[i] = Source(given.state[i]);
      grad_state[i] = Source(given.grad_state[i]);
      slope_state[i] = Target(given.slope_state[i]);
    }
  }

  HOTLOOP_INLINE std::int64_t blocks() const { return parts.runs; }
  HOTLOOP_INLINE int threads() const { return threads_for(call.columns); }
  HOTLOOP_INLINE bool norms() const { return call.norm.kind != NormKind::kNone; }
  HOTLOOP_INLINE bool keeps() const {
    return parts.sums != nullptr && 2 * call.columns * static_cast<std::int64_t>(sizeof(R)) <= kMostSums;
  }
  HOTLOOP_BOTH std::int64_t shared_bytes() const {
    Arrays arrays(nullptr);
    static_cast<void>(Shared(arrays, *this));
    return arrays.bytes();
  }

  struct Shared {
    SlotsOf<R> slots;
    double *of_warp, *dots;  // twice; (k, warps)
    R* sums;
    HOTLOOP_BOTH Shared(Arrays& arrays, const StepBack& body)
        : slots(arrays, body.mixture.k),
          of_warp(arrays.take<double>(2 * (kMostThreads / kWarp))),
          dots(arrays.take<double>(body.call.slope_weights.data != nullptr ? body.mixture.k * (body.threads() / kWarp)
                                                                           : 0)),
          sums(arrays.take<R>(body.keeps() ? 2 * body.call.columns : 0)) {}
  };

  // Of a thread.
  struct Own {
    R p[Rule::kNumbers + 1] = {};
    R mean = R(0), scale = R(0), mean_grad = R(0), along = R(0);
    R* sums = nullptr;
    double totals[kMaxSlopes + 1] = {};
  };

  HOTLOOP_BOTH void operator()(std::int64_t block, int thread, void* memory) const {
    Arrays arrays(memory);
    const Shared shared(arrays, *this);
    Own own;
    numbers.template read<Rule::kNumbers>(own.p);
    R* const left = parts.sums != nullptr ? parts.sums + block * 2 * call.columns : nullptr;
    own.sums = keeps() ? shared.sums : left;
    if (left != nullptr) {
      each_sum(thread, [&](std::int64_t at) { own.sums[at] = R(0); });
    }
    const std::int64_t begin = block * parts.run, limit = begin + parts.run;
    for (std::int64_t t = begin; t < limit && t < call.tokens; ++t) token(t, thread, shared, own);
    if (left != nullptr && keeps()) {
      each_sum(thread, [&](std::int64_t at) { left[at] = own.sums[at]; });
    }
    if constexpr (kOfNumbers) {
      for (int i = 0; i < kMaxSlopes; ++i) {
        cuda::block_barrier();
        const double sum = sum_of_block(own.totals[i], shared.of_warp, thread, threads());
        if (thread == 0) parts.numbers[block * kMaxSlopes + i] = sum;
      }
    }
  }

 private:
  // f(at) for the sums of a thread's columns, which no other thread touches.
  template <class F>
  HOTLOOP_INLINE void each_sum(int thread, F&& f) const {
    each_strip(thread, threads(), call.columns, [&](std::int64_t column, int n) {
      for (int i = 0; i < n; ++i) {
        f(column + i);
        f(call.columns + column + i);
      }
    });
  }

  HOTLOOP_BOTH void token(std::int64_t t, int thread, const Shared& shared, Own& own) const {
    const bool dotted = call.slope_weights.data != nullptr;
    const int warps = threads() / kWarp, warp = thread / kWarp;
    if (mixture.k > 0) {
      cuda::block_barrier();  // the slots of the token before have been read
      shared.slots.read(call.mixture, t, thread, threads());
      for (std::int64_t i = thread; dotted && i < mixture.k * warps; i += threads()) shared.dots[i] = 0.0;
      cuda::block_barrier();
    }
    if (norms()) begin_norm(t, thread, shared, own);
    each_strip(thread, threads(), call.columns,
               [&](std::int64_t column, int n) { strip(t, column, n, warp, thread % kWarp, shared, own); });
    if (!dotted || mixture.k == 0) return;
    cuda::block_barrier();
    for (std::int64_t i = thread; i < mixture.k; i += threads()) {
      double sum = 0.0;
      for (int w = 0; w < warps; ++w) sum += shared.dots[i * warps + w];
      put_number(call.slope_weights, t, i, static_cast<R>(sum));
    }
  }

  // With y = (h - mean) * scale of what was normalised: y and weight * grad; 0 beyond the end of the row.
  HOTLOOP_BOTH void weigh(std::int64_t t, std::int64_t column, int n, const Own& own, R* g, R* y, R* weighed) const {
    load(after, t, column, n, y);
    if constexpr (Rule::kAhead >= 0) {
      R s[kStrip];
      load(after_state, t, column, n, s);
      HOTLOOP_UNROLL
      for (int j = 0; j < kStrip; ++j) y[j] += own.p[Rule::kAhead] * s[j];
    }
    load(grad_normed, t, column, n, g);
    load<true>(weight, 0, column, n, weighed);
    HOTLOOP_UNROLL
    for (int j = 0; j < kStrip; ++j) {
      y[j] = j < n ? (y[j] - own.mean) * own.scale : R(0);
      weighed[j] = g[j] * (weight.data != nullptr ? weighed[j] : R(1));
    }
  }

  HOTLOOP_BOTH void begin_norm(std::int64_t t, int thread, const Shared& shared, Own& own) const {
    const R* const found = static_cast<const R*>(call.statistics.data) + 2 * t;
    own.mean = found[0];
    own.scale = found[1];
    R sum = R(0), along = R(0);
    each_strip(thread, threads(), call.columns, [&](std::int64_t column, int n) {
      R g[kStrip], y[kStrip], weighed[kStrip];
      weigh(t, column, n, own, g, y, weighed);
      HOTLOOP_UNROLL
      for (int j = 0; j < kStrip; ++j) {
        sum += weighed[j];
        along += weighed[j] * y[j];
      }
    });
    const auto columns = static_cast<double>(call.columns);
    double* const other = shared.of_warp + kMostThreads / kWarp;
    cuda::block_barrier();  // the sums of the token before have been read
    if (call.norm.kind == NormKind::kLayer) {
      own.mean_grad = static_cast<R>(sum_of_block(sum, shared.of_warp, thread, threads()) / columns);
    }
    own.along = static_cast<R>(sum_of_block(along, other, thread, threads()) / columns);
  }

  HOTLOOP_BOTH void strip(std::int64_t t, std::int64_t column, int n, int warp, int lane, const Shared& shared,
                          Own& own) const {
    R above[kSome + 1][kStrip];  // gradients of the new stream and states
    load<kAnyOut>(grad, t, column, n, above[0]);
    HOTLOOP_UNROLL
    for (int i = 0; i < kStates; ++i) load(grad_state[i], t, column, n, above[i + 1]);
    if (norms()) through_norm(t, column, n, own, above);
    R v[kStrip] = {}, z[kStrip] = {}, s[kSome][kStrip] = {};
    if constexpr (kReads) {
      HOTLOOP_UNROLL
      for (int i = 0; i < kStates; ++i) load(state[i], t, column, n, s[i]);
      if constexpr (!kNormOnly) {
        load(x, t, column, n, v);
        mixture.read(shared.slots, t, column, n, z);
      }
    }
    R of_numbers[kMaxSlopes + 1] = {};
    HOTLOOP_UNROLL
    for (int j = 0; j < kStrip; ++j) {
      R mine[kSome], g[kSome + 1], slope[Slopes::kVariables];
      g[0] = above[0][j];
      HOTLOOP_UNROLL
      for (int i = 0; i < kStates; ++i) {
        mine[i] = s[i][j];
        g[i + 1] = above[i + 1][j];
      }
      Slopes::at(v[j], mine, z[j], own.p, g, slope);
      v[j] = slope[0];
      z[j] = slope[1];
      HOTLOOP_UNROLL
      for (int i = 0; i < kStates; ++i) s[i][j] = slope[2 + i];
      HOTLOOP_UNROLL
      for (int i = 0; i < Slopes::kSlopes; ++i) of_numbers[i] += j < n ? slope[2 + kStates + i] : R(0);
    }
    HOTLOOP_UNROLL
    for (int i = 0; i < Slopes::kSlopes; ++i) own.totals[i] += static_cast<double>(of_numbers[i]);
    if (mixture.k > 0) {
      with_own<R>(mixture.rows.dtype,
                  [&](auto storage) { to_slots<decltype(storage)>(column, n, warp, lane, shared, z); });
    } else {
      R rounded[kStrip];
      HOTLOOP_UNROLL
      for (int j = 0; j < kStrip; ++j) rounded[j] = z[j];
      store(slope_rows, t, column, n, rounded);
    }
    store(slope_shared, t, column, n, z);
    store(slope_x, t, column, n, v);
    HOTLOOP_UNROLL
    for (int i = 0; i < kStates; ++i) store(slope_state[i], t, column, n, s[i]);
  }

  // Adds the slope of the row that was normalised to those of the stream and of the state ahead.
  HOTLOOP_BOTH void through_norm(std::int64_t t, std::int64_t column, int n, Own& own, R (*above)[kStrip]) const {
    R g[kStrip], y[kStrip], slope[kStrip];
    weigh(t, column, n, own, g, y, slope);
    if (own.sums != nullptr) {
      HOTLOOP_UNROLL
      for (int j = 0; j < kStrip; ++j) {
        if (j >= n) continue;
        own.sums[column + j] += g[j] * y[j];
        own.sums[call.columns + column + j] += g[j];
      }
    }
    HOTLOOP_UNROLL
    for (int j = 0; j < kStrip; ++j) {
      slope[j] = j < n ? own.scale * (slope[j] - own.mean_grad - y[j] * own.along) : R(0);
      above[0][j] += slope[j];
    }
    if constexpr (Rule::kAhead >= 0) {
      HOTLOOP_UNROLL
      for (int j = 0; j < kStrip; ++j) above[1][j] += own.p[Rule::kAhead] * slope[j];
      if constexpr (kOfNumbers) {
        R s[kStrip], dot = R(0);
        load(after_state, t, column, n, s);
        HOTLOOP_UNROLL
        for (int j = 0; j < kStrip; ++j) dot += slope[j] * s[j];
        own.totals[Rule::kSlopes] += static_cast<double>(dot);
      }
    }
  }

  // slope of a row = weight * slope of z; slope of its weight = <slope of z, row>.
  template <class Storage>
  HOTLOOP_BOTH void to_slots(std::int64_t column, int n, int warp, int lane, const Shared& shared, const R* z) const {
    const int warps = threads() / kWarp;
    for (std::int64_t i = 0; i < mixture.k; ++i) {
      const std::int64_t row = shared.slots.row[i];
      if (row < 0) continue;
      if (call.slope_weights.data != nullptr) {
        R dot = R(0);
        if (n > 0) {
          const auto y = strip_at(static_cast<const Storage*>(mixture.rows.data) + row * mixture.rows.stride + column,
                                  n, mixture.rows.packed);
          HOTLOOP_UNROLL
          for (int j = 0; j < kStrip; ++j) dot += z[j] * widened<R>(y.of[j]);
        }
        dot = cuda::sum_of_warp(dot);
        if (lane == 0) shared.dots[i * warps + warp] += static_cast<double>(dot);
      }
      if (slope_rows.data == nullptr || n <= 0) continue;
      const R weight_of = shared.slots.weight[i];
      Strip<Storage> strip;
      HOTLOOP_UNROLL
      for (int j = 0; j < kStrip; ++j) strip.of[j] = narrowed<Storage>(weight_of * z[j]);
      put_strip(strip, static_cast<Storage*>(slope_rows.data) + row * slope_rows.stride + column, n, slope_rows.packed);
    }
  }
};

// Rows that no slot reads have slope 0; a warp per row.
struct ClearRows {
  static constexpr int kMostThreads = 4 * kWarp;
  Target out;
  Slots slots;
  std::int64_t tokens, columns;

  HOTLOOP_INLINE std::int64_t blocks() const { return (slots.rows + 3) / 4; }
  HOTLOOP_INLINE int threads() const { return kMostThreads; }
  HOTLOOP_INLINE std::int64_t shared_bytes() const { return 0; }
  HOTLOOP_BOTH void operator()(std::int64_t block, int thread, void*) const {
    const std::int64_t r = block * 4 + thread / kWarp;
    if (r >= slots.rows) return;
    const std::int64_t slot = slots.slot_of_row[r];
    if (slot >= 0 && slot < tokens * slots.k && slots.row_of_slot[slot] == r) return;
    each_strip(thread % kWarp, kWarp, columns, [&](std::int64_t column, int n) {
      float zeros[kStrip] = {};
      store<true>(out, r, column, n, zeros);
    });
  }
};

// The sums over runs of parts (runs, count), in order, in double: the first `split` go to one row, the others to
// another. A block per 32 sums, a warp per span of runs.
template <class Part>
struct MergeRuns {
  static constexpr int kWarps = 8;
  static constexpr int kMostThreads = kWarps * kWarp;
  const Part* parts;
  std::int64_t runs, count, split;
  RowsOut first, second;

  HOTLOOP_INLINE std::int64_t blocks() const { return (count + kWarp - 1) / kWarp; }
  HOTLOOP_INLINE int threads() const { return kMostThreads; }
  HOTLOOP_INLINE std::int64_t shared_bytes() const { return kMostThreads * 8; }
  HOTLOOP_BOTH void operator()(std::int64_t block, int thread, void* memory) const {
    auto* const sums = static_cast<double*>(memory);
    const int warp = thread / kWarp;
    const std::int64_t at = block * kWarp + thread % kWarp;
    double sum = 0.0;
    for (std::int64_t r = runs * warp / kWarps; at < count && r < runs * (warp + 1) / kWarps; ++r) {
      sum += static_cast<double>(parts[r * count + at]);
    }
    sums[thread] = sum;
    cuda::block_barrier();
    if (warp != 0 || at >= count) return;
    for (int w = 1; w < kWarps; ++w) sum += sums[w * kWarp + thread];
    const RowsOut& to = at < split ? first : second;
    if (to.data != nullptr) put_number(to, 0, at < split ? at : at - split, sum);
  }
};

template <class R, class Run>
void step_backward_as(const BackwardCall& call, const Numbers& numbers, void* workspace, std::int64_t most_runs,
                      Run&& run) {
  Arrays arrays(workspace);
  const RowParts<R> parts(call, arrays, most_runs);
  const Slots& slots = call.mixture.slots;
  if (call.slope_rows.data != nullptr && slots.k > 0) {
    run(ClearRows{Target(call.slope_rows), slots, call.tokens, call.columns});
  }
  with_depth_rule(call.rule, [&](auto rule) {
    using Rule = decltype(rule);
    call.slope_numbers != nullptr ? run(StepBack<Rule, R, true>(call, numbers, parts))
                                  : run(StepBack<Rule, R, false>(call, numbers, parts));
  });
  if (parts.sums != nullptr) {
    run(MergeRuns<R>{parts.sums, parts.runs, 2 * call.columns, call.columns, call.slope_norm_weight,
                     call.slope_norm_bias});
  }
  if (parts.numbers != nullptr) {
    run(MergeRuns<double>{
        parts.numbers, parts.runs, kMaxSlopes, kMaxSlopes, RowsOut{call.slope_numbers, Dtype::kFloat64, 0}, {}});
  }
}

// Calls run(body) for each launch, in order. most_runs: fewer than the workspace has room for, in tests of long runs.
template <class Run>
void step_backward(const BackwardCall& call, const Numbers& numbers, void* workspace, Run&& run,
                   std::int64_t most_runs = kMostRuns) {
  call.wide ? step_backward_as<double>(call, numbers, workspace, most_runs, run)
            : step_backward_as<float>(call, numbers, workspace, most_runs, run);
}

inline std::int64_t step_backward_bytes(const BackwardCall& call) {
  Arrays arrays(nullptr);
  if (call.wide) {
    static_cast<void>(RowParts<double>(call, arrays));
  } else {
    static_cast<void>(RowParts<float>(call, arrays));
  }
  return arrays.bytes();
}

}  // namespace hotloop::moe::gpu
