// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "check.hpp"
#include "table/error_memory/error_memory.hpp"

using namespace hotloop;
using namespace hotloop::table;

namespace {

using test::at_every_level;

template <class R>
View matrix(const std::vector<R>& x, std::int64_t rows, std::int64_t cols) {
  return test::matrix(x.data(), rows, cols, cols);
}

template <class R>
std::vector<R> normal(std::mt19937& g, std::int64_t n) {
  std::normal_distribution<R> draw;
  std::vector<R> x(static_cast<std::size_t>(n));
  for (R& v : x) v = draw(g);
  return x;
}

double similarity(const double* a, const double* b, std::int64_t dim) {
  double ab = 0, aa = 0, bb = 0;
  for (std::int64_t j = 0; j < dim; ++j) ab += a[j] * b[j], aa += a[j] * a[j], bb += b[j] * b[j];
  return ab / std::sqrt(aa * bb);
}

// Neighbours by sorting all similarities, the oldest slot first among equals.
void check_neighbors(std::int64_t batch, std::int64_t slots, std::int64_t dim, std::int64_t k, std::int64_t first) {
  std::mt19937 g(static_cast<unsigned>(batch + 7 * slots + 31 * dim + k));
  std::vector<double> query = normal<double>(g, batch * dim), keys = normal<double>(g, slots * dim);
  for (std::int64_t i = 0; i + 3 < slots; i += 3) {  // every third slot again: equal similarities
    std::copy_n(keys.begin() + i * dim, dim, keys.begin() + (slots - 1 - i) * dim);
  }
  const std::vector<double> base(static_cast<std::size_t>(batch), 0.5), labels(static_cast<std::size_t>(slots), 1.0);
  std::vector<double> prediction(static_cast<std::size_t>(batch)), weights(static_cast<std::size_t>(batch * k));
  std::vector<std::int64_t> neighbors(static_cast<std::size_t>(batch * k));
  MemoryCall call{};
  call.query = matrix(query, batch, dim);
  call.keys = matrix(keys, slots, dim);
  call.first = first;
  call.base_prediction = base.data();
  call.labels = call.base_predictions = labels.data();
  call.k = k;
  call.readout = {0.1, 1.0, 1.0};
  call.prediction = prediction.data();
  call.weights = weights.data();
  call.neighbors = neighbors.data();
  error_memory(call);
  for (std::int64_t b = 0; b < batch; ++b) {
    std::vector<std::int64_t> order(static_cast<std::size_t>(slots));
    std::vector<double> s(order.size());
    for (std::int64_t i = 0; i < slots; ++i) {
      order[static_cast<std::size_t>(i)] = (first + i) % slots;
      s[static_cast<std::size_t>(i)] = similarity(query.data() + b * dim, keys.data() + i * dim, dim);
    }
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t i, std::int64_t j) {
      return s[static_cast<std::size_t>(i)] > s[static_cast<std::size_t>(j)];
    });
    double sum = 0;
    for (std::int64_t i = 0; i < k; ++i) {
      CHECK(neighbors[static_cast<std::size_t>(b * k + i)] == order[static_cast<std::size_t>(i)]);
      sum += weights[static_cast<std::size_t>(b * k + i)];
    }
    CHECK_CLOSE(sum, 1.0, 1e-12, 0.0);
    CHECK_CLOSE(prediction[static_cast<std::size_t>(b)], 1.0, 1e-12, 0.0);
  }
}

}  // namespace

TEST(neighbors_are_those_of_a_full_sort) {
  at_every_level([] {
    for (const std::int64_t slots : {1, 31, 32, 33, 257, 1025}) {
      for (const std::int64_t k : {std::int64_t{1}, (slots + 1) / 2, slots}) check_neighbors(9, slots, 5, k, slots / 3);
    }
    check_neighbors(1, 20000, 8, 64, 0);
    check_neighbors(17, 700, 600, 3, 699);
  });
}

TEST(half_types_and_what_is_not_finite) {
  std::vector<float> query = {1.0f, 0.0f, std::numeric_limits<float>::quiet_NaN(), 1.0f};
  std::vector<BFloat16> keys;
  for (const float x : {1.0f, 0.0f, INFINITY, 0.0f, 0.5f, 0.5f, 0.0f, 0.0f}) keys.push_back({bfloat16_bits(x)});
  const std::vector<float> base = {0.25f, 0.75f}, labels = {1.0f, 1.0f, 0.0f, 1.0f};
  std::vector<float> prediction(2), weights(8);
  std::vector<std::int64_t> neighbors(8);
  MemoryCall call{};
  call.query = matrix(query, 2, 2);
  call.keys = matrix(keys, 4, 2);
  call.base_prediction = base.data();
  call.labels = call.base_predictions = labels.data();
  call.k = 4;
  call.readout = {1.0, 1.0, 1.0};
  call.prediction = prediction.data();
  call.weights = weights.data();
  call.neighbors = neighbors.data();
  at_every_level([&] {
    error_memory(call);
    CHECK((neighbors == std::vector<std::int64_t>{0, 2, 3, -1, -1, -1, -1, -1}));
    CHECK(weights[3] == 0.0f && prediction[1] == 0.75f);
    const double e = std::exp(std::sqrt(0.5) - 1.0), f = std::exp(-1.0);
    CHECK_CLOSE(static_cast<double>(prediction[0]), (1.0 + f) / (1.0 + e + f), 1e-6, 0.0);
  });
}

TEST(candidates_order_like_similarity_then_age) {
  const float s[] = {-1.0f, -0.5f, -1e-30f, 0.0f, 1e-30f, 0.5f, 1.0f};
  for (std::size_t i = 0; i < std::size(s); ++i) {
    const auto key = Candidate<float>::make(s[i], 12345);
    CHECK(Candidate<float>::similarity(key) == s[i] && Candidate<float>::index(key) == 12345);
    CHECK(Candidate<float>::make(s[i], 3) > Candidate<float>::make(s[i], 4));
    if (i > 0) CHECK(Candidate<float>::make(s[i], 9) > Candidate<float>::make(s[i - 1], 0));
  }
  CHECK(Candidate<float>::make(-0.0f, 3) == Candidate<float>::make(0.0f, 3));
  CHECK(Candidate<float>::index(Candidate<float>::make(0.0f, 2147483646)) == 2147483646);
}

TEST(buckets_and_sketch) {
  const std::int64_t rows = 19, dim = 11, repeats = 103, bits = 5, size = 32;
  std::mt19937 g(1);
  const std::vector<float> hidden = normal<float>(g, rows * dim), w = normal<float>(g, repeats * bits * dim);
  std::vector<std::int32_t> first, buckets(static_cast<std::size_t>(rows * repeats));
  at_every_level([&] {
    lsh_buckets({hidden.data(), w.data(), rows, dim, repeats, bits, buckets.data()});
    if (first.empty()) first = buckets;
    CHECK(first == buckets);
  });
  std::vector<std::int64_t> sketch(static_cast<std::size_t>(repeats * size * 3));
  const std::vector<double> y(static_cast<std::size_t>(rows), 1.0), yb(static_cast<std::size_t>(rows), 0.25);
  SketchReadCall call{};
  call.sketch = sketch.data();
  call.buckets = buckets.data();
  call.rows = rows;
  call.repeats = repeats;
  call.size = size;
  sketch_write(call, y.data(), yb.data());
  std::int64_t count = 0;
  for (std::size_t i = 0; i < sketch.size(); i += 3) {
    CHECK(sketch[i + 1] == sketch[i] << 32 && sketch[i + 2] == sketch[i] << 30);
    count += sketch[i];
  }
  CHECK(count == rows * repeats);
  std::vector<double> prediction(static_cast<std::size_t>(rows)), weights(buckets.size());
  call.base_prediction = yb.data();
  call.share = 1.0 / static_cast<double>(rows);
  call.readout = {0.1, 0.0, 0.5};
  call.prediction = prediction.data();
  call.weights = weights.data();
  sketch_read(call);
  for (const double p : prediction) CHECK_CLOSE(p, 0.25 + 0.5 * 0.75, 1e-12, 0.0);
  CHECK_CLOSE(std::accumulate(weights.begin(), weights.end(), 0.0), static_cast<double>(rows), 1e-12, 0.0);
}

TEST_MAIN
