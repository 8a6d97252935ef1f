// SPDX-License-Identifier: Apache-2.0
// Storage types (float32, float64, float16, bfloat16, integers) and their conversion to the type in which a loop
// computes: float32 for the half types. On the CPU, conversions of half types are integer arithmetic with masks instead
// of branches, so that GCC vectorises the loops around them. `with_float` and its like call a template with the storage
// type of a dtype.
#pragma once

#include <bit>
#include <cstdint>

#include "core/macros.hpp"

namespace hotloop {

enum class Dtype : int { kFloat32, kFloat64, kFloat16, kBFloat16, kInt64, kInt32, kUInt8 };

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

constexpr std::int64_t item_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
    case Dtype::kInt64:
      return 8;
    case Dtype::kFloat32:
    case Dtype::kInt32:
      return 4;
    case Dtype::kFloat16:
    case Dtype::kBFloat16:
      return 2;
    default:
      return 1;
  }
}

constexpr const char* dtype_name(Dtype dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8"};
  return kNames[static_cast<int>(dtype)];
}

template <Dtype kDtype>
struct Is {
  static constexpr Dtype value = kDtype;
};
template <class Storage>
struct DtypeOf;
template <>
struct DtypeOf<float> : Is<Dtype::kFloat32> {};
template <>
struct DtypeOf<double> : Is<Dtype::kFloat64> {};
template <>
struct DtypeOf<Float16> : Is<Dtype::kFloat16> {};
template <>
struct DtypeOf<BFloat16> : Is<Dtype::kBFloat16> {};
template <>
struct DtypeOf<std::int64_t> : Is<Dtype::kInt64> {};
template <>
struct DtypeOf<std::int32_t> : Is<Dtype::kInt32> {};
template <>
struct DtypeOf<std::uint8_t> : Is<Dtype::kUInt8> {};

// Float32 is what half types are computed in; float64 stays float64.
template <class Storage>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

HOTLOOP_INLINE float to_float(float x) { return x; }
HOTLOOP_INLINE double to_float(double x) { return x; }
HOTLOOP_INLINE float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

#if defined(__CUDA_ARCH__)
// The device has the conversions as instructions; nvcc has no _Float16 to reach them by.
HOTLOOP_INLINE float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
HOTLOOP_INLINE std::uint16_t half_bits(float x) {
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#elif defined(__FLT16_MAX__) && !defined(__CUDACC__)
// By integers and one multiplication, which moves the exponent and normalises subnormals: GCC 12 does not vectorise
// the conversion of _Float16 (float16 beams: 8.7 ns per logit with it, 0.6 with this).
HOTLOOP_INLINE float to_float(Float16 x) {
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  const std::uint32_t finite = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f);
  const std::uint32_t infinite = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(finite | infinite | (static_cast<std::uint32_t>(x.bits & 0x8000u) << 16));
}
#else
// Compilers without _Float16: exact conversion by integer arithmetic, round to nearest even.
HOTLOOP_INLINE float to_float(Float16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {
    return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude >= 0x0400u) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return sign != 0 ? -subnormal : subnormal;
}
#endif
// All ones where a > b, for numbers below 2^31. A mask and not a condition: GCC 12 turns several conditions on one
// value into branches, and then vectorises nothing.
HOTLOOP_INLINE std::uint32_t mask_above(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(b - a) >> 31);
}
#if !defined(__CUDA_ARCH__)
// Round to nearest even; NaN stays NaN. By integers, since GCC 12 does not vectorise the conversion to _Float16 either
// (SGD on a row of 64: 27 ns with it and 18 with this; at the baseline, which has no instruction for it, 455 and 57).
HOTLOOP_INLINE std::uint16_t half_bits(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t size = bits & 0x7fffffffu;
  const std::uint32_t is_normal = mask_above(size, 0x387fffffu);
  const std::uint32_t is_large = mask_above(size, 0x477fefffu);
  const std::uint32_t is_nan = mask_above(size, 0x7f800000u);
  const std::uint32_t normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  // The adder rounds what is below the normal halves to 2^-24.
  const std::uint32_t small = std::bit_cast<std::uint32_t>(std::bit_cast<float>(size) + 0.5f) - 0x3f000000u;
  const std::uint32_t rounded = (is_normal & normal) | (~is_normal & small);
  const std::uint32_t limited = (~is_large & rounded) | (is_large & 0x7c00u) | (is_nan & 0x0200u);
  return static_cast<std::uint16_t>(((bits >> 16) & 0x8000u) | limited);
}
#endif

// Round to nearest even; NaN stays NaN.
HOTLOOP_INLINE std::uint16_t bfloat16_bits(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>(x != x ? 0x7fc0u : rounded);
}

// Writes x in the storage type. Assigns the bits and not a struct: GCC vectorises only the former.
HOTLOOP_INLINE void put(float& out, float x) { out = x; }
HOTLOOP_INLINE void put(double& out, double x) { out = x; }
HOTLOOP_INLINE void put(BFloat16& out, float x) { out.bits = bfloat16_bits(x); }
HOTLOOP_INLINE void put(Float16& out, float x) { out.bits = half_bits(x); }

// Calls f(Storage{}) with the storage type of a floating dtype. The usual one does not go through the jump table.
template <class F>
HOTLOOP_INLINE decltype(auto) with_float(Dtype dtype, F&& f) {
  if (dtype == Dtype::kFloat32) return f(float{});
  switch (dtype) {
    case Dtype::kFloat64:
      return f(double{});
    case Dtype::kFloat16:
      return f(Float16{});
    default:
      return f(BFloat16{});
  }
}
// The same where there is no float64: the rows of tables.
template <class F>
HOTLOOP_INLINE decltype(auto) with_row_type(Dtype dtype, F&& f) {
  if (dtype == Dtype::kFloat16) return f(Float16{});
  if (dtype == Dtype::kBFloat16) return f(BFloat16{});
  return f(float{});
}
// f(std::int32_t{}) or f(std::int64_t{}).
template <class F>
HOTLOOP_INLINE decltype(auto) with_integer(Dtype dtype, F&& f) {
  if (dtype == Dtype::kInt32) return f(std::int32_t{});
  return f(std::int64_t{});
}

[[noreturn]] void throw_float_expected(Dtype dtype, const char* op, const char* argument);

// with_float where the dtype may be another.
template <class F>
static decltype(auto) dispatch_float(Dtype dtype, const char* op, const char* argument, F&& f) {
  if (dtype > Dtype::kBFloat16) throw_float_expected(dtype, op, argument);
  return with_float(dtype, f);
}

}  // namespace hotloop
