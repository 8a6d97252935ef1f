#include "table/pool.hpp"

#include <atomic>
#include <cstdint>
#include <cstring>

#include "core/simd.hpp"

#include "core/simd_begin.hpp"

namespace {

HOTLOOP_INLINE float element(const float* p, std::int64_t j) { return p[j]; }
HOTLOOP_INLINE float element(const Float16* p, std::int64_t j) { return to_float(p[j]); }
HOTLOOP_INLINE float element(const BFloat16* p, std::int64_t j) { return to_float(p[j]); }
HOTLOOP_INLINE float element(const std::int8_t* p, std::int64_t j) { return static_cast<float>(p[j]); }

template <class F>
HOTLOOP_INLINE void typed(Dtype dtype, const void* row, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(static_cast<const float*>(row));
    case Dtype::kFloat16:
      return f(static_cast<const Float16*>(row));
    case Dtype::kBFloat16:
      return f(static_cast<const BFloat16*>(row));
    default:
      return f(static_cast<const std::int8_t*>(row));
  }
}

}  // namespace

void table_add_row(Dtype dtype, const void* row, float weight, const float* sum, std::int64_t dim, float* out) {
  note_simd_level();
  typed(dtype, row, [&](const auto* p) {
#pragma GCC ivdep
    for (std::int64_t j = 0; j < dim; ++j) out[j] = sum[j] + weight * element(p, j);
  });
}

void table_max_row(Dtype dtype, const void* row, float scale, std::int64_t position, const float* best,
                   const std::int64_t* from, std::int64_t dim, float* out, std::int64_t* out_from) {
  typed(dtype, row, [&](const auto* p) {
#pragma GCC ivdep
    for (std::int64_t j = 0; j < dim; ++j) {
      const float x = scale * element(p, j);
      const bool better = x > best[j] || from[j] < 0;
      out[j] = better ? x : best[j];
      out_from[j] = better ? position : from[j];
    }
  });
}

float table_dot_row(Dtype dtype, const void* row, const float* grad, std::int64_t dim) {
  constexpr int kLanes = 16;  // a fixed number of sums: the same at every level
  float lanes[kLanes] = {};
  float sum = 0;
  typed(dtype, row, [&](const auto* p) {
    std::int64_t j = 0;
    for (; j + kLanes <= dim; j += kLanes) {
      for (int k = 0; k < kLanes; ++k) lanes[k] += element(p, j + k) * grad[j + k];
    }
    for (; j < dim; ++j) lanes[j % kLanes] += element(p, j) * grad[j];
  });
  for (int k = 0; k < kLanes; ++k) sum += lanes[k];
  return sum;
}

bool table_all_finite(const float* x, std::int64_t n) {
  std::uint32_t worst = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    worst = bits > worst ? bits : worst;
  }
  return worst < 0x7f800000u;
}

#include "core/simd_end.hpp"
