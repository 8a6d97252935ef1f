#include "table/rows/quantize.hpp"

namespace hotloop::table {

void encode_row_int8(const float* x, std::int64_t dim, float range, std::int8_t* out) {
  HOTLOOP_SIMD_DISPATCH(table_encode_row(x, dim, range, out))
}
void decode_row_int8(const std::int8_t* q, std::int64_t dim, float range, float* out) {
  HOTLOOP_SIMD_DISPATCH(table_decode_row(q, dim, range, out))
}
void encode_rows_int8(const QuantizeCall& call) { HOTLOOP_SIMD_DISPATCH(table_quantize_rows(call, true)) }
void decode_rows_int8(const QuantizeCall& call) { HOTLOOP_SIMD_DISPATCH(table_quantize_rows(call, false)) }

}  // namespace hotloop::table
