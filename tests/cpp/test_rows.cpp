// SPDX-License-Identifier: Apache-2.0
#include "logprob/rows.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.hpp"

using namespace hotloop;
using namespace hotloop::logprob;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

// [rows, cols] logits, rows `cols + 5` apart: NaN in the gaps.
struct Tile {
  Tile(std::int64_t r, std::int64_t c)
      : rows(r), cols(c), stride(c + 5), memory(static_cast<std::size_t>(r * (c + 5)), kNan) {
    for (std::int64_t i = 0; i < r; ++i) {
      for (std::int64_t j = 0; j < c; ++j) at(i, j) = std::sin(static_cast<float>(7 * i + 3 * j)) * 3.0f;
    }
  }
  float& at(std::int64_t i, std::int64_t j) { return memory[static_cast<std::size_t>(i * stride + j)]; }
  // The columns from `first` on, at most `width` of them.
  View view(std::int64_t first, std::int64_t width) {
    return test::matrix(memory.data() + first, rows, std::min(width, cols - first), stride);
  }
  View view() { return view(0, cols); }
  bool gaps_untouched() {
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = cols; j < stride; ++j) {
        if (!std::isnan(at(i, j))) return false;
      }
    }
    return true;
  }
  std::int64_t rows, cols, stride;
  std::vector<float> memory;
};

std::vector<float> empty_statistics(std::int64_t n) {
  std::vector<float> s(static_cast<std::size_t>(kStatistics * n), 0.0f);
  for (std::int64_t i = 0; i < n; ++i) {
    s[static_cast<std::size_t>(kMax * n + i)] = -kInf;
    s[static_cast<std::size_t>(kLabelZ * n + i)] = kNan;
  }
  return s;
}

// The tile in parts of `width` columns, one after the other.
void statistics_and_gradient(std::int64_t cols, std::int64_t width) {
  const std::int64_t n = 3;
  Tile tile(n, cols);
  const std::vector<std::int64_t> labels = {0, cols - 1, cols + 10};  // the last is not in this tile
  std::vector<float> statistics = empty_statistics(n);
  std::vector<std::int64_t> argmax(static_cast<std::size_t>(n), -1);
  for (std::int64_t column = 0; column < cols; column += width) {
    StatisticsCall call;
    call.tile = tile.view(column, width);
    call.labels = labels.data();
    call.first_column = column;
    call.all = true;
    call.statistics = statistics.data();
    call.argmax = argmax.data();
    row_statistics(call);
  }
  std::vector<float> coefficients(static_cast<std::size_t>(6 * n), 0.0f);
  for (std::int64_t i = 0; i < n; ++i) {
    const auto of = [&](int k) { return static_cast<double>(statistics[static_cast<std::size_t>(k * n + i)]); };
    double sum = 0.0, largest = -1e30;
    std::int64_t first = 0;
    for (std::int64_t j = 0; j < cols; ++j) {
      sum += std::exp(static_cast<double>(tile.at(i, j)));
      if (tile.at(i, j) > largest) largest = tile.at(i, j), first = j;
    }
    const double lse = std::log(sum);
    CHECK(of(kMax) == largest && argmax[static_cast<std::size_t>(i)] == first);
    CHECK_CLOSE(of(kMax) + std::log(of(kSumExp)), lse, 2e-6, 1e-6);
    CHECK_CLOSE(of(kLabelZ), i == 0 ? tile.at(0, 0) : i == 1 ? tile.at(1, cols - 1) : kNan, 0.0, 0.0);
    coefficients[static_cast<std::size_t>(i)] = static_cast<float>(lse);
    coefficients[static_cast<std::size_t>(n + i)] = -1.0f;
    coefficients[static_cast<std::size_t>(5 * n + i)] = 1.0f;
  }
  Tile logits = tile;
  GradientCall gradient;
  gradient.tile = tile.view();
  gradient.labels = labels.data();
  gradient.coefficients = coefficients.data();
  row_gradient(gradient);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < cols; ++j) {
      const double p = std::exp(static_cast<double>(logits.at(i, j)) - coefficients[static_cast<std::size_t>(i)]);
      CHECK_CLOSE(tile.at(i, j), (labels[static_cast<std::size_t>(i)] == j ? 1.0 : 0.0) - p, 2e-5, 2e-6);
    }
  }
  CHECK(tile.gaps_untouched());
}

}  // namespace

TEST(statistics_and_gradient_in_poisoned_memory) {
  test::at_every_level([] {
    // One column; around a chunk of 1024; two chunks and a rest.
    for (std::int64_t cols : {1, 7, 1023, 1024, 1025, 2053}) {
      for (std::int64_t width : {std::int64_t{1}, std::int64_t{100}, cols}) statistics_and_gradient(cols, width);
    }
  });
}

TEST(minus_infinity_has_no_weight_and_no_gradient) {
  Tile tile(1, 40);
  for (std::int64_t j = 0; j < 40; j += 3) tile.at(0, j) = -kInf;
  const std::int64_t label = 1;
  std::vector<float> statistics = empty_statistics(1);
  StatisticsCall call;
  call.tile = tile.view();
  call.labels = &label;
  call.all = true;
  call.statistics = statistics.data();
  call.argmax = nullptr;
  row_statistics(call);
  for (int k : {kMax, kSumExp, kSumZExp, kSumExp2}) CHECK(std::isfinite(statistics[static_cast<std::size_t>(k)]));
  std::vector<float> coefficients = {statistics[0] + std::log(statistics[1]), -1.0f, 0.5f, 0.5f, 0.0f, 1.0f};
  GradientCall gradient;
  gradient.tile = tile.view();
  gradient.labels = &label;
  gradient.coefficients = coefficients.data();
  row_gradient(gradient);
  for (std::int64_t j = 0; j < 40; ++j) CHECK(j % 3 == 0 ? tile.at(0, j) == 0.0f : std::isfinite(tile.at(0, j)));
}

TEST(no_rows) {
  Tile tile(0, 8);
  StatisticsCall call;
  call.tile = tile.view();
  call.labels = nullptr;
  call.statistics = nullptr;
  call.argmax = nullptr;
  row_statistics(call);
  DivergenceCall two;
  two.student = two.teacher = tile.view();
  two.statistics = two.mixture = nullptr;
  two.coefficients = nullptr;
  divergence_statistics(two);
  CHECK(true);
}

TEST_MAIN
