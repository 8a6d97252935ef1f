// SPDX-License-Identifier: Apache-2.0
// The CUDA loops of segments without a GPU: kernels/core/segments.cuh on an emulated one, against the CPU loops.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "check.hpp"
#include "core/counting_sort.hpp"
#include "core/segments.hpp"
#include "emulated_gpu.hpp"
#include "kernels/core/segments.cuh"

using namespace hotloop;
using namespace hotloop::segments;

namespace {

using Random = std::mt19937_64;
std::int64_t up_to(Random& g, std::int64_t most) { return std::uniform_int_distribution<std::int64_t>(0, most)(g); }

struct Emulated {
  Random& random;
  template <class Body>
  void operator()(const Body& body) const {
    test::run_warps<std::uint64_t>(body, random, 4, Body::kScratch, 0xA5A5A5A5A5A5A5A5u);
  }
};

// Rising from 0 to n, with empty segments at both ends and, often, one that holds nearly all.
std::vector<std::int64_t> offsets_of(Random& g, std::int64_t n, std::int64_t count) {
  std::vector<std::int64_t> offsets{0};
  for (std::int64_t s = 1; s < count; ++s) offsets.push_back(up_to(g, 3) == 0 ? 0 : up_to(g, n));
  offsets.push_back(n);
  std::sort(offsets.begin(), offsets.end());
  return offsets;
}

template <class Storage>
void one_case(Random& g, Reduction reduction) {
  using R = typename Accumulate<Storage>::type;
  const std::int64_t sizes[] = {0, 1, 31, 32, 33, 900, 1024, 1025, 3000, 5000}, widths[] = {1, 2, 8, 9, 33, 40};
  const std::int64_t n = sizes[up_to(g, 9)], columns = widths[up_to(g, n > 2000 ? 2 : 5)], count = 1 + up_to(g, 12);
  const bool by_ids = up_to(g, 1) == 0, masked = up_to(g, 1) == 0, by_column = up_to(g, 3) == 0;
  const auto elements = static_cast<std::size_t>(n * columns), cells = static_cast<std::size_t>(count * columns);
  std::vector<Storage> values(elements);
  for (Storage& x : values) {
    const double special[] = {std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity(),
                              std::numeric_limits<double>::quiet_NaN()};
    const double x0 = up_to(g, 500) == 0 ? special[up_to(g, 2)] : static_cast<double>(up_to(g, 64) - 32) / 8.0;
    put(x, static_cast<R>(x0));
  }
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(n));
  for (auto& m : mask) m = up_to(g, 3) != 0;
  std::vector<std::int64_t> ids(static_cast<std::size_t>(n)), offsets = offsets_of(g, n, count);
  for (auto& id : ids) id = up_to(g, count - 1);

  ReduceCall call;
  call.reduction = reduction;
  call.values = {values.data(), DtypeOf<Storage>::value, n, columns, by_column ? 1 : columns, by_column ? n : 1};
  call.groups.count = count;
  call.groups.mask = masked && n > 0 ? mask.data() : nullptr;
  std::vector<R> out(cells), expected(cells);
  std::vector<std::int64_t> counts(static_cast<std::size_t>(count), -7), expected_counts(counts), rows(cells, -7),
      expected_rows(rows);
  const bool largest = reduction == Reduction::kMax || reduction == Reduction::kMin;

  ReduceCall cpu = call;
  std::int64_t nothing = 0;
  if (by_ids) {
    cpu.groups.ids = n > 0 ? ids.data() : &nothing;
  } else {
    cpu.groups.offsets = offsets.data();
  }
  cpu.out = expected.data();
  cpu.counts = reduction == Reduction::kMean ? expected_counts.data() : nullptr;
  cpu.rows = largest ? expected_rows.data() : nullptr;
  CHECK(segment_reduce(cpu));

  std::vector<std::int64_t> order(static_cast<std::size_t>(n)), runs(static_cast<std::size_t>(count) + 1);
  if (by_ids) {
    std::vector<std::int64_t> starts(static_cast<std::size_t>(256 * (cuda_tiles(n, kCudaSortTile) + 1)), -1);
    gpu::sort({ids.data(), Dtype::kInt64, n, count, order.data(), nullptr, runs.data(), nullptr, starts.data()},
              Emulated{g});
    call.order = order.data();
    call.groups.offsets = runs.data();
  } else {
    call.groups.offsets = offsets.data();
  }
  std::vector<Part> parts(static_cast<std::size_t>(2 * cuda_tiles(n, kCudaTile) * columns), Part{1e30, -1e30, 5});
  call.parts = parts.data();
  call.out = out.data();
  call.counts = reduction == Reduction::kMean ? counts.data() : nullptr;
  call.rows = largest ? rows.data() : nullptr;
  gpu::reduce(call, Emulated{g});
  const double close = sizeof(R) == 8 ? 1e-13 : 2e-6;
  for (std::size_t i = 0; i < cells; ++i) CHECK_CLOSE(out[i], expected[i], close, close);
  CHECK(counts == expected_counts);
  CHECK(rows == expected_rows);

  std::vector<R> grad(cells);
  for (R& x : grad) x = static_cast<R>(up_to(g, 16) - 8) / R(4);
  std::vector<Storage> slope(elements), expected_slope(elements);
  SpreadCall back;
  back.reduction = reduction;
  back.groups = cpu.groups;
  back.grad = grad.data();
  back.counts = reduction == Reduction::kMean ? expected_counts.data() : nullptr;
  back.rows = largest ? expected_rows.data() : nullptr;
  back.values = call.values;
  back.out = expected.data();
  back.result = expected_slope.data();
  segment_spread(back);
  back.result = slope.data();
  gpu::spread(back, Emulated{g});
  const double rounded = sizeof(Storage) == 2 ? 1e-2 : close;
  for (std::size_t i = 0; i < elements; ++i) {
    CHECK_CLOSE(to_float(slope[i]), to_float(expected_slope[i]), rounded, rounded);
  }
}

constexpr Reduction kAll[] = {Reduction::kSum, Reduction::kMean, Reduction::kMax, Reduction::kMin,
                              Reduction::kLogSumExp};

template <class Key>
void sort_case(Random& g, std::int64_t n, std::int64_t num_keys) {
  const auto size = static_cast<std::size_t>(n);
  std::vector<Key> keys(size);
  for (Key& k : keys)
    k = static_cast<Key>(up_to(g, up_to(g, 2) == 0 ? std::min<std::int64_t>(num_keys, 3) - 1 : num_keys - 1));
  const bool wanted = num_keys <= 100000;
  const auto bins = static_cast<std::size_t>(wanted ? num_keys : 0);
  std::vector<std::int64_t> order(size, -1), expected(size), other(size, -1), counts(bins, -1), expected_counts(bins),
      offsets(bins + 1, -1), expected_offsets(bins + 1);
  std::vector<std::int64_t> starts(static_cast<std::size_t>(256 * (cuda_tiles(n, kCudaSortTile) + 1)), -1);
  CHECK(counting_sort(keys.data(), DtypeOf<Key>::value, n, num_keys, expected.data(),
                      wanted ? expected_counts.data() : nullptr, wanted ? expected_offsets.data() : nullptr) == -1);
  gpu::sort({keys.data(), DtypeOf<Key>::value, n, num_keys, order.data(), wanted ? counts.data() : nullptr,
             wanted ? offsets.data() : nullptr, other.data(), starts.data()},
            Emulated{g});
  CHECK(order == expected);
  if (!wanted) return;
  CHECK(counts == expected_counts);
  CHECK(offsets == expected_offsets);
}

}  // namespace

TEST(reductions_and_gradients) {
  Random g(1);
  for (int i = 0; i < 12; ++i) {
    for (Reduction reduction : kAll) {
      one_case<float>(g, reduction);
      one_case<double>(g, reduction);
      one_case<BFloat16>(g, reduction);
      one_case<Float16>(g, reduction);
    }
  }
}

TEST(sorts) {
  Random g(2);
  for (std::int64_t n : {0, 1, 31, 33, 1024, 1025, 3000}) {
    for (std::int64_t num_keys : {1, 5, 256, 257, 65536, 70000}) {
      sort_case<std::int64_t>(g, n, num_keys);
      sort_case<std::int32_t>(g, n, num_keys);
    }
    sort_case<std::int64_t>(g, n, std::int64_t{1} << 45);
  }
}

TEST(the_cpu_refuses_what_points_outside) {
  const std::int64_t falling[] = {0, 2, 1, 3}, late[] = {1, 3}, negative[] = {0, -1, 0};
  const float x[] = {1, 2, 3};
  float out[3];
  ReduceCall call;
  call.values = {x, Dtype::kFloat32, 3, 1, 1, 1};
  call.out = out;
  call.groups.count = 3;
  call.groups.offsets = falling;
  CHECK(!segment_reduce(call));
  call.groups.count = 1;
  call.groups.offsets = late;
  CHECK(!segment_reduce(call));
  call.groups.offsets = nullptr;
  call.groups.ids = negative;
  CHECK(!segment_reduce(call));
  std::int64_t order[3];
  CHECK(counting_sort(negative, Dtype::kInt64, 3, 4, order, nullptr, nullptr) == 1);
}

TEST_MAIN
