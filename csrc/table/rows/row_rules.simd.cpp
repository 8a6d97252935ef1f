// SPDX-License-Identifier: Apache-2.0
// The loops of the row optimizers: one rule (core/rules.hpp) over the rows of a batch, each with its gradient and
// state. Float32 rows are updated in place. Half rows pass through a float32 buffer in L1, 256 elements at a time, so
// the arithmetic sees only float32 and each weight is rounded once, to nearest or stochastically. Sums over a row have
// sixteen fixed lanes: every instruction set gives the same bits.
#include "table/rows/row_rules.hpp"

#include <atomic>
#include <cstdint>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "core/philox.hpp"
#include "table/rows/rounding.hpp"

#include "core/simd_begin.hpp"

namespace {

using namespace hotloop::table;

constexpr std::int64_t kLanes = 16;
constexpr std::int64_t kChunk = 256;  // a multiple of the lanes: 1 KiB of weights beside as much of each vector in L1

// Sixteen interleaved sums (or maxima): element j goes to lane j % 16, whatever the width of a vector.
struct Lanes {
  float lane[kLanes] = {};

  template <class Term>
  HOTLOOP_INLINE void add(std::int64_t count, Term term) {
    std::int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) {
      for (std::int64_t k = 0; k < kLanes; ++k) lane[k] += term(j + k);
    }
    for (std::int64_t k = 0; j < count; ++j, ++k) lane[k] += term(j);
  }
  template <class Term>
  HOTLOOP_INLINE void grow(std::int64_t count, Term term) {
    std::int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) {
      for (std::int64_t k = 0; k < kLanes; ++k) {
        const float t = term(j + k);
        lane[k] = t > lane[k] ? t : lane[k];
      }
    }
    for (std::int64_t k = 0; j < count; ++j, ++k) {
      const float t = term(j);
      lane[k] = t > lane[k] ? t : lane[k];
    }
  }
  HOTLOOP_INLINE float sum() const {
    float x[kLanes / 2];
    for (int k = 0; k < 8; ++k) x[k] = lane[k] + lane[k + 8];
    for (int k = 0; k < 4; ++k) x[k] += x[k + 4];
    return (x[0] + x[2]) + (x[1] + x[3]);
  }
  HOTLOOP_INLINE float max() const {
    float most = 0.0f;
    for (float x : lane) most = x > most ? x : most;
    return most;
  }
};

// Sixteen random bits per element of [begin, begin + count), begin a multiple of 64; see `rounding_key`.
void random_bits(std::uint64_t key, std::int64_t begin, std::int64_t count, std::uint16_t* bits) {
  for (std::int64_t j = 0; j < count; j += 64) {
    std::uint32_t words[4][8];
#pragma GCC ivdep
    for (std::int64_t b = 0; b < 8; ++b) {
      const Philox4x32 r = philox(key, 0, static_cast<std::uint64_t>((begin + j) / 8 + b));
      words[0][b] = r.word[0];
      words[1][b] = r.word[1];
      words[2][b] = r.word[2];
      words[3][b] = r.word[3];
    }
    const std::uint32_t* all = words[0];
    for (std::int64_t e = 0; e < 32; ++e) bits[j + e] = static_cast<std::uint16_t>(all[e]);
    for (std::int64_t e = 0; e < 32; ++e) bits[j + 32 + e] = static_cast<std::uint16_t>(all[e] >> 16);
  }
}

// The weights of a row. `read` and `edit` call f(begin, count, w) on float32 chunks; `edit` writes w back.
template <class Storage, bool kStochastic>
struct Weights {
  Storage* values;
  std::int64_t dim;
  std::uint64_t key;

  template <class F>
  HOTLOOP_INLINE void read(F f) const {
    each<false>(f);
  }
  template <class F>
  HOTLOOP_INLINE void edit(F f) const {
    each<true>(f);
  }

 private:
  template <bool kWrite, class F>
  HOTLOOP_INLINE void each(F f) const {
    for (std::int64_t begin = 0; begin < dim; begin += kChunk) {
      const std::int64_t count = dim - begin < kChunk ? dim - begin : kChunk;
      alignas(64) float w[kChunk];
      Storage* const at = values + begin;
#pragma GCC ivdep
      for (std::int64_t j = 0; j < count; ++j) w[j] = to_float(at[j]);
      f(begin, count, w);
      if constexpr (!kWrite) continue;
      if constexpr (kStochastic) {
        std::uint16_t bits[kChunk];
        random_bits(key, begin, count, bits);
#pragma GCC ivdep
        for (std::int64_t j = 0; j < count; ++j) at[j].bits = round_by(Storage{}, w[j], bits[j]);
      } else {
#pragma GCC ivdep
        for (std::int64_t j = 0; j < count; ++j) put(at[j], w[j]);
      }
    }
  }
};
template <bool kStochastic>
struct Weights<float, kStochastic> {
  float* values;
  std::int64_t dim;
  std::uint64_t key;

  template <class F>
  HOTLOOP_INLINE void read(F f) const {
    f(std::int64_t{0}, dim, values);
  }
  template <class F>
  HOTLOOP_INLINE void edit(F f) const {
    f(std::int64_t{0}, dim, values);
  }
};

template <class W>
HOTLOOP_INLINE float sum_of_squares(const RuleSpec& p, const float* grad, const W& weights) {
  Lanes lanes;
  const auto square = [](float g) { return g * g; };
  if (p.l2_decay == 0.0f) {
    lanes.add(weights.dim, [&](std::int64_t j) { return square(grad[j]); });
  } else {
    weights.read([&](std::int64_t begin, std::int64_t count, const float* w) {
      const float* g = grad + begin;
      lanes.add(count, [&](std::int64_t j) { return square(decayed_gradient(p, g[j], w[j])); });
    });
  }
  return lanes.sum();
}

template <class W>
HOTLOOP_INLINE void update(Sgd, const RuleSpec& p, const float* grad, const W& weights, float* const*, float* const*) {
  weights.edit([&](std::int64_t begin, std::int64_t count, float* w) {
    const float* g = grad + begin;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) w[j] = Sgd::weight(p, decayed_gradient(p, g[j], w[j]), w[j]);
  });
}

template <class W>
HOTLOOP_INLINE void update(RowwiseAdagrad, const RuleSpec& p, const float* grad, const W& weights, float* const* s,
                           float* const*) {
  const float mean_square = sum_of_squares(p, grad, weights) / static_cast<float>(weights.dim);
  const float rate = RowwiseAdagrad::rate(p, mean_square, *s[0]);
  weights.edit([&](std::int64_t begin, std::int64_t count, float* w) {
    const float* g = grad + begin;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) {
      w[j] = RowwiseAdagrad::weight(p, rate, decayed_gradient(p, g[j], w[j]), w[j]);
    }
  });
}

template <class W>
HOTLOOP_INLINE void update(Adagrad, const RuleSpec& p, const float* grad, const W& weights, float* const*,
                           float* const* v) {
  weights.edit([&](std::int64_t begin, std::int64_t count, float* w) {
    const float* g = grad + begin;
    float* sum = v[0] + begin;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) {
      w[j] = Adagrad::weight(p, decayed_gradient(p, g[j], w[j]), w[j], sum[j]);
    }
  });
}

struct RowwiseAdam {};

HOTLOOP_INLINE Adam::Row adam_row(const RuleSpec& p, float* step) {
  if (p.step > 0) return Adam::row(p, static_cast<float>(p.step));
  *step += 1.0f;
  return Adam::row(p, *step);
}

template <class W>
HOTLOOP_INLINE void update(Adam, const RuleSpec& p, const float* grad, const W& weights, float* const* s,
                           float* const* v) {
  const Adam::Row row = adam_row(p, s[0]);
  weights.edit([&](std::int64_t begin, std::int64_t count, float* w) {
    const float* g = grad + begin;
    float* average = v[0] + begin;
    float* square = v[1] + begin;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) {
      w[j] = Adam::weight(p, row, decayed_gradient(p, g[j], w[j]), w[j], average[j], square[j]);
    }
  });
}

template <class W>
HOTLOOP_INLINE void update(RowwiseAdam, const RuleSpec& p, const float* grad, const W& weights, float* const* s,
                           float* const* v) {
  const float mean_square = sum_of_squares(p, grad, weights) / static_cast<float>(weights.dim);
  const Adam::Row row = adam_row(p, s[0]);
  Adam::second_moment(p, mean_square, *s[1]);
  const float rate = ratio(row.rate, Adam::denominator(p, row, *s[1]));
  weights.edit([&](std::int64_t begin, std::int64_t count, float* w) {
    const float* g = grad + begin;
    float* average = v[0] + begin;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) {
      w[j] = p.keep * w[j] - rate * Adam::direction(p, decayed_gradient(p, g[j], w[j]), average[j]);
    }
  });
}

template <class W>
HOTLOOP_INLINE void update(Ftrl, const RuleSpec& p, const float* grad, const W& weights, float* const*,
                           float* const* v) {
  if (!p.group) {
    weights.edit([&](std::int64_t begin, std::int64_t count, float* w) {
      const float* g = grad + begin;
      float* z = v[0] + begin;
      float* n = v[1] + begin;
#pragma GCC ivdep
      for (std::int64_t j = 0; j < count; ++j) {
        Ftrl::advance(p, g[j], w[j], z[j], n[j]);
        w[j] = Ftrl::weight(p, z[j], n[j]);
      }
    });
    return;
  }
  Lanes lanes;
  weights.read([&](std::int64_t begin, std::int64_t count, const float* w) {
    const float* g = grad + begin;
    float* z = v[0] + begin;
    float* n = v[1] + begin;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) Ftrl::advance(p, g[j], w[j], z[j], n[j]);
    lanes.add(count, [&](std::int64_t j) { return z[j] * z[j]; });
  });
  const float shrink = Ftrl::shrink(p, square_root(lanes.sum()));
  weights.edit([&](std::int64_t begin, std::int64_t count, float* w) {
    const float* z = v[0] + begin;
    const float* n = v[1] + begin;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) w[j] = Ftrl::group_weight(p, shrink, z[j], n[j]);
  });
}

template <class W>
HOTLOOP_INLINE void update(GroupAdagrad, const RuleSpec& p, const float* grad, const W& weights, float* const* s,
                           float* const*) {
  Lanes largest;
  const auto square = [](float g) { return g * g; };
  weights.read([&](std::int64_t begin, std::int64_t count, const float* w) {
    const float* g = grad + begin;
    largest.grow(count, [&](std::int64_t j) { return square(decayed_gradient(p, g[j], w[j])); });
  });
  const float rate = GroupAdagrad::rate(p, largest.max(), *s[0]);
  const auto moved = [&](float g, float w) { return GroupAdagrad::weight(rate, decayed_gradient(p, g, w), w); };
  float shrink = 1.0f;
  if (p.l2 > 0.0f) {
    Lanes lanes;
    weights.read([&](std::int64_t begin, std::int64_t count, const float* w) {
      const float* g = grad + begin;
      lanes.add(count, [&](std::int64_t j) { return square(moved(g[j], w[j])); });
    });
    shrink = GroupAdagrad::shrink(p, rate, square_root(lanes.sum()));
  }
  weights.edit([&](std::int64_t begin, std::int64_t count, float* w) {
    const float* g = grad + begin;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) w[j] = GroupAdagrad::shrunk(shrink, moved(g[j], w[j]));
  });
}

using UpdateParts = void (*)(const RuleSpec&, std::int64_t dim, const float* grad, void* values, float* const* scalars,
                             float* const* vectors, std::uint64_t random);

struct Kernel {
  UpdateParts parts;
  UpdateRow row;
};

template <class Rule, class Storage, bool kStochastic>
struct Update {
  static void parts(const RuleSpec& p, std::int64_t dim, const float* grad, void* values, float* const* scalars,
                    float* const* vectors, std::uint64_t random) {
    if (dim > 0) {
      update(Rule{}, p, grad, Weights<Storage, kStochastic>{static_cast<Storage*>(values), dim, random}, scalars,
             vectors);
    }
  }
  template <int kScalars>
  static void row(const RuleSpec& p, std::int64_t dim, const float* grad, void* values, float* state,
                  std::uint64_t random) {
    float* const scalars[kMostScalars] = {state, state + 1};
    float* const vectors[kMostVectors] = {state + kScalars, state + kScalars + dim};
    parts(p, dim, grad, values, scalars, vectors, random);
  }
};

template <class Rule, int kScalars>
Kernel kernel_of(const RuleSpec& p, Dtype dtype) {
  const bool stochastic = p.stochastic_rounding;
  const auto both = [](auto update) -> Kernel {
    using U = decltype(update);
    return {U::parts, U::template row<kScalars>};
  };
  return with_row_type(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if constexpr (sizeof(Storage) == 2) {
      if (stochastic) return both(Update<Rule, Storage, true>{});
    }
    return both(Update<Rule, Storage, false>{});
  });
}

Kernel kernel(const RuleSpec& p, Dtype dtype) {
  switch (p.rule) {
    case Rule::kRowwiseAdagrad:
      return kernel_of<RowwiseAdagrad, 1>(p, dtype);
    case Rule::kAdagrad:
      return kernel_of<Adagrad, 0>(p, dtype);
    case Rule::kAdam:
      return p.rowwise ? kernel_of<RowwiseAdam, 2>(p, dtype) : kernel_of<Adam, 1>(p, dtype);
    case Rule::kFtrl:
      return kernel_of<Ftrl, 0>(p, dtype);
    case Rule::kGroupAdagrad:
      return kernel_of<GroupAdagrad, 1>(p, dtype);
    default:
      return kernel_of<Sgd, 0>(p, dtype);
  }
}

// Elements worth a thread: about 20 us.
constexpr std::int64_t kGrain = 65536;
// Rows that are asked of memory ahead of the one in work.
constexpr std::int64_t kAhead = 8;

}  // namespace

table::UpdateRow table_update_row(const RuleSpec& spec, Dtype values) {
  note_simd_level();
  return kernel(spec, values).row;
}

void update_rows(const UpdateCall& call) {
  note_simd_level();
  const UpdateParts update = kernel(call.spec, call.dtype).parts;
  const std::int64_t item = item_size(call.dtype);
  const auto values_of = [&](std::int64_t row) {
    return static_cast<char*>(call.values) + row * call.value_stride * item;
  };
  const auto one = [&](std::int64_t i) {
    if (call.rows != nullptr && i + kAhead < call.n) {
      const std::int64_t next = call.rows[i + kAhead];
      const char* w = values_of(next);
      for (std::int64_t at = 0; at < call.dim * item; at += 64) __builtin_prefetch(w + at, 1);
      for (const StateColumn& c : call.vectors) {
        if (c.data == nullptr) continue;
        for (std::int64_t at = 0; at < call.dim; at += 16) __builtin_prefetch(c.data + next * c.stride + at, 1);
      }
    }
    const std::int64_t row = call.rows == nullptr ? i : call.rows[i];
    float* scalars[kMostScalars];
    float* vectors[kMostVectors];
    for (int k = 0; k < kMostScalars; ++k) scalars[k] = call.scalars[k].data + row * call.scalars[k].stride;
    for (int k = 0; k < kMostVectors; ++k) vectors[k] = call.vectors[k].data + row * call.vectors[k].stride;
    const std::uint64_t key = call.spec.stochastic_rounding ? rounding_key(call.seed, i) : 0;
    update(call.spec, call.dim, call.grad + i * call.grad_stride, values_of(row), scalars, vectors, key);
  };
  const std::int64_t grain = kGrain / (call.dim > 0 ? call.dim : 1) + 1;
  if (call.distinct) {
    parallel_for(call.n, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) one(i);
    });
    return;
  }
  // Each row belongs to one thread, which meets its updates in the order of the batch.
  const std::int64_t wanted = call.n / grain;
  const std::int64_t owners = wanted < 1 ? 1 : wanted < max_threads() ? wanted : max_threads();
  parallel_for(owners, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = 0; i < call.n; ++i) {
      const std::int64_t owner = call.rows[i] % owners;
      if (owner >= begin && owner < end) one(i);
    }
  });
}

#include "core/simd_end.hpp"
