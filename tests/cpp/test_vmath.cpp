// SPDX-License-Identifier: Apache-2.0
#include "core/vmath.hpp"

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "check.hpp"
#include "core/exponentials.hpp"
#include "core/vmath_kernels.hpp"

using namespace hotloop;

namespace {

long double exact(MathFunction f, long double x) {
  switch (f) {
    case MathFunction::kExp:
    case MathFunction::kExpWeight:
      return std::exp(x);
    case MathFunction::kExpm1:
      return std::expm1(x);
    case MathFunction::kLog:
      return std::log(x);
    case MathFunction::kLog1p:
      return std::log1p(x);
    case MathFunction::kSigmoid:
      return 1 / (1 + std::exp(-x));
    case MathFunction::kSoftplus:
      return std::log1p(std::exp(x));
    case MathFunction::kTanh:
      return std::tanh(x);
    default:
      return x > -0.69L ? std::log(-std::expm1(x)) : std::log1p(-std::exp(x));
  }
}

template <class R>
void spot_checks(double relative) {
  for (int k = 0; k <= static_cast<int>(MathFunction::kLog1mexp); ++k) {
    const auto f = static_cast<MathFunction>(k);
    std::vector<R> x, y;
    for (double v = 0.001; v < 80; v *= 1.07) {
      if (f == MathFunction::kLog || f == MathFunction::kLog1p || f > MathFunction::kLog1p)
        x.push_back(static_cast<R>(v));
      if (f != MathFunction::kLog && (f != MathFunction::kLog1p || v < 1)) x.push_back(static_cast<R>(-v));
    }
    if (f == MathFunction::kLog1mexp) {
      for (R& v : x) v = -std::fabs(v);
    }
    y.resize(x.size());
    map_function(f, x.data(), y.data(), static_cast<std::int64_t>(x.size()));
    for (std::size_t i = 0; i < x.size(); ++i) {
      CHECK_CLOSE(y[i], static_cast<double>(exact(f, x[i])), relative, 2e-38);
    }
  }
}

using test::at_every_level;

}  // namespace

TEST(every_function_is_close_to_long_double) {
  at_every_level([] {
    spot_checks<float>(4.5e-7);
    spot_checks<double>(2e-15);
  });
}

// Also what -fsanitize=undefined must pass: the integer steps of NaN, infinities and negative numbers.
TEST(special_values) {
  constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
  at_every_level([] {
    std::vector<float> x = {kNan,    -kNan, kInf,   -kInf, 0.0f,   -0.0f,  1e-45f,
                            -1e-45f, 3e38f, -3e38f, -1.0f, 200.0f, -200.0f};
    std::vector<float> y(x.size());
    const auto n = static_cast<std::int64_t>(x.size());
    for (int k = 0; k <= static_cast<int>(MathFunction::kLog1mexp); ++k) {
      map_function(static_cast<MathFunction>(k), x.data(), y.data(), n);
      CHECK(std::isnan(y[0]) && std::isnan(y[1]));
    }
    map_function(MathFunction::kExp, x.data(), y.data(), n);
    CHECK(y[2] == kInf && y[3] == 0.0f && y[4] == 1.0f && y[11] == kInf && y[12] == 0.0f);
    map_function(MathFunction::kLog, x.data(), y.data(), n);
    CHECK(y[2] == kInf && std::isnan(y[3]) && y[4] == -kInf && y[5] == -kInf && std::isnan(y[10]));
    map_function(MathFunction::kTanh, x.data(), y.data(), n);
    CHECK(y[2] == 1.0f && y[3] == -1.0f && !std::signbit(y[4]) && std::signbit(y[5]));
  });
}

// Lengths around the width of a vector; what stands before and behind stays as it was.
TEST(lengths_and_neighbours) {
  at_every_level([] {
    for (std::size_t n = 0; n <= 40; ++n) {
      std::vector<float> x(n + 2, 0.5f), y(n + 2, -7.0f);
      map_function(MathFunction::kExp, x.data() + 1, y.data() + 1, static_cast<std::int64_t>(n));
      CHECK(y.front() == -7.0f && y.back() == -7.0f);
      for (std::size_t i = 1; i <= n; ++i) CHECK_CLOSE(y[i], std::exp(0.5f), 2e-7, 0.0);
    }
  });
}

TEST(exponentials_of_few_operations) {
  CHECK(exp2_evolved(0.0) == 1.0);
  for (double x = 0.0; x <= 1.0; x += 0.001) {
    const double true_value = std::exp2(x);
    CHECK_CLOSE(exp2_evolved(x), true_value, 6e-15, 0.0);
    CHECK_CLOSE(exp2_evolved_coarse(x), true_value, 8.7e-4, 0.0);
    CHECK_CLOSE(exp2_minimax5(x), true_value, 7.5e-8, 0.0);
    CHECK_CLOSE(exp2_minimax6(x), true_value, 1.9e-9, 0.0);
  }
}

TEST_MAIN
