// Dual numbers, conversions, parallel_for, Philox, elementary functions.
#include <atomic>
#include <bit>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "core/dtype.hpp"
#include "core/dual.hpp"
#include "core/exponentials.hpp"
#include "core/parallel.hpp"
#include "core/philox.hpp"
#include "core/simd.hpp"
#include "core/view.hpp"
#include "core/vmath.hpp"
#include "core/vmath_kernels.hpp"

namespace {

using namespace hotloop;

// A function of two inputs through every operator and every elementary function.
template <class T>
T mixture(const T& x, const T& y) {
  const T a = vexp(x * 0.3) + vsoftplus(y - x) * vsigmoid(x / y) - vlog(y * y + 1.0);
  const T b = 2.0 / (y + 3.0) + (1.0 - x) * vexpm1(y * 0.2) + vlog1mexp(-(y * y) - 0.1);
  return select(value_of(x) > 0.0, a * b, a / (b * b + 1.0)) + vrelu(x - y) - (-x);
}

void dual_numbers_give_the_derivative() {
  for (double x : {-2.5, -0.3, 0.4, 1.7}) {
    for (double y : {-1.2, 0.6, 2.1}) {
      using D = Dual<double, 2>;
      const D f = mixture(D::variable(x, 0), D::variable(y, 1));
      CHECK_CLOSE(f.value, mixture(x, y), 1e-14, 1e-14);
      const double h = 1e-6;
      CHECK_CLOSE(f.d[0], (mixture(x + h, y) - mixture(x - h, y)) / (2 * h), 1e-7, 1e-8);
      CHECK_CLOSE(f.d[1], (mixture(x, y + h) - mixture(x, y - h)) / (2 * h), 1e-7, 1e-8);
    }
  }
}

// Value of a half or bfloat16 bit pattern from its definition.
double decode(std::uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const std::uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>((bits >> mantissa_bits) & ((1u << exponent_bits) - 1));
  const double sign = (bits >> (exponent_bits + mantissa_bits)) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa == 0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  }
  const double fraction = static_cast<double>(mantissa) / static_cast<double>(1u << mantissa_bits);
  return sign * (exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1.0 + fraction, exponent - bias));
}

void every_half_pattern_converts_and_comes_back() {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto pattern = static_cast<std::uint16_t>(bits);
    CHECK_CLOSE(static_cast<double>(to_float(Float16{pattern})), decode(bits, 5, 10), 0.0, 0.0);
    CHECK_CLOSE(static_cast<double>(to_float(BFloat16{pattern})), decode(bits, 8, 7), 0.0, 0.0);
    if (!std::isnan(decode(bits, 5, 10))) CHECK(half_bits(to_float(Float16{pattern})) == pattern);
    if (!std::isnan(decode(bits, 8, 7))) CHECK(bfloat16_bits(to_float(BFloat16{pattern})) == pattern);
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(std::isnan(to_float(BFloat16{bfloat16_bits(nan)})));
  CHECK(std::isnan(to_float(Float16{half_bits(nan)})));
}

// Between two neighbours: the nearer one, and the even one in the middle.
void halves_round_to_nearest_even() {
  for (std::uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const auto low = static_cast<std::uint16_t>(bits), high = static_cast<std::uint16_t>(bits + 1);
    const float a = to_float(Float16{low}), b = to_float(Float16{high});
    const float middle = a + (b - a) * 0.5f;
    CHECK(half_bits(middle) == ((low & 1u) == 0 ? low : high));
    CHECK(half_bits(std::nextafter(middle, a)) == low);
    CHECK(half_bits(std::nextafter(middle, b)) == high);
  }
  for (std::uint32_t bits = 0; bits < 0x7f7f; bits += 3) {
    const auto low = static_cast<std::uint16_t>(bits), high = static_cast<std::uint16_t>(bits + 1);
    const float middle = std::bit_cast<float>((bits << 16) | 0x8000u);
    CHECK(bfloat16_bits(middle) == ((low & 1u) == 0 ? low : high));
    CHECK(bfloat16_bits(std::nextafter(middle, 0.0f)) == low);
    CHECK(bfloat16_bits(std::nextafter(middle, INFINITY)) == high);
  }
}

void parallel_for_covers_the_range_once() {
  for (std::int64_t n : {0, 1, 2, 3, 7, 1000, 4097}) {
    std::vector<int> seen(static_cast<std::size_t>(n), 0);
    parallel_for(n, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
    });
    bool once = true;
    for (int count : seen) once = once && count == 1;
    CHECK(once);
  }
  std::atomic<int> calls{0};
  parallel_for(100, 1000, [&](std::int64_t, std::int64_t) { ++calls; });
  CHECK(calls == 1);
}

void parallel_for_passes_exceptions_on() {
  bool thrown = false;
  try {
    parallel_for(1000, 1, [](std::int64_t begin, std::int64_t) {
      if (begin > 0) throw std::runtime_error("from a worker");
    });
  } catch (const std::runtime_error& error) {
    thrown = std::string(error.what()) == "from a worker";
  }
  CHECK(thrown || max_threads() == 1);
}

// Known-answer vectors of Random123 (philox4x32-10).
void philox_known_answers() {
  struct Vector {
    Philox4x32 counter;
    std::uint32_t key[2];
    std::uint32_t expected[4];
  };
  const std::uint32_t f = 0xffffffffu;
  const Vector vectors[] = {
      {{{0, 0, 0, 0}}, {0, 0}, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}},
      {{{f, f, f, f}}, {f, f}, {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}},
      {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
       {0xa4093822u, 0x299f31d0u},
       {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}},
  };
  for (const Vector& v : vectors) {
    const Philox4x32 r = philox4x32_10(v.counter, v.key[0], v.key[1]);
    for (int i = 0; i < 4; ++i) CHECK(r.word[i] == v.expected[i]);
  }
  CHECK(uniform_open_closed(0) > 0.0f);
  CHECK(uniform_open_closed(f) == 1.0f);
}

void elementary_functions_at_every_level() {
  std::vector<float> x;
  for (float v = -90.0f; v < 90.0f; v += 0.37f) x.push_back(v);
  std::vector<float> y(x.size());
  for (const char* level : {"baseline", "avx2", "avx512"}) {
    const SimdLevel wanted = std::string(level) == "avx512" ? SimdLevel::kAvx512
                             : std::string(level) == "avx2" ? SimdLevel::kAvx2
                                                            : SimdLevel::kBaseline;
    if (!simd_level_runnable(wanted)) continue;
    force_simd_level(level);
    const auto n = static_cast<std::int64_t>(x.size());
    map_function(MathFunction::kExp, x.data(), y.data(), n);
    CHECK(last_simd_level.load() == static_cast<int>(wanted));
    for (std::size_t i = 0; i < x.size(); ++i) {
      CHECK_CLOSE(static_cast<double>(y[i]), std::exp(static_cast<double>(x[i])) > 3.4028235677973366e38
                                                 ? std::numeric_limits<double>::infinity()
                                                 : std::exp(static_cast<double>(x[i])), 3e-7, 1e-38);
    }
    map_function(MathFunction::kSoftplus, x.data(), y.data(), n);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double truth = std::fmax(static_cast<double>(x[i]), 0.0) + std::log1p(std::exp(-std::fabs(static_cast<double>(x[i]))));
      CHECK_CLOSE(static_cast<double>(y[i]), truth, 4e-7, 1e-37);
    }
  }
  force_simd_level("auto");
  for (double v = 0.0; v <= 1.0; v += 1.0 / 1024) CHECK_CLOSE(exp2_evolved(v), std::exp2(v), 6e-15, 0.0);
}

void unknown_level_is_refused() {
  bool refused = false;
  try {
    force_simd_level("sse9");
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
}

void views_refuse_what_would_corrupt_memory() {
  float data[6] = {};
  View view;
  view.data = data;
  view.rank = 2;
  view.shape = {2, 3};
  view.stride = {3, 1};
  CHECK(as_matrix<const float>(view, "op", "x", false).row(1) == data + 3);
  const auto refuses = [&](auto change) {
    View bad = view;
    change(bad);
    try {
      as_matrix<float>(bad, "op", "x", true);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what()).rfind("[op] x: expected", 0) == 0;
    }
    return false;
  };
  CHECK(refuses([](View& v) { v.rank = 1; }));
  CHECK(refuses([](View& v) { v.dtype = Dtype::kFloat64; }));
  CHECK(refuses([](View& v) { v.stride[1] = 2; }));
  CHECK(refuses([](View& v) { v.read_only = true; }));
}

}  // namespace

int main() {
  dual_numbers_give_the_derivative();
  every_half_pattern_converts_and_comes_back();
  halves_round_to_nearest_even();
  parallel_for_covers_the_range_once();
  parallel_for_passes_exceptions_on();
  philox_known_answers();
  elementary_functions_at_every_level();
  unknown_level_is_refused();
  views_refuse_what_would_corrupt_memory();
  return hotloop::test::finish("core");
}
