// Every head that the pair loops are built for, on the CPU and on the GPU alike. One line per head.
#pragma once

#include "preference/heads.hpp"
#include "unlearn/heads.hpp"

namespace hotloop::preference {

template <class... Heads>
struct HeadList {
  static constexpr int kSize = sizeof...(Heads);
};

using PairHeads =
    HeadList<Dpo, SoftLabelDpo, RobustDpo, NormDpo, FlexDpo, ConditionalDpo, ForwardKlDpo, JensenShannonDpo, AlphaDpo,
             DpoPlusLinear, Modpo, ModpoHinge, Ipo, IpoPlusLinear, Inpo, Sppo, SppoHard, Srpo, SlicHinge, ExoPair,
             ApoZero, ApoDown, NcaPair, Kto, Bco, Orpo, Cpo, AlphaPo, SimPo, Cpl, OpaDpo, unlearn::Npo>;

inline constexpr int kMaxHeadInputs = 12;
inline constexpr int kMaxHeadParams = 8;

struct HeadInfo {
  const char* name;
  int grads;
  int constants;
  int params;
};

template <class... Heads>
const HeadInfo* head_table(HeadList<Heads...>) {
  static_assert(((Heads::kGrad + Heads::kConst <= kMaxHeadInputs && Heads::kParams <= kMaxHeadParams) && ...));
  static constexpr HeadInfo table[] = {{Heads::kName, Heads::kGrad, Heads::kConst, Heads::kParams}...};
  return table;
}

}  // namespace hotloop::preference
