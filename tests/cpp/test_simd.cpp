// SPDX-License-Identifier: Apache-2.0
#include "core/simd.hpp"

#include "check.hpp"
#include "core/vmath_kernels.hpp"

using namespace hotloop;

TEST(the_forced_level_is_the_one_that_runs) {
  test::at_every_level([] {
    float x = 0.0f, y = 0.0f;
    map_function(MathFunction::kExp, &x, &y, 1);
    CHECK(last_simd_level == static_cast<int>(simd_level()) && y == 1.0f);
  });
  force_simd_level("baseline");
  CHECK(simd_level() == SimdLevel::kBaseline);
  force_simd_level("auto");
  CHECK(simd_level_runnable(best_simd_level()));
  CHECK(simd_level_compiled(SimdLevel::kBaseline));
}

TEST(an_unknown_level_is_refused) {
  CHECK(test::error_of([] { force_simd_level("sse9"); }) ==
        "[simd] level: expected auto, baseline, avx2 or avx512, got sse9.");
}

TEST_MAIN
