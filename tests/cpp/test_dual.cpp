// SPDX-License-Identifier: Apache-2.0
#include "core/dual.hpp"

#include <cstddef>
#include <limits>

#include "check.hpp"
#include "core/vmath.hpp"

using namespace hotloop;

namespace {

using D = Dual<double, 2>;

// f(x, y) as a value, and as value and gradient at once: against central differences.
template <class F>
void check_gradient(F f, double x, double y) {
  const D z = f(D::variable(x, 0), D::variable(y, 1));
  CHECK_CLOSE(z.value, f(x, y), 1e-15, 1e-300);
  const double h = 1e-5;
  CHECK_CLOSE(z.d[0], (f(x + h, y) - f(x - h, y)) / (2 * h), 1e-8, 1e-9);
  CHECK_CLOSE(z.d[1], (f(x, y + h) - f(x, y - h)) / (2 * h), 1e-8, 1e-9);
  using S = Dual<float, 2>;
  const S narrow = f(S::variable(static_cast<float>(x), 0), S::variable(static_cast<float>(y), 1));
  const D exact = f(D::variable(static_cast<float>(x), 0), D::variable(static_cast<float>(y), 1));
  CHECK_CLOSE(narrow.value, exact.value, 2e-6, 2e-6);
  for (int i = 0; i < 2; ++i) CHECK_CLOSE(narrow.d[i], exact.d[i], 2e-5, 2e-6);
}

template <class F>
void check_everywhere(F f) {
  for (double x : {-1.7, -0.4, 0.3, 2.1}) {
    for (double y : {0.2, 0.9, 3.3}) check_gradient(f, x, y);
  }
}

}  // namespace

TEST(arithmetic) {
  check_everywhere([](auto x, auto y) { return x + y; });
  check_everywhere([](auto x, auto y) { return x - y; });
  check_everywhere([](auto x, auto y) { return x * y; });
  check_everywhere([](auto x, auto y) { return x / y; });
  check_everywhere([](auto x, auto y) { return -(x * y) * x + y / (y + x * x); });
}

TEST(mixed_with_constants) {
  check_everywhere([](auto x, auto y) {
    using R = Real<decltype(x)>;
    return (x + R(2)) * (R(3) - y) / R(4) - (R(0.5) + x) * R(0.25) + (y - R(1)) * R(2) + R(3) * x;
  });
}

TEST(functions) {
  check_everywhere([](auto x, auto y) { return vexp(x * y); });
  check_everywhere([](auto x, auto y) { return vexpm1(x) * y; });
  check_everywhere([](auto x, auto y) { return vlog(y) * x; });
  check_everywhere([](auto x, auto y) { return vsigmoid(x * y) + vsigmoid(-x); });
  check_everywhere([](auto x, auto y) { return vsoftplus(x * y) - vsoftplus(-y); });
  check_everywhere([](auto x, auto y) { return vlog1mexp(-y) * x; });
}

TEST(log1mexp_on_both_branches) {
  for (double a : {-1e-6, -0.1, -0.69, -0.7, -5.0, -30.0}) {
    const Dual<double, 1> y = vlog1mexp(Dual<double, 1>::variable(a, 0));
    const long double exact = -std::exp(static_cast<long double>(a)) / -std::expm1(static_cast<long double>(a));
    CHECK_CLOSE(y.d[0], static_cast<double>(exact), 1e-9, 0.0);
  }
}

TEST(select_takes_value_and_gradient_of_one_side) {
  const D x = D::variable(3.0, 0), y = D::variable(5.0, 1);
  const D a = select(true, x, y), b = select(false, x, y);
  CHECK(a.value == 3.0 && a.d[0] == 1.0 && a.d[1] == 0.0);
  CHECK(b.value == 5.0 && b.d[0] == 0.0 && b.d[1] == 1.0);
  const D not_a_number(std::numeric_limits<double>::quiet_NaN());
  CHECK(select(true, x, not_a_number).value == 3.0);
}

TEST(relu_has_subgradient_zero_at_zero) {
  for (double v : {-1.0, 0.0, 2.0}) {
    const D y = vrelu(D::variable(v, 0));
    CHECK(y.value == (v > 0 ? v : 0.0));
    CHECK(y.d[0] == (v > 0 ? 1.0 : 0.0));
  }
}

TEST(extremes_have_finite_gradients) {
  for (float v : {-1e30f, -200.0f, 200.0f, 1e30f}) {
    const Dual<float, 1> s = vsoftplus(Dual<float, 1>::variable(v, 0));
    CHECK(s.d[0] == (v > 0 ? 1.0f : 0.0f));
    CHECK(s.value == (v > 0 ? v : 0.0f));
    const Dual<float, 1> g = vsigmoid(Dual<float, 1>::variable(v, 0));
    CHECK(g.d[0] == 0.0f);
  }
}

TEST_MAIN
