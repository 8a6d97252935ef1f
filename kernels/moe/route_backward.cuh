// SPDX-License-Identifier: Apache-2.0
// The gradient of the router's logits: a warp per token, which holds its row in shared memory. What it computes is
// written in csrc/moe/route_backward.simd.cpp.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/vmath.hpp"
#include "kernels/moe/blocks.cuh"
#include "kernels/moe/pieces.cuh"
#include "moe/route.hpp"

namespace hotloop::moe::gpu {

// The gradient of a row of logits, a warp each.
template <class Storage>
struct RouteBackward {
  using R = typename Accumulate<Storage>::type;
  static constexpr int kMostThreads = 4 * kWarp;
  RouteBackwardCall call;
  Pieces pieces;

  HOTLOOP_INLINE int warps() const { return call.logits.experts <= 1024 ? 4 : 1; }
  HOTLOOP_INLINE std::int64_t blocks() const { return (call.logits.tokens + warps() - 1) / warps(); }
  HOTLOOP_INLINE int threads() const { return warps() * kWarp; }
  HOTLOOP_INLINE std::int64_t shared_bytes() const {
    return warps() * call.logits.experts * static_cast<std::int64_t>(sizeof(R));
  }

  HOTLOOP_BOTH void operator()(std::int64_t block, int thread, void* memory) const {
    const int warp = thread / kWarp, lane = thread % kWarp;
    const std::int64_t t = block * warps() + warp, experts = call.logits.experts, k = call.selection.top_k;
    if (t >= call.logits.tokens) return;
    R* const d = static_cast<R*>(memory) + warp * experts;  // the row of logits, its scores, then the gradient
    Chosen chosen;
    HOTLOOP_UNROLL
    for (int r = 0; r < kRounds; ++r) {
      const int i = r * kWarp + lane;
      chosen.has[r] = i < k;
      chosen.id[r] = i < k ? call.ids[t * k + i] : 0;
      chosen.above[r] = i < k && call.d_weights != nullptr ? static_cast<const R*>(call.d_weights)[t * k + i] : R(0);
      chosen.value[r] = R(0);
    }
    if (call.ids[t * k] < 0) {
      for (std::int64_t e = lane; e < experts; e += kWarp) put_at(t, e, R(0));
      return;
    }
    const auto* row = static_cast<const Storage*>(call.logits.data) + t * call.logits.row_stride;
    const R z = call.d_logsumexp != nullptr ? static_cast<const R*>(call.d_logsumexp)[t] : R(0);
    const R* above = static_cast<const R*>(call.d_prob_sums);
    if (above != nullptr) above += pieces.sequence_of(t) * experts;
    call.selection.sigmoid ? by_sigmoid(row, lane, z, above, chosen, d) : by_softmax(row, lane, z, above, chosen, d);
    cuda::warp_barrier();
    HOTLOOP_UNROLL
    for (int r = 0; r < kRounds; ++r) {
      if (chosen.has[r]) d[chosen.id[r]] += chosen.value[r];
    }
    cuda::warp_barrier();
    for (std::int64_t e = lane; e < experts; e += kWarp) put_at(t, e, d[e]);
  }

 private:
  // The choices of a lane: what they get from their weights, and what is given to these.
  struct Chosen {
    bool has[kRounds];
    std::int64_t id[kRounds];
    R above[kRounds], value[kRounds];
  };

  HOTLOOP_INLINE void put_at(std::int64_t t, std::int64_t e, R x) const {
    put(static_cast<Storage*>(call.result)[t * call.logits.experts + e], x);
  }
  template <class F>
  HOTLOOP_INLINE void each(int lane, F&& f) const {
    for (std::int64_t e = lane; e < call.logits.experts; e += kWarp) f(e);
  }
  template <class F>
  static HOTLOOP_INLINE void each_chosen(const Chosen& chosen, F&& f) {
    HOTLOOP_UNROLL
    for (int r = 0; r < kRounds; ++r) {
      if (chosen.has[r]) f(r);
    }
  }

  // chosen.value = exp(logit - the largest chosen one); where only infinities are chosen: 1.
  HOTLOOP_BOTH static void against_each_other(const Storage* row, Chosen& chosen) {
    R top = -kInf<R>;
    each_chosen(chosen, [&](int r) {
      chosen.value[r] = to_float(row[chosen.id[r]]);
      top = chosen.value[r] > top ? chosen.value[r] : top;
    });
    top = cuda::most_of_warp(top);
    each_chosen(chosen, [&](int r) {
      const R gap = chosen.value[r] - top;
      chosen.value[r] = vexp_weight(gap == gap ? gap : R(0));
    });
  }

  // From scores of the chosen experts to the gradients of their logits, where weights are scores / (their sum + tiny).
  // Returns what `tiny` takes from all logits, in units of the softmax.
  HOTLOOP_BOTH R renormalized(Chosen& chosen, R tiny) const {
    R sum = R(0), inner = R(0);
    each_chosen(chosen, [&](int r) { sum += chosen.value[r]; });
    sum = cuda::sum_of_warp(sum) + tiny;
    each_chosen(chosen, [&](int r) {
      chosen.value[r] /= sum;
      inner += chosen.value[r] * chosen.above[r];
    });
    inner = cuda::sum_of_warp(inner);
    const R scale = static_cast<R>(call.selection.scale);
    each_chosen(chosen, [&](int r) { chosen.value[r] *= scale * (chosen.above[r] - inner); });
    return scale * inner * (tiny / sum);
  }

  HOTLOOP_BOTH void by_softmax(const Storage* row, int lane, R z, const R* above, Chosen& chosen, R* d) const {
    const Selection& s = call.selection;
    const bool all = above != nullptr || z != R(0) || !s.renormalize;
    if (!all && (s.late || !(s.biased || s.open_groups < s.groups))) {
      // Only the logits of the chosen experts matter, the largest of all among them.
      against_each_other(row, chosen);
      renormalized(chosen, R(0));
      each(lane, [&](std::int64_t e) { d[e] = R(0); });
      return;
    }
    R most = -kInf<R>, sum = R(0), along = R(0);
    each(lane, [&](std::int64_t e) {
      d[e] = to_float(row[e]);
      most = d[e] > most ? d[e] : most;
    });
    most = cuda::most_of_warp(most);
    each(lane, [&](std::int64_t e) {
      d[e] = vexp_weight(d[e] - most);
      sum += d[e];
      if (above != nullptr) along += d[e] * above[e];
    });
    const R inverse = R(1) / cuda::sum_of_warp(sum);
    R common = z;
    if (above != nullptr) common -= cuda::sum_of_warp(along) * inverse;
    if (s.late) {
      against_each_other(row, chosen);
      renormalized(chosen, R(0));
    } else {
      cuda::warp_barrier();
      each_chosen(chosen, [&](int r) { chosen.value[r] = d[chosen.id[r]] * inverse; });
      cuda::warp_barrier();
      if (s.renormalize) {
        common -= renormalized(chosen, kTiny<R>);
      } else {
        R taken = R(0);
        each_chosen(chosen, [&](int r) {
          chosen.value[r] *= static_cast<R>(s.scale) * chosen.above[r];
          taken += chosen.value[r];
        });
        common -= cuda::sum_of_warp(taken);
      }
    }
    each(lane, [&](std::int64_t e) { d[e] = d[e] * inverse * (common + (above != nullptr ? above[e] : R(0))); });
  }

  HOTLOOP_BOTH void by_sigmoid(const Storage* row, int lane, R z, const R* above, Chosen& chosen, R* d) const {
    const Selection& s = call.selection;
    R most = -kInf<R>, sum = R(0), total = R(0), along = R(0);
    each(lane, [&](std::int64_t e) {
      d[e] = to_float(row[e]);
      most = d[e] > most ? d[e] : most;
      const R score = vsigmoid(d[e]);
      total += score;
      if (above != nullptr) along += score * above[e];
    });
    if (z != R(0)) {
      most = cuda::most_of_warp(most);
      each(lane, [&](std::int64_t e) { sum += vexp_weight(d[e] - most); });
      sum = cuda::sum_of_warp(sum);
    }
    const R inverse = R(1) / (cuda::sum_of_warp(total) + kTiny<R>), mean = cuda::sum_of_warp(along) * inverse;
    each_chosen(chosen, [&](int r) { chosen.value[r] = vsigmoid(static_cast<R>(to_float(row[chosen.id[r]]))); });
    R bottom = R(1), inner = R(0);
    if (s.renormalize) {
      bottom = R(0);
      each_chosen(chosen, [&](int r) {
        bottom += chosen.value[r];
        inner += chosen.value[r] * chosen.above[r];
      });
      bottom = cuda::sum_of_warp(bottom) + kTiny<R>;
      inner = cuda::sum_of_warp(inner) / bottom;
    }
    const R factor = static_cast<R>(s.scale) / bottom;
    each_chosen(chosen, [&](int r) {
      const R score = chosen.value[r];
      chosen.value[r] = factor * score * (R(1) - score) * (chosen.above[r] - inner);
    });
    each(lane, [&](std::int64_t e) {
      const R x = d[e], score = vsigmoid(x);
      R slope = above != nullptr ? score * (R(1) - score) * inverse * (above[e] - mean) : R(0);
      if (z != R(0)) slope += vexp_weight(x - most) * (z / sum);
      d[e] = slope;
    });
  }
};

template <class Run>
void route_backward(const RouteBackwardCall& call, Run&& run) {
  with_float(call.logits.dtype,
             [&](auto storage) { run(RouteBackward<decltype(storage)>{call, pieces_of(call.logits)}); });
}

}  // namespace hotloop::moe::gpu
