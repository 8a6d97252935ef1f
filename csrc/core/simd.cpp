// SPDX-License-Identifier: Apache-2.0
#include "core/simd.hpp"

#include <cstdlib>
#include <stdexcept>

namespace hotloop {

std::atomic<int> last_simd_level{-1};

namespace {

constexpr int kCompiled[] = {HOTLOOP_SIMD_LEVELS};
constexpr SimdLevel kAll[] = {SimdLevel::kBaseline, SimdLevel::kAvx2, SimdLevel::kAvx512};

SimdLevel level_from_environment();

// -1: follow HOTLOOP_SIMD (read once) or the CPU.
std::atomic<int> forced{-1};

SimdLevel parse(const std::string& name) {
  for (SimdLevel level : kAll) {
    if (name == simd_level_name(level)) {
      if (!simd_level_runnable(level)) {
        throw std::invalid_argument("[simd] level: expected one that is compiled in and runs on this CPU, got " + name +
                                    ". `python -m hotloop info` lists them.");
      }
      return level;
    }
  }
  throw std::invalid_argument("[simd] level: expected auto, baseline, avx2 or avx512, got " + name + ".");
}

SimdLevel level_from_environment() {
  const char* name = std::getenv("HOTLOOP_SIMD");
  if (name == nullptr || *name == '\0' || std::string(name) == "auto") return best_simd_level();
  return parse(name);
}

}  // namespace

const char* simd_level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::kAvx512:
      return "avx512";
    case SimdLevel::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

bool simd_level_compiled(SimdLevel level) {
  for (int compiled : kCompiled) {
    if (compiled == static_cast<int>(level)) return true;
  }
  return false;
}

bool simd_level_runnable(SimdLevel level) {
  if (!simd_level_compiled(level)) return false;
  if (level == SimdLevel::kBaseline) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (level == SimdLevel::kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
#else
  return false;
#endif
}

SimdLevel best_simd_level() {
  if (simd_level_runnable(SimdLevel::kAvx512)) return SimdLevel::kAvx512;
  if (simd_level_runnable(SimdLevel::kAvx2)) return SimdLevel::kAvx2;
  return SimdLevel::kBaseline;
}

SimdLevel simd_level() {
  const int level = forced.load(std::memory_order_relaxed);
  if (level >= 0) return static_cast<SimdLevel>(level);
  static const SimdLevel from_environment = level_from_environment();
  return from_environment;
}

void force_simd_level(const std::string& name) {
  forced.store(name == "auto" ? -1 : static_cast<int>(parse(name)), std::memory_order_relaxed);
}

}  // namespace hotloop
