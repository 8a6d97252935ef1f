// SPDX-License-Identifier: Apache-2.0
#include "table/store/pool.hpp"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/simd.hpp"

#include "core/simd_begin.hpp"

namespace {

using hotloop::to_float;
HOTLOOP_INLINE float to_float(std::int8_t x) { return static_cast<float>(x); }

// f(row) of its storage type; kUInt8 stands for int8.
template <class F>
HOTLOOP_INLINE void typed(Dtype dtype, const void* row, F&& f) {
  if (dtype == Dtype::kUInt8) return f(static_cast<const std::int8_t*>(row));
  with_row_type(dtype, [&](auto storage) { f(static_cast<const decltype(storage)*>(row)); });
}

// Vectors by name: left to itself the compiler adds two rows at a time and one column after the other.
constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

template <class Storage>
HOTLOOP_INLINE void load(const Storage* p, Lanes& lanes) {
  if constexpr (std::is_same_v<Storage, float>) {
    std::memcpy(&lanes, p, sizeof lanes);
  } else {
    float x[kLanes];
    for (int j = 0; j < kLanes; ++j) x[j] = to_float(p[j]);
    std::memcpy(&lanes, x, sizeof lanes);
  }
}

// kVectors * kLanes columns from `begin` on of all rows, with their sums in registers.
template <int kVectors, class Storage>
HOTLOOP_INLINE void add_columns(const table::WeightedRow* rows, std::int64_t count, std::int64_t begin,
                                const float* sum, float* out) {
  Lanes total[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    if (sum != nullptr)
      load(sum + begin + v * kLanes, total[v]);
    else
      total[v] = Lanes{};
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const Storage* const row = static_cast<const Storage*>(rows[i].row) + begin;
    const float weight = rows[i].weight;
    for (int v = 0; v < kVectors; ++v) {
      Lanes x;
      load(row + v * kLanes, x);
      total[v] += weight * x;
    }
  }
  std::memcpy(out + begin, total, sizeof total);
}

}  // namespace

void table_add_rows(Dtype dtype, const table::WeightedRow* rows, std::int64_t count, std::int64_t dim, const float* sum,
                    float* out) {
  typed(dtype, nullptr, [&](const auto* none) {
    using Storage = std::remove_cvref_t<decltype(*none)>;
    std::int64_t j = 0;
    for (; j + 4 * kLanes <= dim; j += 4 * kLanes) add_columns<4, Storage>(rows, count, j, sum, out);
    for (; j + kLanes <= dim; j += kLanes) add_columns<1, Storage>(rows, count, j, sum, out);
    for (; j < dim; ++j) {
      float total = sum != nullptr ? sum[j] : 0.0f;
      for (std::int64_t i = 0; i < count; ++i)
        total += rows[i].weight * to_float(static_cast<const Storage*>(rows[i].row)[j]);
      out[j] = total;
    }
  });
}

void table_max_row(Dtype dtype, const void* row, float scale, std::int64_t position, const float* best,
                   const std::int64_t* from, std::int64_t dim, float* out, std::int64_t* out_from) {
  typed(dtype, row, [&](const auto* p) {
#pragma GCC ivdep
    for (std::int64_t j = 0; j < dim; ++j) {
      const float x = scale * to_float(p[j]);
      const bool better = x > best[j] || from[j] < 0;
      out[j] = better ? x : best[j];
      out_from[j] = better ? position : from[j];
    }
  });
}

float table_dot_row(Dtype dtype, const void* row, const float* grad, std::int64_t dim) {
  // A fixed number of sums: the same at every level.
  float lanes[kLanes] = {};
  float sum = 0;
  typed(dtype, row, [&](const auto* p) {
    std::int64_t j = 0;
    for (; j + kLanes <= dim; j += kLanes) {
      for (int k = 0; k < kLanes; ++k) lanes[k] += to_float(p[j + k]) * grad[j + k];
    }
    for (; j < dim; ++j) lanes[j % kLanes] += to_float(p[j]) * grad[j];
  });
  for (int k = 0; k < kLanes; ++k) sum += lanes[k];
  return sum;
}

std::uint32_t table_largest(const float* x, std::int64_t n) {
  std::uint32_t worst = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    worst = bits > worst ? bits : worst;
  }
  return worst;
}

#include "core/simd_end.hpp"
