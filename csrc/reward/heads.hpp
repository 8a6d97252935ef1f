// SPDX-License-Identifier: Apache-2.0
// Losses of reward models, one struct per formula (core/head.hpp), and the list of them.
#pragma once

#include "core/formulas.hpp"
#include "core/head.hpp"

namespace hotloop::reward {

struct BtReward : pointwise::Head<2, 2, 1> {  // d: scores of the chosen and the rejected answer; c: margin, weight
  HOTLOOP_HEAD("bt_reward") { return vsoftplus(-(d[0] - d[1] - c[0])) * c[1] + square(d[0] + d[1]) * p[0]; }
};

using Heads = pointwise::HeadList<BtReward>;

}  // namespace hotloop::reward
