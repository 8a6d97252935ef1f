#include "core/simd.hpp"

#include <stdexcept>
#include <string>

#include "check.hpp"
#include "core/vmath_kernels.hpp"

using namespace hotloop;

TEST(the_forced_level_is_the_one_that_runs) {
  for (SimdLevel level : {SimdLevel::kBaseline, SimdLevel::kAvx2, SimdLevel::kAvx512}) {
    if (!simd_level_runnable(level)) continue;
    force_simd_level(simd_level_name(level));
    CHECK(simd_level() == level);
    float x = 0.0f, y = 0.0f;
    map_function(MathFunction::kExp, &x, &y, 1);
    CHECK(last_simd_level == static_cast<int>(level) && y == 1.0f);
  }
  force_simd_level("auto");
  CHECK(simd_level_runnable(best_simd_level()));
  CHECK(simd_level_compiled(SimdLevel::kBaseline));
}

TEST(an_unknown_level_is_refused) {
  std::string text;
  try {
    force_simd_level("sse9");
  } catch (const std::invalid_argument& error) {
    text = error.what();
  }
  CHECK(text == "[simd] level: expected auto, baseline, avx2 or avx512, got sse9.");
}

TEST_MAIN
