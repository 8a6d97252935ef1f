// SPDX-License-Identifier: Apache-2.0
// Rows between the two products of an expert: the activation, its gradient, and the sum of expert rows per token.
//
// A function gives its value and its slope together, so that the gradient reads the first product once and writes over
// it. Rows are cut into chunks that stay in L1, since gates and values lie apart or interleaved in memory.
#include "moe/activation.hpp"

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "core/vmath.hpp"

#include "core/simd_begin.hpp"

namespace {

using namespace hotloop::moe;
using std::int64_t;

constexpr int64_t kChunk = 512;   // inner numbers of a row at a time, in L1
constexpr int64_t kGrain = 8192;  // inner numbers worth a thread

template <class R>
struct Point {
  R value, slope;
};

// erfc(z) exp(z^2), 0 <= z: t times a minimax polynomial in t = 1 / (1 + 0.6 z), relative error 3.9e-8, fitted by us.
HOTLOOP_INLINE float erfc_scaled(float z) {
  const float t = 1.0f / (1.0f + 0.6f * z);
  float p = 0.0649957727f;
  p = p * t - 0.31426186f;
  p = p * t + 0.554050772f;
  p = p * t - 0.325218812f;
  p = p * t - 0.133572903f;
  p = p * t + 0.0624127979f;
  p = p * t + 0.132872491f;
  p = p * t + 0.28213725f;
  p = p * t + 0.338051881f;
  return t * (p * t + 0.33853265f);
}

// The distribution function of the normal law and its density.
HOTLOOP_INLINE Point<float> normal(float x) {
  const float e = vexp_weight(-0.5f * x * x);
  const float tail = 0.5f * e * erfc_scaled(vabs(x) * 0.707106781f);
  return {x > 0.0f ? 1.0f - tail : tail, 0.398942280f * e};
}
HOTLOOP_INLINE Point<double> normal(double x) {
  return {0.5 * std::erfc(-x * 0.70710678118654752440), 0.39894228040143267794 * std::exp(-0.5 * x * x)};
}

template <Function kFunction, class R>
HOTLOOP_INLINE Point<R> evaluate(R x, R alpha) {
  if constexpr (kFunction == Function::kSilu) {
    const R s = vsigmoid(alpha * x);
    return {x * s, s + alpha * x * s * (R(1) - s)};
  } else if constexpr (kFunction == Function::kGelu) {
    const Point<R> law = normal(x);
    return {x * law.value, law.value + x * law.slope};
  } else if constexpr (kFunction == Function::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2 u)
    const R scale = R(1.5957691216057307618), cube = R(0.044715);
    const R s = vsigmoid(scale * (x + cube * x * x * x));
    return {x * s, s + x * s * (R(1) - s) * scale * (R(1) + R(3) * cube * x * x)};
  } else if constexpr (kFunction == Function::kRelu) {
    return {vrelu(x), x <= R(0) ? R(0) : R(1)};
  } else {
    const R r = vrelu(x);
    return {r * r, R(2) * r};
  }
}

template <class F>
HOTLOOP_INLINE void with_function(Function function, F&& f) {
  switch (function) {
    case Function::kSilu:
      return f(std::integral_constant<Function, Function::kSilu>{});
    case Function::kGelu:
      return f(std::integral_constant<Function, Function::kGelu>{});
    case Function::kGeluTanh:
      return f(std::integral_constant<Function, Function::kGeluTanh>{});
    case Function::kRelu:
      return f(std::integral_constant<Function, Function::kRelu>{});
    default:
      return f(std::integral_constant<Function, Function::kRelu2>{});
  }
}

// Gates and values of inner numbers [first, first + count) of a row.
template <class R>
struct Chunk {
  alignas(64) R gate[kChunk];
  alignas(64) R value[kChunk];
  alignas(64) R above[kChunk];

  template <class S>
  void load(const Activation& a, const S* row, int64_t width, int64_t first, int64_t count) {
    if (a.gated && a.interleaved) {
      for (int64_t i = 0; i < count; ++i) {
        gate[i] = to_float(row[2 * (first + i)]);
        value[i] = to_float(row[2 * (first + i) + 1]);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) gate[i] = to_float(row[first + i]);
      for (int64_t i = 0; a.gated && i < count; ++i) value[i] = to_float(row[width + first + i]);
    }
  }
  template <class S>
  void store(const Activation& a, S* row, int64_t width, int64_t first, int64_t count) const {
    if (a.gated && a.interleaved) {
      for (int64_t i = 0; i < count; ++i) {
        put(row[2 * (first + i)], gate[i]);
        put(row[2 * (first + i) + 1], value[i]);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) put(row[first + i], gate[i]);
      for (int64_t i = 0; a.gated && i < count; ++i) put(row[width + first + i], value[i]);
    }
  }
};

template <class R, class F>
void over_rows(const ActivateCall& call, F&& each) {
  parallel_for(call.rows, 1 + kGrain / (call.width + 1), [&](int64_t begin, int64_t end) {
    Chunk<R> chunk;
    for (int64_t r = begin; r < end; ++r) {
      if (call.slots == nullptr || call.slots[r] >= 0) each(chunk, r);
    }
  });
}

// NaN stays NaN: it is not above the limit.
template <class R>
HOTLOOP_INLINE R cut(R x, R limit) {
  return x > limit ? limit : x;
}

template <class S, Function kFunction>
void activate_rows(const ActivateCall& call) {
  using R = typename Accumulate<S>::type;
  const Activation& a = call.activation;
  const int64_t width = call.width, inner = a.gated ? 2 * width : width;
  const R alpha = static_cast<R>(a.alpha), limit = static_cast<R>(a.limit), shift = static_cast<R>(a.shift);
  over_rows<R>(call, [&](Chunk<R>& chunk, int64_t r) {
    const S* row = static_cast<const S*>(call.inner) + r * inner;
    S* out = static_cast<S*>(call.out) + r * width;
    for (int64_t first = 0; first < width; first += kChunk) {
      const int64_t count = width - first < kChunk ? width - first : kChunk;
      chunk.load(a, row, width, first, count);
      S* to = out + first;
      if (a.gated) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          const R value = -cut(-cut(chunk.value[i], limit), limit);
          chunk.gate[i] = evaluate<kFunction>(cut(chunk.gate[i], limit), alpha).value * (value + shift);
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) chunk.gate[i] = evaluate<kFunction>(chunk.gate[i], alpha).value;
      }
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) put(to[i], chunk.gate[i]);
    }
  });
}

template <class S, Function kFunction>
void gradient_rows(const ActivateGradientCall& call) {
  using R = typename Accumulate<S>::type;
  const Activation& a = call.activation;
  const int64_t width = call.width, inner = a.gated ? 2 * width : width;
  const R alpha = static_cast<R>(a.alpha), limit = static_cast<R>(a.limit), shift = static_cast<R>(a.shift);
  over_rows<R>(call, [&](Chunk<R>& chunk, int64_t r) {
    const S* row = static_cast<const S*>(call.inner) + r * inner;
    S* gradient = static_cast<S*>(call.gradient) + r * inner;
    const R* above_row = static_cast<const R*>(call.above) + r * width;
    S* out = static_cast<S*>(call.out) + r * width;
    const R weight = call.weights == nullptr ? R(1) : static_cast<const R*>(call.weights)[call.slots[r]];
    R total = call.begin == nullptr ? R(0) : static_cast<const R*>(call.begin)[r];
    for (int64_t first = 0; first < width; first += kChunk) {
      const int64_t count = width - first < kChunk ? width - first : kChunk;
      chunk.load(a, row, width, first, count);
      for (int64_t i = 0; i < count; ++i) chunk.above[i] = above_row[first + i];
      R sum = 0;
      if (a.gated) {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; ++i) {
          const R g = chunk.gate[i], v = chunk.value[i], above = chunk.above[i] * weight;
          const Point<R> f = evaluate<kFunction>(cut(g, limit), alpha);
          const R value = -cut(-cut(v, limit), limit) + shift;
          const R h = f.value * value;
          sum += chunk.above[i] * h;
          chunk.above[i] = h * weight;
          chunk.gate[i] = g > limit ? R(0) : above * f.slope * value;
          chunk.value[i] = vabs(v) > limit ? R(0) : above * f.value;
        }
      } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; ++i) {
          const Point<R> f = evaluate<kFunction>(chunk.gate[i], alpha);
          const R above = chunk.above[i];
          sum += above * f.value;
          chunk.above[i] = f.value * weight;
          chunk.gate[i] = above * weight * f.slope;
        }
      }
      total += sum;
      for (int64_t i = 0; i < count; ++i) put(out[first + i], chunk.above[i]);
      chunk.store(a, gradient, width, first, count);
    }
    if (call.weight_gradient != nullptr) static_cast<R*>(call.weight_gradient)[call.slots[r]] = total;
  });
}

template <class R>
void scatter_columns(const ScatterCall& call) {
  const int64_t grain = 1 + 65536 / (call.rows + 1);
  parallel_for((call.columns + 15) / 16, (grain + 15) / 16, [&](int64_t begin, int64_t end) {
    const int64_t first = 16 * begin, last = 16 * end < call.columns ? 16 * end : call.columns;
    for (int64_t r = 0; r < call.rows; ++r) {
      const int64_t slot = call.slots[r];
      if (slot < 0) continue;
      const R weight = call.weights == nullptr ? R(1) : static_cast<const R*>(call.weights)[slot];
      const R* from = static_cast<const R*>(call.from) + r * call.columns;
      R* out = static_cast<R*>(call.out) + slot / call.choices * call.columns;
#pragma omp simd
      for (int64_t i = first; i < last; ++i) out[i] += weight * from[i];
    }
  });
}

}  // namespace

void activate(const moe::ActivateCall& call) {
  note_simd_level();
  with_function(call.activation.function, [&](auto function) {
    with_float(call.dtype, [&](auto storage) { activate_rows<decltype(storage), decltype(function)::value>(call); });
  });
}

void activate_gradient(const moe::ActivateGradientCall& call) {
  note_simd_level();
  with_function(call.activation.function, [&](auto function) {
    with_float(call.dtype, [&](auto storage) { gradient_rows<decltype(storage), decltype(function)::value>(call); });
  });
}

void scatter_add(const moe::ScatterCall& call) {
  note_simd_level();
  if (call.wide) return scatter_columns<double>(call);
  scatter_columns<float>(call);
}

#include "core/simd_end.hpp"
