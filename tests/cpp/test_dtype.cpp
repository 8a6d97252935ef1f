// SPDX-License-Identifier: Apache-2.0
#include "core/dtype.hpp"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "check.hpp"

using namespace hotloop;

namespace {

// The value of a half by its definition, without any conversion of the compiler's.
double half_value(std::uint32_t bits) {
  const double sign = (bits & 0x8000u) != 0 ? -1.0 : 1.0;
  const int exponent = static_cast<int>((bits >> 10) & 31u);
  const double mantissa = static_cast<double>(bits & 1023u);
  if (exponent == 31) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  return sign * (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024.0 + mantissa, exponent - 25));
}

}  // namespace

TEST(every_half_pattern) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const float x = to_float(Float16{static_cast<std::uint16_t>(bits)});
    CHECK_CLOSE(x, half_value(bits), 0.0, 0.0);
    CHECK(std::isnan(x) || std::signbit(x) == ((bits & 0x8000u) != 0));
    const std::uint16_t back = half_bits(x);
    if (std::isnan(x)) {
      CHECK(std::isnan(to_float(Float16{back})));
    } else {
      CHECK(back == bits);
    }
  }
}

TEST(every_bfloat16_pattern) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const float x = to_float(BFloat16{static_cast<std::uint16_t>(bits)});
    CHECK(std::bit_cast<std::uint32_t>(x) == bits << 16);
    const std::uint16_t back = bfloat16_bits(x);
    if (std::isnan(x)) {
      CHECK(std::isnan(to_float(BFloat16{back})));
    } else {
      CHECK(back == bits);
    }
  }
}

// Between two neighbours the midpoint goes to the even one and what is next to it to the nearer one.
TEST(half_rounds_to_nearest_even) {
  for (std::uint32_t low = 0; low < 0x7bffu; ++low) {
    const double a = half_value(low), b = half_value(low + 1);
    const float middle = static_cast<float>((a + b) / 2);  // exact: a half has 11 bits, a float 24
    const float below = std::nextafterf(middle, 0.0f), above = std::nextafterf(middle, 1e30f);
    for (std::uint32_t sign : {0u, 0x8000u}) {
      const float s = sign != 0 ? -1.0f : 1.0f;
      CHECK(half_bits(s * middle) == (sign | (low + (low & 1u))));
      CHECK(half_bits(s * below) == (sign | low));
      CHECK(half_bits(s * above) == (sign | (low + 1)));
    }
  }
}

TEST(bfloat16_rounds_to_nearest_even) {
  for (std::uint32_t low = 0; low < 0x7f7fu; ++low) {
    const std::uint32_t middle = (low << 16) | 0x8000u;
    for (std::uint32_t sign : {0u, 0x8000u}) {
      const auto of = [&](std::uint32_t bits) { return bfloat16_bits(std::bit_cast<float>(bits | (sign << 16))); };
      CHECK(of(middle) == (sign | (low + (low & 1u))));
      CHECK(of(middle - 1) == (sign | low));
      CHECK(of(middle + 1) == (sign | (low + 1)));
    }
  }
}

TEST(edges) {
  const float inf = std::numeric_limits<float>::infinity();
  CHECK(half_bits(65504.0f) == 0x7bffu);
  CHECK(half_bits(65519.99f) == 0x7bffu);
  CHECK(half_bits(65520.0f) == 0x7c00u);
  CHECK(half_bits(inf) == 0x7c00u && half_bits(-inf) == 0xfc00u);
  CHECK(half_bits(0x1p-25f) == 0x0000u);  // half of the smallest subnormal: to even
  CHECK(half_bits(std::nextafterf(0x1p-25f, 1.0f)) == 0x0001u);
  CHECK(half_bits(1e-45f) == 0x0000u && half_bits(-0.0f) == 0x8000u);
  CHECK(bfloat16_bits(inf) == 0x7f80u && bfloat16_bits(-inf) == 0xff80u);
  CHECK(bfloat16_bits(std::numeric_limits<float>::max()) == 0x7f80u);
  // A NaN whose payload sits in the low bits must not round to infinity.
  CHECK(std::isnan(to_float(BFloat16{bfloat16_bits(std::bit_cast<float>(0x7f800001u))})));
  CHECK(std::isnan(to_float(Float16{half_bits(std::bit_cast<float>(0xff800001u))})));
}

TEST(put_and_dispatch) {
  Float16 h{};
  BFloat16 b{};
  float f = 0;
  put(h, 1.5f);
  put(b, -2.0f);
  put(f, 0.1f);
  CHECK(h.bits == 0x3e00u && b.bits == 0xc000u && f == 0.1f);
  int called = 0;
  for (Dtype d : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kFloat16, Dtype::kBFloat16}) {
    dispatch_float(d, "op", "x", [&](auto storage) {
      called += DtypeOf<decltype(storage)>::value == d && item_size(d) == sizeof(storage) ? 1 : 100;
    });
  }
  CHECK(called == 4);
  for (Dtype d : {Dtype::kInt64, Dtype::kInt32, Dtype::kUInt8}) {
    const std::string text = test::error_of([&] { dispatch_float(d, "op", "x", [](auto) {}); });
    CHECK(text.find("[op] x: expected float32, float64, float16 or bfloat16, got ") == 0);
    CHECK(text.find(dtype_name(d)) != std::string::npos);
  }
}

TEST_MAIN
