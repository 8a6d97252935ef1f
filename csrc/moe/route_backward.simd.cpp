// SPDX-License-Identifier: Apache-2.0
// The gradient of the router's logits, a row at a time: the row is read once, its scores are computed again, and the
// gradients of weights, score sums and log-sum-exp are put together. With p the softmax, a gradient D of the sums and z
// of the log-sum-exp give p_e (D_e + z - <p, D>); weights add to the chosen experts, and, unless they are renormalised,
// a multiple of p to all.
#include "moe/route.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "core/vmath.hpp"

#include "core/simd_begin.hpp"

#include "moe/route_rows.hpp"

namespace {

template <class R>
HOTLOOP_INLINE R dot(const R* a, const R* b, std::int64_t n) {
  Lanes<R> sum = Lanes<R>::all(R(0));
  for (std::int64_t i = 0; i < n; i += kLanes) sum = sum + Lanes<R>::load(a + i) * Lanes<R>::load(b + i);
  return sum_of(sum);
}

// Loops of their own, over all of a row, are those that GCC vectorises.
template <class R>
__attribute__((noinline)) void exponentials(const R* __restrict x, std::int64_t n, R shift, R* __restrict out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = vexp_weight(x[i] - shift);
}
template <class R>
__attribute__((noinline)) void sigmoids(const R* __restrict x, std::int64_t n, R* __restrict out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = vsigmoid(x[i]);
}

template <class Storage>
class Backward {
 public:
  using R = typename Accumulate<Storage>::type;

  explicit Backward(const RouteBackwardCall& call)
      : call_(call),
        s_(call.selection),
        k_(call.selection.top_k),
        experts_(call.logits.experts),
        n_(padded(experts_)),
        memory_(new (std::align_val_t{64}) R[static_cast<std::size_t>(5 * n_)]),
        x_(memory_.get()),
        p_(x_ + n_),
        sigmoid_(p_ + n_),
        above_(sigmoid_ + n_),
        d_(above_ + n_),
        narrow_(new Storage[static_cast<std::size_t>(std::is_same_v<Storage, R> ? 1 : n_)]) {
    for (std::int64_t i = 0; i < n_; ++i) above_[i] = R(0);
  }

  // Gradients of the sums of a sequence, as every token of it meets them.
  void sequence(std::int64_t s) {
    if (call_.d_prob_sums == nullptr) return;
    const R* const from = static_cast<const R*>(call_.d_prob_sums) + s * experts_;
    std::memcpy(above_, from, static_cast<std::size_t>(experts_) * sizeof(R));
  }

  void token(std::int64_t t) {
    Storage* const out = static_cast<Storage*>(call_.result) + t * experts_;
    const std::int64_t* const ids = call_.ids + t * k_;
    if (ids[0] < 0) {
      std::memset(static_cast<void*>(out), 0, static_cast<std::size_t>(experts_) * sizeof(Storage));
      return;
    }
    const auto* row = static_cast<const Storage*>(call_.logits.data) + t * call_.logits.row_stride;
    const R z = call_.d_logsumexp != nullptr ? static_cast<const R*>(call_.d_logsumexp)[t] : R(0);
    R chosen[kMostChoices];
    R* d = d_;
    if constexpr (std::is_same_v<Storage, R>) {
      if (n_ == experts_) d = out;
    }
    s_.sigmoid ? by_sigmoid(row, ids, t, z, chosen, d) : by_softmax(row, ids, t, z, chosen, d);
    for (std::int64_t j = 0; j < k_; ++j) d[ids[j]] += chosen[j];
    if constexpr (std::is_same_v<Storage, R>) {
      if (d != out) std::memcpy(out, d, static_cast<std::size_t>(experts_) * sizeof(R));
    } else {
      for (std::int64_t i = 0; i < n_; ++i) put(narrow_[i], d[i]);
      std::memcpy(out, narrow_.get(), static_cast<std::size_t>(experts_) * sizeof(Storage));
    }
  }

 private:
  // d: what all logits get; chosen: what is added for the chosen ones.
  void by_softmax(const Storage* row, const std::int64_t* ids, std::int64_t t, R z, R* chosen, R* d) {
    const bool all = call_.d_prob_sums != nullptr || z != R(0) || !s_.renormalize;
    if (!all && (s_.late || !(s_.biased || s_.open_groups < s_.groups))) {
      // Only the logits of the chosen experts matter, the largest of all among them.
      R most = -kInf<R>;
      for (std::int64_t j = 0; j < k_; ++j) chosen[j] = to_float(row[ids[j]]);
      for (std::int64_t j = 0; j < k_; ++j) most = std::max(most, chosen[j]);
      for (std::int64_t j = 0; j < k_; ++j) chosen[j] = weight(chosen[j] - most);
      renormalized(t, chosen, kTiny<R>);
      for (std::int64_t i = 0; i < n_; ++i) d[i] = R(0);
      return;
    }
    exponentials(x_, n_, largest_of(read_row(row, experts_, n_, x_)), p_);
    const R inverse = R(1) / sum_of(lane_sums(p_, n_));
    for (std::int64_t i = 0; i < n_; ++i) p_[i] *= inverse;
    R common = z;
    if (call_.d_prob_sums != nullptr) common -= dot(p_, above_, n_);
    if (s_.late) {
      R top = -kInf<R>;
      for (std::int64_t j = 0; j < k_; ++j) top = std::max(top, x_[ids[j]]);
      for (std::int64_t j = 0; j < k_; ++j) chosen[j] = weight(x_[ids[j]] - top);
      renormalized(t, chosen, kTiny<R>);
    } else {
      for (std::int64_t j = 0; j < k_; ++j) chosen[j] = p_[ids[j]];
      if (s_.renormalize) {
        common -= renormalized(t, chosen, kTiny<R>);
      } else {
        for (std::int64_t j = 0; j < k_; ++j) {
          chosen[j] *= static_cast<R>(s_.scale) * d_weight(t, j);
          common -= chosen[j];
        }
      }
    }
    for (std::int64_t i = 0; i < n_; ++i) d[i] = p_[i] * (above_[i] + common);
  }

  void by_sigmoid(const Storage* row, const std::int64_t* ids, std::int64_t t, R z, R* chosen, R* d) {
    const Lanes<R> best = read_row(row, experts_, n_, x_);
    sigmoids(x_, n_, sigmoid_);
    const R total = sum_of(lane_sums(sigmoid_, n_)) + kTiny<R>;
    for (std::int64_t i = 0; i < n_; ++i) d[i] = R(0);
    if (call_.d_prob_sums != nullptr) {
      const R inverse = R(1) / total, mean = dot(sigmoid_, above_, n_) * inverse;
      for (std::int64_t i = 0; i < n_; ++i) d[i] = sigmoid_[i] * (R(1) - sigmoid_[i]) * inverse * (above_[i] - mean);
    }
    if (z != R(0)) {
      exponentials(x_, n_, largest_of(best), p_);
      const R factor = z / sum_of(lane_sums(p_, n_));
      for (std::int64_t i = 0; i < n_; ++i) d[i] += p_[i] * factor;
    }
    R sum = R(1), inner = R(0);
    if (s_.renormalize) {
      sum = kTiny<R>;
      for (std::int64_t j = 0; j < k_; ++j) sum += sigmoid_[ids[j]];
      for (std::int64_t j = 0; j < k_; ++j) inner += sigmoid_[ids[j]] * d_weight(t, j);
      inner /= sum;
    }
    const R factor = static_cast<R>(s_.scale) / sum;
    for (std::int64_t j = 0; j < k_; ++j) {
      const R s = sigmoid_[ids[j]];
      chosen[j] = factor * s * (R(1) - s) * (d_weight(t, j) - inner);
    }
  }

  // From scores of the chosen experts to the gradients of their logits, where weights are scores / (their sum + tiny).
  // Returns what `tiny` takes from all logits, in units of the softmax.
  HOTLOOP_INLINE R renormalized(std::int64_t t, R* chosen, R tiny) const {
    R sum = tiny, inner = R(0);
    for (std::int64_t j = 0; j < k_; ++j) sum += chosen[j];
    for (std::int64_t j = 0; j < k_; ++j) chosen[j] /= sum;
    for (std::int64_t j = 0; j < k_; ++j) inner += chosen[j] * d_weight(t, j);
    const R scale = static_cast<R>(s_.scale);
    for (std::int64_t j = 0; j < k_; ++j) chosen[j] *= scale * (d_weight(t, j) - inner);
    return scale * inner * (tiny / sum);
  }

  HOTLOOP_INLINE R d_weight(std::int64_t t, std::int64_t j) const {
    return call_.d_weights != nullptr ? static_cast<const R*>(call_.d_weights)[t * k_ + j] : R(0);
  }

  // exp(gap), where only -inf is chosen: 0.
  static HOTLOOP_INLINE R weight(R gap) { return gap == gap ? vexp_weight(gap) : R(0); }

  struct Free {
    void operator()(R* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };

  const RouteBackwardCall& call_;
  const Selection& s_;
  const std::int64_t k_, experts_, n_;
  std::unique_ptr<R[], Free> memory_;
  R *x_, *p_, *sigmoid_, *above_, *d_;
  std::unique_ptr<Storage[]> narrow_;
};

template <class Storage>
void run(const RouteBackwardCall& call) {
  const Logits& logits = call.logits;
  const std::int64_t grain = std::max<std::int64_t>(1, 16384 / logits.experts);
  parallel_for(logits.tokens, grain, [&](std::int64_t first, std::int64_t last) {
    Backward<Storage> backward(call);
    std::int64_t s = 0;
    for (std::int64_t t = first; t < last;) {
      std::int64_t end = last;
      if (logits.offsets != nullptr) {
        while (logits.offsets[s + 1] <= t) ++s;
        end = std::min(last, logits.offsets[s + 1]);
      }
      backward.sequence(s);
      for (; t < end; ++t) backward.token(t);
    }
  });
}

}  // namespace

void route_backward(const RouteBackwardCall& call) {
  note_simd_level();
  with_float(call.logits.dtype, [&](auto storage) { run<decltype(storage)>(call); });
}

#include "core/simd_end.hpp"
