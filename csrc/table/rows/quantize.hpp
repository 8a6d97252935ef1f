// Rows of int8 for serving: q = x / step rounded half away from zero and clipped to [-128, 127], step = range / 128.
// NaN becomes 0. A quarter of the bytes of float32; inside [-range, range - step] the error is at most step / 2.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/simd.hpp"

namespace hotloop::table {

void encode_row_int8(const float* x, std::int64_t dim, float range, std::int8_t* out);
void decode_row_int8(const std::int8_t* q, std::int64_t dim, float range, float* out);

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
void encode_rows_int8(const QuantizeCall& call);
void decode_rows_int8(const QuantizeCall& call);

}  // namespace hotloop::table

HOTLOOP_FOR_EACH_SIMD(void table_encode_row(const float* x, std::int64_t dim, float range, std::int8_t* out);
                      void table_decode_row(const std::int8_t* q, std::int64_t dim, float range, float* out);
                      void table_quantize_rows(const table::QuantizeCall& call, bool encode);)
