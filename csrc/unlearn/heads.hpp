// Unlearning losses of one sequence. Same form as preference/heads.hpp, and run by the same loop.
#pragma once

#include "preference/heads.hpp"

namespace hotloop::unlearn {

// (2 / beta) softplus(beta (l - r) / n + gamma): NPO with n = 1 and gamma = 0, SimNPO with r = 0.
struct Npo : preference::Head<1, 2, 2> {  // d: l; c: r, n; p: beta, gamma
  static constexpr const char* kName = "npo";
  template <class T, class R = Real<T>>
  static HOTLOOP_INLINE T loss(const T* d, const R* c, const R* p) {
    return vsoftplus((d[0] - c[0]) / preference::count(c[1]) * p[0] + p[1]) * (R(2) / p[0]);
  }
};

}  // namespace hotloop::unlearn
