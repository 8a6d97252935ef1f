// SPDX-License-Identifier: Apache-2.0
// A test is a function, written TEST(name) { ... } and run by TEST_MAIN; CHECK counts what does not hold and
// says where.
#pragma once

#include <cmath>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "core/simd.hpp"
#include "core/view.hpp"

namespace hotloop::test {

inline int failures = 0;
inline int checks = 0;

inline void check(bool holds, const char* what, const char* file, int line, const std::string& more = "") {
  ++checks;
  if (holds) return;
  if (++failures > 20) return;  // a loop over 65536 patterns that all fail should not print them all
  std::fprintf(stderr, "%s:%d: does not hold: %s %s\n", file, line, what, more.c_str());
}

inline bool close(double a, double b, double relative, double absolute = 0.0) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (a == b) return true;
  return std::fabs(a - b) <= absolute + relative * std::fabs(b);
}

inline std::string text(double x) {  // std::to_string shows 1e-9 as 0.000000
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.9g", x);
  return buffer;
}

// What f throws, as text; "" if nothing.
template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// Calls f with each instruction set in force that runs here.
template <class F>
void at_every_level(F&& f) {
  for (const SimdLevel level : {SimdLevel::kBaseline, SimdLevel::kAvx2, SimdLevel::kAvx512}) {
    if (!simd_level_runnable(level)) continue;
    force_simd_level(simd_level_name(level));
    f();
  }
  force_simd_level("auto");
}

// Rows of `data`, `row_stride` elements apart.
template <class T>
View matrix(T* data, std::int64_t rows, std::int64_t cols, std::int64_t row_stride) {
  View view;
  view.data = const_cast<std::remove_const_t<T>*>(data);
  view.dtype = DtypeOf<std::remove_const_t<T>>::value;
  view.rank = 2;
  view.shape = {rows, cols};
  view.stride = {row_stride, 1};
  return view;
}

inline int finish(const char* name) {
  std::printf("%s: %d checks, %d failed\n", name, checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

struct Case {
  const char* name;
  void (*run)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
inline int run(const char* file) {
  for (const Case& c : cases()) {
    const int before = failures;
    c.run();
    if (failures != before) std::fprintf(stderr, "FAILED %s: %s\n", file, c.name);
  }
  return finish(file);
}

}  // namespace hotloop::test

#define TEST(name)                                                                                        \
  static void name();                                                                                     \
  [[maybe_unused]] static const auto& name##_added = ::hotloop::test::cases().emplace_back(#name, &name); \
  static void name()
#define TEST_MAIN \
  int main() { return ::hotloop::test::run(__FILE__); }

#define CHECK(condition) ::hotloop::test::check((condition), #condition, __FILE__, __LINE__)
#define CHECK_CLOSE(a, b, relative, absolute)                                                                      \
  ::hotloop::test::check(                                                                                          \
      ::hotloop::test::close(static_cast<double>(a), static_cast<double>(b), (relative), (absolute)), #a " ~ " #b, \
      __FILE__, __LINE__,                                                                                          \
      ::hotloop::test::text(static_cast<double>(a)) + " against " + ::hotloop::test::text(static_cast<double>(b)))
