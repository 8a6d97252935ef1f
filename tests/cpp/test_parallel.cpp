// SPDX-License-Identifier: Apache-2.0
#include "core/parallel.hpp"

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "check.hpp"

using namespace hotloop;

namespace {

struct Threads {
  explicit Threads(int count) : before(omp_get_max_threads()) { omp_set_num_threads(count); }
  ~Threads() { omp_set_num_threads(before); }
  int before;
};

}  // namespace

TEST(covers_the_range_once) {
  for (int threads : {1, 2, 3}) {
    const Threads set(threads);
    for (std::int64_t n : {0, 1, 2, 7, 100, 10007}) {
      for (std::int64_t grain : {1, 10, 1000000}) {
        std::vector<std::atomic<int>> seen(static_cast<std::size_t>(n));
        std::atomic<int> calls{0};
        parallel_for(n, grain, [&](std::int64_t begin, std::int64_t end) {
          ++calls;
          CHECK(begin < end);
          for (std::int64_t i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
        });
        for (const auto& count : seen) CHECK(count == 1);
        CHECK(calls <= threads);
        CHECK((calls == 0) == (n == 0));
        if (grain >= n && n > 0) CHECK(calls == 1);
      }
    }
  }
}

TEST(an_exception_reaches_the_caller) {
  for (int threads : {1, 3}) {
    const Threads set(threads);
    const auto fails_at_the_end = [](std::int64_t, std::int64_t end) {
      if (end == 100) throw std::runtime_error("from inside");
    };
    CHECK(test::error_of([&] { parallel_for(100, 1, fails_at_the_end); }) == "from inside");
    std::atomic<std::int64_t> sum{0};
    parallel_for(100, 1, [&](std::int64_t begin, std::int64_t end) { sum += end - begin; });
    CHECK(sum == 100);
  }
}

TEST(a_loop_inside_a_loop_has_one_thread) {
  const Threads set(2);
  CHECK(max_threads() == 2);
  std::atomic<int> inner{0}, outer{0};
  parallel_for(2, 1, [&](std::int64_t, std::int64_t) {
    ++outer;
    parallel_for(100, 1, [&](std::int64_t begin, std::int64_t end) { inner += begin == 0 && end == 100 ? 1 : 100; });
  });
  CHECK(inner == outer);
}

TEST(the_split_depends_on_nothing_but_size_and_threads) {
  const Threads set(3);
  std::vector<std::vector<std::int64_t>> starts(2);
  for (auto& found : starts) {
    std::vector<std::int64_t> end_of(101, -1);
    parallel_for(100, 1, [&](std::int64_t begin, std::int64_t end) { end_of[static_cast<std::size_t>(begin)] = end; });
    found = end_of;
  }
  CHECK(starts[0] == starts[1]);
}

TEST_MAIN
