// float32 to the type rows are stored in, and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.hpp"

namespace hotloop::table {

inline void store_floats(Dtype dtype, const float* from, void* to, std::int64_t n) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(to, from, static_cast<std::size_t>(n) * 4);
  } else if (dtype == Dtype::kFloat16) {
    auto* out = static_cast<Float16*>(to);
    for (std::int64_t j = 0; j < n; ++j) put(out[j], from[j]);
  } else {
    auto* out = static_cast<BFloat16*>(to);
    for (std::int64_t j = 0; j < n; ++j) put(out[j], from[j]);
  }
}

inline void load_floats(Dtype dtype, const void* from, float* to, std::int64_t n) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(to, from, static_cast<std::size_t>(n) * 4);
  } else if (dtype == Dtype::kFloat16) {
    const auto* in = static_cast<const Float16*>(from);
    for (std::int64_t j = 0; j < n; ++j) to[j] = to_float(in[j]);
  } else {
    const auto* in = static_cast<const BFloat16*>(from);
    for (std::int64_t j = 0; j < n; ++j) to[j] = to_float(in[j]);
  }
}

}  // namespace hotloop::table
