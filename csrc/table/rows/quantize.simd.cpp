// SPDX-License-Identifier: Apache-2.0
// int8 rows. Every step is one IEEE operation, so that every instruction set and the reference give the same bytes.
#include "table/rows/quantize.hpp"

#include <atomic>
#include <cstdint>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "core/simd_begin.hpp"

namespace {

using namespace hotloop::table;

// The fraction is compared and not added to: 0.5 + 0.49999997 is 1 in float32.
HOTLOOP_INLINE std::int8_t encode(float x, float step) {
  float q = x / step;
  q = q == q ? q : 0.0f;
  q = q > 127.0f ? 127.0f : q;
  q = q < -128.0f ? -128.0f : q;
  const auto whole = static_cast<std::int32_t>(q);
  const float left = q - static_cast<float>(whole);
  const std::int32_t up = left >= 0.5f ? 1 : 0;
  const std::int32_t down = left <= -0.5f ? 1 : 0;
  return static_cast<std::int8_t>(whole + up - down);
}

template <class Storage>
void encode_row(const Storage* x, std::int64_t dim, float range, std::int8_t* out) {
  const float step = range * 0x1p-7f;
#pragma GCC ivdep
  for (std::int64_t j = 0; j < dim; ++j) out[j] = encode(to_float(x[j]), step);
}
template <class Storage>
void decode_row(const std::int8_t* q, std::int64_t dim, float range, Storage* out) {
  const float step = range * 0x1p-7f;
#pragma GCC ivdep
  for (std::int64_t j = 0; j < dim; ++j) put(out[j], static_cast<float>(q[j]) * step);
}

template <class Storage>
void rows_of(const QuantizeCall& call, bool encode) {
  // About 20 us of work: below that a second thread costs more than it brings.
  const std::int64_t grain = 131072 / (call.dim > 0 ? call.dim : 1) + 1;
  parallel_for(call.n, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      Storage* const values = static_cast<Storage*>(call.values) + i * call.value_stride;
      std::int8_t* const codes = call.codes + i * call.code_stride;
      if (encode) {
        encode_row(values, call.dim, call.range, codes);
      } else {
        decode_row(codes, call.dim, call.range, values);
      }
    }
  });
}

}  // namespace

void quantize_rows(const QuantizeCall& call, bool encode) {
  note_simd_level();
  with_row_type(call.dtype, [&](auto storage) { rows_of<decltype(storage)>(call, encode); });
}

#include "core/simd_end.hpp"
