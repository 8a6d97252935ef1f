// SPDX-License-Identifier: Apache-2.0
// Unlearning losses of one sequence, one struct per formula (core/head.hpp), and the list of them.
#pragma once

#include "core/formulas.hpp"
#include "core/head.hpp"

namespace hotloop::unlearn {

// (2 / beta) softplus(beta (l - r) / n + gamma): NPO with n = 1 and gamma = 0, SimNPO with r = 0.
struct Npo : pointwise::Head<1, 2, 2> {  // d: l; c: r, n; p: beta, gamma
  HOTLOOP_HEAD("npo") { return vsoftplus((d[0] - c[0]) / count(c[1]) * p[0] + p[1]) * (R(2) / p[0]); }
};

using Heads = pointwise::HeadList<Npo>;

}  // namespace hotloop::unlearn
