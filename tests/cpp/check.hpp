// A test is a function; CHECK counts what does not hold and says where. main returns how many.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>

namespace hotloop::test {

inline int failures = 0;
inline int checks = 0;

inline void check(bool holds, const char* what, const char* file, int line, const std::string& more = "") {
  ++checks;
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "%s:%d: does not hold: %s %s\n", file, line, what, more.c_str());
}

inline bool close(double a, double b, double relative, double absolute = 0.0) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (a == b) return true;
  return std::fabs(a - b) <= absolute + relative * std::fabs(b);
}

inline int finish(const char* name) {
  std::printf("%s: %d checks, %d failed\n", name, checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace hotloop::test

#define CHECK(condition) ::hotloop::test::check((condition), #condition, __FILE__, __LINE__)
#define CHECK_CLOSE(a, b, relative, absolute)                                                          \
  ::hotloop::test::check(::hotloop::test::close((a), (b), (relative), (absolute)), #a " ~ " #b, __FILE__, __LINE__, \
                         std::to_string(a) + " against " + std::to_string(b))
