// SPDX-License-Identifier: Apache-2.0
// Run-time choice of the instruction set.
//
// Each *.simd.cpp is compiled once per level into its own namespace (see simd_begin.hpp); `dispatch`
// calls the copy for the level in force. The level is the widest one this CPU runs, unless
// HOTLOOP_SIMD or `force_simd_level` names a narrower one. Every kernel copy reports the level it was
// compiled for, so that a test can see that the forced level is the one that ran.
#pragma once

#include <atomic>
#include <string>

namespace hotloop {

enum class SimdLevel : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

SimdLevel best_simd_level();                     // widest level both compiled in and runnable here
SimdLevel simd_level();                          // level in force
void force_simd_level(const std::string& name);  // "auto", "baseline", "avx2", "avx512"; throws std::invalid_argument
const char* simd_level_name(SimdLevel level);
bool simd_level_compiled(SimdLevel level);
bool simd_level_runnable(SimdLevel level);

extern std::atomic<int> last_simd_level;  // level of the kernel copy that ran last, -1 before the first

}  // namespace hotloop

#if !defined(__x86_64__)
#define HOTLOOP_IF_AVX2(...)
#define HOTLOOP_IF_AVX512(...)
#elif defined(HOTLOOP_SIMD_NO_AVX512)  // the build under sanitizers: one level less to compile, from the same source
#define HOTLOOP_IF_AVX2(...) __VA_ARGS__
#define HOTLOOP_IF_AVX512(...)
#else
#define HOTLOOP_IF_AVX2(...) __VA_ARGS__
#define HOTLOOP_IF_AVX512(...) __VA_ARGS__
#endif

// Declares, once per level, the functions that a *.simd.cpp defines.
#define HOTLOOP_FOR_EACH_SIMD(declaration)                   \
  namespace hotloop::simd_baseline {                         \
  declaration                                                \
  }                                                          \
  HOTLOOP_IF_AVX2(namespace hotloop::simd_avx2{declaration}) \
  HOTLOOP_IF_AVX512(namespace hotloop::simd_avx512{declaration})
#define HOTLOOP_SIMD_DISPATCH(call)                                                              \
  switch (::hotloop::simd_level()) {                                                             \
    HOTLOOP_IF_AVX512(case ::hotloop::SimdLevel::kAvx512 : return ::hotloop::simd_avx512::call;) \
    HOTLOOP_IF_AVX2(case ::hotloop::SimdLevel::kAvx2 : return ::hotloop::simd_avx2::call;)       \
    default:                                                                                     \
      return ::hotloop::simd_baseline::call;                                                     \
  }

// A function that a *.simd.cpp defines, and hotloop::<room>::<name>, which calls its copy for the level in force. Types
// are named as from namespace hotloop.
#define HOTLOOP_SIMD_FUNCTION(room, result, name, parameters, arguments)  \
  HOTLOOP_FOR_EACH_SIMD(result name parameters;)                          \
  namespace hotloop::room {                                               \
  inline result name parameters { HOTLOOP_SIMD_DISPATCH(name arguments) } \
  }
