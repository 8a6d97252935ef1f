// SPDX-License-Identifier: Apache-2.0
// float32 to the type rows are stored in, and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.hpp"

namespace hotloop::table {

inline void store_floats(Dtype dtype, const float* from, void* to, std::int64_t n) {
  if (dtype == Dtype::kFloat32) return static_cast<void>(std::memcpy(to, from, static_cast<std::size_t>(n) * 4));
  with_row_type(dtype, [&](auto storage) {
    auto* out = static_cast<decltype(storage)*>(to);
    for (std::int64_t j = 0; j < n; ++j) put(out[j], from[j]);
  });
}

inline void load_floats(Dtype dtype, const void* from, float* to, std::int64_t n) {
  if (dtype == Dtype::kFloat32) return static_cast<void>(std::memcpy(to, from, static_cast<std::size_t>(n) * 4));
  with_row_type(dtype, [&](auto storage) {
    const auto* in = static_cast<const decltype(storage)*>(from);
    for (std::int64_t j = 0; j < n; ++j) to[j] = to_float(in[j]);
  });
}

}  // namespace hotloop::table
