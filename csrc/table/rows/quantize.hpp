// SPDX-License-Identifier: Apache-2.0
// Rows of int8 for serving: q = x / step rounded half away from zero and clipped to [-128, 127], step = range / 128.
// NaN becomes 0. A quarter of the bytes of float32; inside [-range, range - step] the error is at most step / 2.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/simd.hpp"

namespace hotloop::table {

// Rows of arrays, strides in elements. `dtype`: float32, float16 or bfloat16, of the side that is not int8.
struct QuantizeCall {
  std::int64_t n = 0, dim = 0;
  float range = 1;
  void* values = nullptr;
  Dtype dtype = Dtype::kFloat32;
  std::int64_t value_stride = 0;
  std::int8_t* codes = nullptr;
  std::int64_t code_stride = 0;
};

}  // namespace hotloop::table

// Values to codes if `encode`, else codes to values.
HOTLOOP_SIMD_FUNCTION(table, void, quantize_rows, (const table::QuantizeCall& call, bool encode), (call, encode))
