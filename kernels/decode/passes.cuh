// SPDX-License-Identifier: Apache-2.0
// What one warp does with a stretch of a logits row: the passes of rows.simd.cpp, with the arithmetic of heads.hpp and
// hence the same numbers.
//
// Tokens come in packs of eight that start at a 16-byte boundary of memory: a pack is one access of 16 bytes in half
// types, two in float32, four in float64. Only the packs at the two ends of a row, and those of a second row with
// another alignment, are read token by token. Nothing of a row is kept; a second pass reads it from L2. The passes are
// not inlined, since the three walks share them.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "core/bisect.hpp"
#include "core/dtype.hpp"
#include "core/macros.hpp"
#include "decode/cpu_rows.hpp"
#include "decode/heads.hpp"
#include "kernels/core/threads.cuh"

namespace hotloop::decode::gpu {

using cuda::kWarp;

inline constexpr int kPack = 8;

// Packs [begin, end) of a row.
struct Packs {
  std::int64_t begin, end;
};
HOTLOOP_INLINE Packs piece_of(Packs all, std::int64_t pieces, std::int64_t i) {
  const std::int64_t size = all.end - all.begin;
  return {all.begin + size * i / pieces, all.begin + size * (i + 1) / pieces};
}

// Tokens between the last 16-byte boundary and the row's first.
HOTLOOP_INLINE std::int64_t lead_of(const RowSource& row) {
  const auto bytes = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(row.data) % 16);
  return bytes / item_size(row.dtype);
}
HOTLOOP_INLINE Packs packs_of(const RowSource& row) { return {0, (row.vocabulary + lead_of(row) + kPack - 1) / kPack}; }
// The first token of a pack; negative where the row begins inside it.
HOTLOOP_INLINE std::int64_t first_of(const RowSource& row, std::int64_t pack) { return pack * kPack - lead_of(row); }

// Larger for a larger number; 0 and -0 are one. Never 0 itself, which stands for none.
HOTLOOP_INLINE std::uint64_t order_key(double x) {
  const auto bits = std::bit_cast<std::uint64_t>(x + 0.0);
  return (bits >> 63) != 0 ? ~bits : bits | (std::uint64_t{1} << 63);
}
HOTLOOP_INLINE std::uint64_t order_key(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x + 0.0f);
  return (bits >> 31) != 0 ? ~bits : bits | (std::uint32_t{1} << 31);
}
HOTLOOP_INLINE double of_order_key(std::uint64_t key) {
  const bool negative = (key >> 63) == 0;
  return std::bit_cast<double>(negative ? ~key : key & ~(std::uint64_t{1} << 63));
}
HOTLOOP_INLINE double of_order_key(std::uint32_t key) {
  const bool negative = (key >> 31) == 0;
  return static_cast<double>(std::bit_cast<float>(negative ? ~key : key & 0x7fffffffu));
}

template <class R>
HOTLOOP_INLINE R none() {
  return -std::numeric_limits<R>::infinity();
}

template <class Storage, int kCount>
struct alignas(kCount == 1 ? alignof(Storage) : 16) Items {
  Storage item[kCount];
};

// Tokens from `first` on, as stored; those outside the row are 0.
template <class Storage, int kCount>
HOTLOOP_INLINE Items<Storage, kCount> fetch(const void* row, std::int64_t vocabulary, std::int64_t first) {
  const Storage* x = static_cast<const Storage*>(row);
  const bool inside = first >= 0 && first + kCount <= vocabulary;
  if (inside && reinterpret_cast<std::uintptr_t>(x + first) % alignof(Items<Storage, kCount>) == 0) {
    return cuda::read_global(reinterpret_cast<const Items<Storage, kCount>*>(x + first));
  }
  Items<Storage, kCount> items{};
  HOTLOOP_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (first + i >= 0 && first + i < vocabulary) items.item[i] = cuda::read_global(x + first + i);
  }
  return items;
}

// Adds what the ascending bias_ids say, entry after entry.
template <class R, int kCount>
HOTLOOP_INLINE void add_bias(const RowSource& row, std::int64_t first, R (&z)[kCount]) {
  std::int64_t at = first_where(row.biases, [&](std::int64_t i) { return row.bias_ids[i] >= first; });
  for (; at < row.biases && row.bias_ids[at] < first + kCount; ++at) {
    const std::int64_t where = row.bias_ids[at] - first;
    HOTLOOP_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (i == where) z[i] = z[i] + static_cast<R>(row.bias[at]);
    }
  }
}

// Logits (scaled, biased) or probabilities of fetched tokens; none outside the row.
template <class Storage, class R, int kCount>
HOTLOOP_INLINE void values_of(const RowSource& row, std::int64_t first, const Items<Storage, kCount>& items,
                              R (&z)[kCount]) {
  HOTLOOP_UNROLL
  for (int i = 0; i < kCount; ++i) z[i] = static_cast<R>(to_float(items.item[i]));
  if (!row.logits) {
    HOTLOOP_UNROLL
    for (int i = 0; i < kCount; ++i) z[i] = given_probability(z[i]);
    return;
  }
  if (row.reference != nullptr) {
    const auto second = fetch<Storage, kCount>(row.reference, row.vocabulary, first);
    const R mine = static_cast<R>(1.0 - row.mixture), theirs = static_cast<R>(row.mixture);
    HOTLOOP_UNROLL
    for (int i = 0; i < kCount; ++i) {
      z[i] = mine * z[i] + theirs * static_cast<R>(to_float(second.item[i]));
    }
  }
  if (row.biases > 0) add_bias(row, first, z);
  const R scale = static_cast<R>(row.scale);
  const bool inside = first >= 0 && first + kCount <= row.vocabulary;
  HOTLOOP_UNROLL
  for (int i = 0; i < kCount; ++i) {
    z[i] = z[i] * scale;
    if (!inside && !(first + i >= 0 && first + i < row.vocabulary)) z[i] = none<R>();
  }
}

// f(first, z) for every pack of the stretch, split over the threads of a warp. Where the stored
// numbers are all there is to a row, as many packs as 64 bytes hold are on their way before the
// first is looked at; what sticks out of the row, and rows with a second model or a bias, come one
// by one.
template <class Storage, class F>
HOTLOOP_INLINE void over_packs_of(const RowSource& row, Packs packs, int in_warp, F&& f) {
  using R = typename Accumulate<Storage>::type;
  constexpr int kAhead = 8 / sizeof(Storage);
  const std::int64_t lead = lead_of(row);
  const bool plain = row.reference == nullptr && row.biases == 0;
  // Packs that lie inside the row.
  const std::int64_t last = (row.vocabulary + lead) / kPack;
  const std::int64_t begin = lead > 0 && packs.begin < 1 ? 1 : packs.begin, end = packs.end < last ? packs.end : last;
  const std::int64_t whole = plain && begin < end ? end - begin : 0;
  const R scale = row.logits ? static_cast<R>(row.scale) : R(1);
  for (std::int64_t j = in_warp; j < whole; j += kAhead * kWarp) {
    const Storage* x = static_cast<const Storage*>(row.data) + ((begin + j) * kPack - lead);
    Items<Storage, kPack> items[kAhead];
    HOTLOOP_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const Storage* pack = j + i * kWarp < whole ? x + i * kWarp * kPack : x;
      items[i] = cuda::read_global(reinterpret_cast<const Items<Storage, kPack>*>(pack));
    }
    HOTLOOP_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (j + i * kWarp >= whole) break;
      R z[kPack];
      HOTLOOP_UNROLL
      for (int k = 0; k < kPack; ++k) {
        z[k] = static_cast<R>(to_float(items[i].item[k]));
        z[k] = row.logits ? z[k] * scale : given_probability(z[k]);
      }
      f((begin + j + i * kWarp) * kPack - lead, z);
    }
  }
  const std::int64_t rest = packs.end - packs.begin - whole;
  for (std::int64_t j = in_warp; j < rest; j += kWarp) {
    // Of the whole ones there are none, or all between the first and the last.
    const std::int64_t pack = packs.begin + j < begin ? packs.begin + j : packs.begin + j + whole;
    const std::int64_t first = pack * kPack - lead;
    R z[kPack];
    values_of(row, first, fetch<Storage, kPack>(row.data, row.vocabulary, first), z);
    f(first, z);
  }
}
template <class F>
HOTLOOP_INLINE void over_packs(const RowSource& row, Packs packs, int in_warp, F&& f) {
  with_float(row.dtype, [&](auto storage) { over_packs_of<decltype(storage)>(row, packs, in_warp, f); });
}
// f(z) for kCount tokens from `first` on.
template <int kCount, class F>
HOTLOOP_INLINE void at_tokens(const RowSource& row, std::int64_t first, F&& f) {
  with_float(row.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    typename Accumulate<Storage>::type z[kCount];
    values_of(row, first, fetch<Storage, kCount>(row.data, row.vocabulary, first), z);
    f(z);
  });
}

// What a logit or probability weighs under a law.
template <class R>
struct Scale {
  R max, threshold;
  double least;
  bool logits;
  HOTLOOP_INLINE explicit Scale(const RowLaw& law)
      : max(static_cast<R>(law.max)),
        threshold(static_cast<R>(law.threshold)),
        least(law.min_weight),
        logits(law.source.logits) {}
  HOTLOOP_INLINE double whole(R z) const {
    return logits ? logit_weight(z, max) : to_weight_grid(static_cast<double>(z));
  }
  HOTLOOP_INLINE double operator()(R z) const {
    const double reached = z >= threshold ? whole(z) : 0.0;
    return reached >= least ? reached : 0.0;
  }
};

template <class R, int kCount>
HOTLOOP_INLINE void probabilities(const RowLaw& law, std::int64_t first, const R (&z)[kCount], double (&p)[kCount]) {
  const Scale<R> weight(law);
  HOTLOOP_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (law.greedy) {
      p[i] = first + i == law.best ? 1.0 : 0.0;
    } else if (law.as_given) {
      p[i] = static_cast<double>(z[i]);
    } else {
      p[i] = weight(z[i]) * law.inverse;
    }
  }
}

// One token's value as the passes see it, and its probability; 0 for an id that is none.
HOTLOOP_OUTLINE double value_at(const RowSource& row, std::int64_t id) {
  double value = 0.0;
  at_tokens<1>(row, id, [&](const auto& z) { value = static_cast<double>(z[0]); });
  return value;
}
HOTLOOP_OUTLINE double probability_at(const RowLaw& law, std::int64_t id) {
  if (id < 0 || id >= law.source.vocabulary) return 0.0;
  if (law.greedy) return id == law.best ? 1.0 : 0.0;
  double p[1];
  at_tokens<1>(law.source, id, [&](const auto& z) { probabilities(law, id, z, p); });
  return p[0];
}

// Each of the following is one thread's share of its warp's stretch. Laws are in shared memory; a
// copy in registers is read once, and not again for each pack.

// The order key of the largest value; NaN never counts.
HOTLOOP_OUTLINE std::uint64_t largest_key(const RowSource& shared, Packs packs, int in_warp) {
  const RowSource row = shared;
  std::uint64_t key = order_key(none<double>());
  over_packs(row, packs, in_warp, [&](std::int64_t, const auto& z) {
    auto largest = z[0] > none<double>() ? z[0] : none<std::decay_t<decltype(z[0])>>();
    HOTLOOP_UNROLL
    for (int i = 1; i < kPack; ++i) largest = z[i] > largest ? z[i] : largest;
    const std::uint64_t here = order_key(static_cast<double>(largest));
    key = key < here ? here : key;
  });
  return key;
}

// Vocabulary less the first token that has the row's largest logit; 0 if none has: the largest
// wins.
HOTLOOP_OUTLINE std::uint64_t first_best(const RowLaw& shared, Packs packs, int in_warp) {
  const RowLaw law = shared;
  std::uint64_t found = 0;
  over_packs(law.source, packs, in_warp, [&](std::int64_t first, const auto& z) {
    HOTLOOP_UNROLL
    for (int i = 0; i < kPack; ++i) {
      if (static_cast<double>(z[i]) != law.max) continue;  // as outside the row, where it is -inf
      const auto here = static_cast<std::uint64_t>(law.source.vocabulary - (first + i));
      found = found < here ? here : found;
    }
  });
  return found;
}

HOTLOOP_OUTLINE std::uint64_t mass_units(const RowLaw& shared, Packs packs, int in_warp) {
  const RowLaw law = shared;
  std::uint64_t units = 0;
  over_packs(law.source, packs, in_warp, [&](std::int64_t, const auto& z) {
    const Scale<std::decay_t<decltype(z[0])>> weight(law);
    double sum = 0.0;
    HOTLOOP_UNROLL
    for (int i = 0; i < kPack; ++i) sum += weight(z[i]);
    units += weight_units(sum);
  });
  return units;
}

// A digit of the order keys: which keys count, by what precedes the digit, and where it lies.
struct Digit {
  std::uint64_t prefix;
  int shift, width;
};
// Counts the tokens of each digit, or adds up their weights, in 64 bits split in two: shared memory
// adds 32 at once. Tokens below `least`, and those a logit of -inf has removed, are passed over.
HOTLOOP_OUTLINE void fill_bins(const RowLaw& shared, Packs packs, int in_warp, Digit digit, bool by_mass, double least,
                               std::uint32_t* low, std::uint32_t* high) {
  const RowLaw law = shared;
  over_packs(law.source, packs, in_warp, [&](std::int64_t first, const auto& z) {
    using R = std::decay_t<decltype(z[0])>;
    const Scale<R> weight(law);
    HOTLOOP_UNROLL
    for (int i = 0; i < kPack; ++i) {
      const bool inside = first + i >= 0 && first + i < law.source.vocabulary;
      if (!inside || !(z[i] > none<R>()) || !(z[i] >= static_cast<R>(least))) continue;
      const std::uint64_t key = order_key(z[i]) >> digit.shift;
      if (key >> digit.width != digit.prefix) continue;
      const std::uint64_t bin = key & ((std::uint64_t{1} << digit.width) - 1);
      const std::uint64_t units = by_mass ? weight_units(weight.whole(z[i])) : 1;
      const auto lower = static_cast<std::uint32_t>(units);
      const std::uint32_t carry = cuda::add_shared(&low[bin], lower) > ~lower ? 1 : 0;
      const std::uint32_t upper = static_cast<std::uint32_t>(units >> 32) + carry;
      if (upper != 0) cuda::add_shared(&high[bin], upper);
    }
  });
}

// What a rejection leaves: max(a p - b q, 0), and nothing of a token that was taken. Tokens are
// taken only where there is no draft, and none twice.
struct Left {
  const RowLaw* p = nullptr;
  const RowLaw* q = nullptr;  // nullptr: b is 0
  double a = 1.0, b = 0.0;
  const std::int64_t* taken = nullptr;
  std::int64_t taken_count = 0;
};
template <class R>
HOTLOOP_INLINE void left_of(const Left& left, std::int64_t first, const R (&z)[kPack], double (&rest)[kPack]) {
  probabilities(*left.p, first, z, rest);
  if (left.q == nullptr) {
    HOTLOOP_UNROLL
    for (int i = 0; i < kPack; ++i) rest[i] = residual(left.a, rest[i], 0.0, 0.0);
    return;
  }
  double q[kPack];
  at_tokens<kPack>(left.q->source, first, [&](const auto& second) { probabilities(*left.q, first, second, q); });
  HOTLOOP_UNROLL
  for (int i = 0; i < kPack; ++i) rest[i] = residual(left.a, rest[i], left.b, q[i]);
}
HOTLOOP_OUTLINE std::uint64_t left_units(const Left& left, Packs packs, int in_warp) {
  const RowSource row = left.p->source;
  std::uint64_t units = 0;
  over_packs(row, packs, in_warp, [&](std::int64_t first, const auto& z) {
    double rest[kPack];
    left_of(left, first, z, rest);
    double sum = 0.0;
    HOTLOOP_UNROLL
    for (int i = 0; i < kPack; ++i) sum += rest[i];
    units += residual_units(sum);
  });
  // Sums of whole numbers: what was taken can be taken off afterwards.
  for (std::int64_t e = in_warp; e < left.taken_count; e += kWarp) {
    const std::int64_t pack = (left.taken[e] + lead_of(row)) / kPack;
    if (pack < packs.begin || pack >= packs.end) continue;
    units -= residual_units(residual(left.a, probability_at(*left.p, left.taken[e]), 0.0, 0.0));
  }
  return units;
}

// The units of each token of a pack.
HOTLOOP_OUTLINE void pack_weights(const RowLaw& law, std::int64_t pack, std::uint64_t (&units)[kPack]) {
  at_tokens<kPack>(law.source, first_of(law.source, pack), [&](const auto& z) {
    const Scale<std::decay_t<decltype(z[0])>> weight(law);
    HOTLOOP_UNROLL
    for (int i = 0; i < kPack; ++i) units[i] = weight_units(weight(z[i]));
  });
}
HOTLOOP_OUTLINE void pack_left(const Left& left, std::int64_t pack, std::uint64_t (&units)[kPack]) {
  const std::int64_t first = first_of(left.p->source, pack);
  at_tokens<kPack>(left.p->source, first, [&](const auto& z) {
    double rest[kPack];
    left_of(left, first, z, rest);
    HOTLOOP_UNROLL
    for (int i = 0; i < kPack; ++i) units[i] = residual_units(rest[i]);
  });
  for (std::int64_t e = 0; e < left.taken_count; ++e) {
    const std::int64_t where = left.taken[e] - first;
    HOTLOOP_UNROLL
    for (int i = 0; i < kPack; ++i) {
      if (i == where) units[i] = 0;
    }
  }
}

}  // namespace hotloop::decode::gpu
