// SPDX-License-Identifier: Apache-2.0
// The router on the CPU: eight tokens at a time.
//
// Of each token the row is read once, into L1: largest logit, exponentials, their sum. The choice of k of E begins with
// a threshold that at least k experts reach: the k-th largest of the maxima of 16 interleaved lanes, which a sorting
// network finds for eight tokens side by side. The few experts above it are picked from bit masks. Each is then ranked
// by how many are better, which keeps equal ones in order; again eight tokens side by side. Tokens with more than 16
// candidates (many equal logits, k above 16) are ranked by themselves, after a search for the exact threshold where
// there are very many. Scores are added to those of the block for eight tokens together.
#include "moe/route.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "core/vmath.hpp"

#include "core/simd_begin.hpp"

#include "moe/route_rows.hpp"
#include "moe/route_side.hpp"

namespace {

constexpr std::int64_t kSpare = 16;  // candidates beyond k of a token that is ranked by itself

template <class Storage>
class Router {
 public:
  using R = typename Accumulate<Storage>::type;
  using V = typename Side<R>::Vector;

  explicit Router(const RouteCall& call)
      : call_(call),
        s_(call.selection),
        k_(call.selection.top_k),
        experts_(call.logits.experts),
        n_(padded(experts_)),
        bias_(static_cast<const R*>(call.bias)),
        by_logits_(s_.late || (bias_ == nullptr && (s_.groups == 1 || s_.group_max))) {
    const bool compares = !by_logits_ || bias_ != nullptr || s_.groups > 1;
    memory_.reset(new (std::align_val_t{64}) R[static_cast<std::size_t>((compares ? 3 : 2) * kBatch * n_ + n_)]);
    e_ = memory_.get();
    x_ = e_ + kBatch * n_;
    nothing_ = x_ + kBatch * n_;
    ranked_ = nothing_ + n_;
    std::fill_n(nothing_, n_, -kInf<R>);
  }

  void block(std::int64_t b) {
    const Block& block = call_.blocks[b];
    counts_ = call_.block_counts + b * experts_;
    R* const sums = static_cast<R*>(call_.block_sums) + b * n_;
    for (std::int64_t i = 0; i < experts_; ++i) counts_[i] = 0;
    for (std::int64_t i = 0; i < n_; ++i) sums[i] = R(0);
    std::int64_t tokens = 0;
    bad_ = -1;
    for (std::int64_t t = block.begin; t < block.end; t += kBatch) {
      tokens += batch(t, std::min(kBatch, block.end - t), sums);
    }
    call_.block_tokens[b] = tokens;
    call_.block_bad[b] = bad_;
  }

 private:
  struct Chosen {
    std::int32_t id[kMostChoices];
    R score[kMostChoices];
  };

  // Eight tokens; of those beyond `count`, and those the mask leaves out, nothing is seen.
  std::int64_t batch(std::int64_t first, std::int64_t count, R* sums) {
    std::int64_t counted = 0;
    alignas(64) R rows[kBatch][kLanes] = {};  // of every token, the largest of each lane, or its sums
    for (std::int64_t t = 0; t < kBatch; ++t) {
      live_[t] = t < count && (call_.logits.mask == nullptr || call_.logits.mask[first + t] != 0);
      logits_[t] = nothing_;
      if (!live_[t]) continue;
      ++counted;
      read(static_cast<const Storage*>(call_.logits.data) + (first + t) * call_.logits.row_stride, t).store(rows[t]);
    }
    V sorted[kLanes];
    sort_falling(rows, sorted);
    const Side<R> most(sorted[0]);
    Side<R> least(sorted[std::min(k_, kLanes) - 1]);
    exponentials(most);
    const Side<R> sum = sums_of_scores();
    if (s_.sigmoid) sigmoids();
    const Side<R> total = s_.sigmoid ? sums_of_scores() : sum;
    const R beside = s_.sigmoid ? kTiny<R> : R(0);
    alignas(64) R logsumexp[kBatch], inverse[kBatch];
    for (std::int64_t t = 0; t < kBatch; ++t) {
      logsumexp[t] = most[t] + vlog(sum[t]);
      inverse[t] = R(1) / (total[t] + beside);
    }
    R* const out = static_cast<R*>(call_.logsumexp) + first;
    for (std::int64_t t = 0; t < kBatch; ++t) {
      if (!live_[t]) inverse[t] = R(0);
      if (t < count) out[t] = live_[t] ? logsumexp[t] : R(0);
      if (live_[t] && !(logsumexp[t] - logsumexp[t] == R(0))) {
        if (bad_ < 0) bad_ = first + t;
        live_[t] = false;
      }
    }
    add(inverse, sums);
    if (!by_logits_ || bias_ != nullptr || s_.groups > 1) {
      for (std::int64_t t = 0; t < kBatch; ++t) {
        if (live_[t]) rank_by(t, s_.sigmoid ? R(1) : inverse[t]).store(rows[t]);
      }
      sort_falling(rows, sorted);
      least = Side<R>(sorted[std::min(k_, kLanes) - 1]);
    }
    choose(first, count, least, inverse);
    return counted;
  }

  R* buffer(std::int64_t t) { return x_ + t * n_; }  // logits, where they are not read in place; then what is compared
  R* scores(std::int64_t t) const { return e_ + t * n_; }  // exp(logit - largest), or the sigmoid

  // The logits of a token; returns the largest of every lane.
  HOTLOOP_INLINE Lanes<R> read(const Storage* row, std::int64_t t) {
    if constexpr (std::is_same_v<Storage, R>) {
      if (n_ == experts_) {
        logits_[t] = row;
        return lane_maxima(row, n_);
      }
    }
    logits_[t] = buffer(t);
    return read_row(row, experts_, n_, buffer(t));
  }

  // scores = exp(logits - most): 0 for tokens that are not seen, whose logits are -inf.
  __attribute__((noinline)) void exponentials(const Side<R>& most) {
    for (std::int64_t t = 0; t < kBatch; ++t) {
      const R* const __restrict x = logits_[t];
      R* const __restrict e = scores(t);
      const R shift = most[t];
      for (std::int64_t i = 0; i < n_; ++i) e[i] = vexp_weight(x[i] - shift);
    }
  }
  __attribute__((noinline)) void sigmoids() {
    for (std::int64_t t = 0; t < kBatch; ++t) {
      const R* const __restrict x = logits_[t];
      R* const __restrict e = scores(t);
      for (std::int64_t i = 0; i < n_; ++i) e[i] = vsigmoid(x[i]);
    }
  }

  Side<R> sums_of_scores() {
    alignas(64) R rows[kBatch][kLanes];
    V lane[kLanes];
    for (std::int64_t t = 0; t < kBatch; ++t) lane_sums(scores(t), n_).store(rows[t]);
    side_by_side(rows, lane);
    HOTLOOP_UNROLL
    for (int half = kLanes / 2; half > 0; half /= 2) {
      HOTLOOP_UNROLL
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    }
    return Side<R>(lane[0]);
  }

  // What experts are chosen by, where it is not the logits; returns the largest of every lane.
  Lanes<R> rank_by(std::int64_t t, R inverse) {
    const R* const __restrict from = by_logits_ ? logits_[t] : scores(t);
    const R unit = by_logits_ ? R(1) : inverse;
    R* const __restrict x = ranked_ + t * n_;
    for (std::int64_t i = 0; i < n_; ++i) x[i] = from[i] * unit;
    if (bias_ != nullptr) {
      const R* const __restrict bias = bias_;
      for (std::int64_t i = 0; i < experts_; ++i) x[i] += bias[i];
    }
    close(x, experts_, n_);
    if (s_.open_groups < s_.groups) close_groups(x);
    logits_[t] = x;
    return lane_maxima(x, n_);
  }

  // Puts NaN, which reaches no threshold, in the place of experts that may not be chosen.
  static void close(R* x, std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) x[i] = std::numeric_limits<R>::quiet_NaN();
  }

  void close_groups(R* x) const {
    const std::int64_t size = experts_ / s_.groups;
    R worth[kMostExperts];
    for (std::int64_t g = 0; g < s_.groups; ++g) worth[g] = worth_of(x + g * size, size);
    for (std::int64_t g = 0; g < s_.groups; ++g) {
      std::int64_t better = 0;
      for (std::int64_t h = 0; h < g; ++h) better += worth[h] >= worth[g] ? 1 : 0;
      for (std::int64_t h = g + 1; h < s_.groups; ++h) better += worth[h] > worth[g] ? 1 : 0;
      if (better >= s_.open_groups) close(x, g * size, (g + 1) * size);
    }
  }

  // The largest of a group, or the sum of its two largest.
  R worth_of(const R* x, std::int64_t size) const {
    Lanes<R> first = Lanes<R>::all(-kInf<R>), second = first;
    const auto take = [&](const Lanes<R>& v) {
      second = larger(smaller(v, first), second);
      first = larger(v, first);
    };
    const std::int64_t whole = size / kLanes * kLanes;
    for (std::int64_t i = 0; i < whole; i += kLanes) take(Lanes<R>::load(x + i));
    if (whole < size) {
      alignas(64) R rest[kLanes];
      Lanes<R>::all(-kInf<R>).store(rest);
      std::memcpy(rest, x + whole, static_cast<std::size_t>(size - whole) * sizeof(R));
      take(Lanes<R>::load(rest));
    }
    if (s_.group_max || size == 1) return largest_of(first);
    alignas(64) R a[kLanes], b[kLanes];
    first.store(a);
    second.store(b);
    for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (std::int64_t l = 0; l < half; ++l) {
        const R low = a[l + half] < a[l] ? a[l + half] : a[l], high = b[l + half] > b[l] ? b[l + half] : b[l];
        a[l] = a[l + half] > a[l] ? a[l + half] : a[l];
        b[l] = low > high ? low : high;
      }
    }
    return a[0] + b[0];
  }

  // sums += scores of the tokens, normalised.
  __attribute__((noinline)) void add(const R* inverse, R* __restrict sums) const {
    const R* const e = e_;
    const std::int64_t n = n_;
    for (std::int64_t i = 0; i < n; i += kLanes) {
      Lanes<R> sum = Lanes<R>::load(sums + i);
      HOTLOOP_UNROLL
      for (std::int64_t t = 0; t < kBatch; ++t) {
        sum = sum + Lanes<R>::load(e + t * n + i) * Lanes<R>::all(inverse[t]);
      }
      sum.store(sums + i);
    }
  }

  void choose(std::int64_t first, std::int64_t count, const Side<R>& least, const R* inverse) {
    Candidates c;
    std::int64_t most = 0;
    for (std::int64_t t = 0; t < kBatch; ++t) {
      c.found[t] = 0;
      if (t >= count || !live_[t] || k_ > kCandidates) continue;
      const std::int64_t found = pick(logits_[t], least[t], c.index[t]);
      if (found > kCandidates) continue;
      c.found[t] = static_cast<typename Side<R>::Whole>(found);
      most = std::max(most, found);
    }
    Chosen chosen[kBatch];
    if (most > 12) {
      choose_side_by_side<16>(c, chosen);
    } else if (most > 8) {
      choose_side_by_side<12>(c, chosen);
    } else if (most > 4) {
      choose_side_by_side<8>(c, chosen);
    } else if (most > 0) {
      choose_side_by_side<4>(c, chosen);
    }
    for (std::int64_t t = 0; t < count; ++t) {
      if (live_[t] && c.found[t] == 0) choose_alone(t, k_ <= kCandidates ? least[t] : -kInf<R>, chosen[t]);
    }
    for (std::int64_t t = 0; t < count; ++t) write(first + t, t, s_.sigmoid ? R(1) : inverse[t], chosen[t]);
  }

  // The experts that reach the threshold, and kCandidates zeros behind them; or more than kCandidates. A few numbers
  // are written whether there are as many or not: a loop that ended with the last one would end by a wrong guess of
  // the processor, which costs as much as ten of its rounds.
  HOTLOOP_INLINE std::int64_t pick(const R* x, R least, std::int32_t* index) const {
    std::int64_t found = 0;
    for (std::int64_t i = 0; i < n_; i += 4 * kLanes) {
      std::uint64_t bits = 0;
      const std::int64_t strips = std::min<std::int64_t>(4, (n_ - i) / kLanes);
      for (std::int64_t s = 0; s < strips; ++s) {
        bits |= static_cast<std::uint64_t>(reach(x + i + s * kLanes, least)) << (s * kLanes);
      }
      const int here = std::popcount(bits);
      std::int32_t* to = index + found;
      const auto next = [&] {
        *to++ = static_cast<std::int32_t>(i) + std::countr_zero(bits);
        bits &= bits - 1;
      };
      HOTLOOP_UNROLL
      for (int n = 0; n < 4; ++n) next();
      if (here > 4) {
        HOTLOOP_UNROLL
        for (int n = 0; n < 4; ++n) next();
      }
      if (here > 8) {
        HOTLOOP_UNROLL
        for (int n = 0; n < 8; ++n) next();
      }
      found += here;
      if (found > kCandidates) return found;
    }
    std::memset(index + found, 0, kCandidates * sizeof(std::int32_t));
    return found;
  }

  struct Candidates {
    std::int32_t index[kBatch][2 * kCandidates];
    alignas(64) typename Side<R>::Whole found[kBatch];  // 0 of a token that is not ranked beside the others
  };

  // Loops over N candidates of every token, be they there or not, for the same reason.
  template <int N>
  HOTLOOP_INLINE void choose_side_by_side(const Candidates& c, Chosen* chosen) const {
    alignas(64) R value[N][kBatch];
    alignas(64) typename Side<R>::Whole rank[N][kBatch];
    for (std::int64_t t = 0; t < kBatch; ++t) {
      const R* const x = c.found[t] > 0 ? logits_[t] : nothing_;
      const std::int32_t* const index = c.found[t] > 0 ? c.index[t] : kNone;
      HOTLOOP_UNROLL
      for (int n = 0; n < N; ++n) value[n][t] = x[index[n]];
    }
    rank_candidates<N>(value, c.found, rank);
    for (std::int64_t t = 0; t < kBatch; ++t) {
      if (c.found[t] == 0) continue;
      const R* const e = scores(t);
      // One by one: GCC would scatter, which takes longer, and what is read next would wait for it.
      HOTLOOP_UNROLL
      for (int n = 0; n < N; ++n) {
        const auto to = static_cast<std::size_t>(rank[n][t]);
        chosen[t].id[to] = c.index[t][n];
        chosen[t].score[to] = e[c.index[t][n]];
      }
    }
  }
  static constexpr std::int32_t kNone[kCandidates] = {};

  // k of any number of candidates. least: at least k reach it.
  __attribute__((noinline)) void choose_alone(std::int64_t t, R least, Chosen& chosen) {
    const R* const x = logits_[t];
    std::int64_t reaching = count_reaching(x, n_, least);
    if (reaching > k_ + kSpare) {
      R most = least;
      for (std::int64_t i = 0; i < n_; ++i) most = x[i] > most ? x[i] : most;
      auto low = ordered(least), high = ordered(most);
      while (low < high && reaching > k_ + kSpare) {
        const auto middle = between(low, high);
        const std::int64_t count = count_reaching(x, n_, number(middle));
        if (count >= k_) {
          low = middle;
          reaching = count;
        } else {
          high = middle - 1;
        }
      }
      least = number(low);
    }
    // Where many are equal to the threshold, the first ones.
    std::int64_t equal = reaching;
    if (reaching > k_ + kSpare) equal = k_ - count_above(x, n_, least);
    alignas(64) R value[kMostChoices + kSpare];
    std::int32_t index[kMostChoices + kSpare], rank[kMostChoices + kSpare];
    std::int64_t found = 0;
    for (std::int64_t i = 0; i < n_; i += kLanes) {
      for (std::uint32_t bits = reach(x + i, least); bits != 0; bits &= bits - 1) {
        const std::int64_t at = i + std::countr_zero(bits);
        if (x[at] == least && equal-- <= 0) continue;
        value[found] = x[at];
        index[found] = static_cast<std::int32_t>(at);
        rank[found++] = 0;
      }
    }
    for (std::int64_t c = 0; c < found; ++c) {
      const R v = value[c];
      for (std::int64_t d = 0; d < c; ++d) rank[d] += v > value[d] ? 1 : 0;
      for (std::int64_t d = c + 1; d < found; ++d) rank[d] += v >= value[d] ? 1 : 0;
    }
    for (std::int64_t c = 0; c < found; ++c) {
      if (rank[c] >= k_) continue;
      chosen.id[rank[c]] = index[c];
      chosen.score[rank[c]] = scores(t)[index[c]];
    }
  }

  // Ids, weights and counts of token t of the batch. unit: what makes its scores sum to 1, or 1.
  HOTLOOP_INLINE void write(std::int64_t token, std::int64_t t, R unit, Chosen& chosen) {
    const std::int64_t k = k_;
    std::int64_t* const __restrict ids = call_.ids + token * k;
    R* const __restrict weights = static_cast<R*>(call_.weights) + token * k;
    if (!live_[t]) {
      for (std::int64_t j = 0; j < k; ++j) ids[j] = -1;
      for (std::int64_t j = 0; j < k; ++j) weights[j] = R(0);
      return;
    }
    std::int64_t* const __restrict counts = counts_;
    for (std::int64_t j = 0; j < k; ++j) {
      ids[j] = chosen.id[j];
      ++counts[chosen.id[j]];
    }
    R scale = static_cast<R>(s_.scale);
    if (s_.late && (bias_ != nullptr || s_.open_groups < s_.groups)) {
      late_scores(token, chosen);
      unit = R(1);
    }
    if (s_.renormalize) {
      R total = R(0);
      for (std::int64_t j = 0; j < k; ++j) total += chosen.score[j];
      scale /= total + kTiny<R> / unit;
    } else {
      scale *= unit;
    }
    for (std::int64_t j = 0; j < k; ++j) weights[j] = chosen.score[j] * scale;
  }

  // exp(logit - the largest chosen one): against the largest of all, which a bias or a closed group may leave out, the
  // chosen ones may all vanish. 0 where only -inf is chosen.
  void late_scores(std::int64_t token, Chosen& chosen) const {
    const auto* row = static_cast<const Storage*>(call_.logits.data) + token * call_.logits.row_stride;
    R most = -kInf<R>;
    for (std::int64_t j = 0; j < k_; ++j) most = std::max<R>(most, to_float(row[chosen.id[j]]));
    for (std::int64_t j = 0; j < k_; ++j) {
      const R gap = to_float(row[chosen.id[j]]) - most;
      chosen.score[j] = gap == gap ? vexp_weight(gap) : R(0);
    }
  }

  struct Free {
    void operator()(R* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };

  const RouteCall& call_;
  const Selection& s_;
  const std::int64_t k_, experts_, n_;
  const R* const bias_;
  const bool by_logits_;
  std::unique_ptr<R[], Free> memory_;
  R *e_, *x_, *nothing_, *ranked_;
  const R* logits_[kBatch];  // of every token, and then what its experts are compared by
  std::int64_t* counts_ = nullptr;
  std::int64_t bad_ = -1;
  bool live_[kBatch];
};

}  // namespace

void route_blocks(const RouteCall& call) {
  note_simd_level();
  with_float(call.logits.dtype, [&](auto storage) {
    parallel_for(call.block_count, 1, [&](std::int64_t first, std::int64_t last) {
      Router<decltype(storage)> router(call);
      for (std::int64_t b = first; b < last; ++b) router.block(b);
    });
  });
}

#include "core/simd_end.hpp"
