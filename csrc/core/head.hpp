// SPDX-License-Identifier: Apache-2.0
// A head: one formula of the pointwise loop. A room lists its heads in <room>/heads.hpp; the loops on CPU and GPU
// instantiate the list.
//
// A head reads per row the inputs it is differentiated by (`d`), its constants of the row followed by its constants of
// the row's group (`c`), and the numbers of the call (`p`). T is a plain number or a dual number; R is the number under
// it. It returns the loss of the row and may set `out`, values without a gradient that are reduced over the rows.
#pragma once

#include "core/dual.hpp"
#include "core/macros.hpp"

namespace hotloop::pointwise {

inline constexpr int kMaxInputs = 12;  // differentiable and constant columns together
inline constexpr int kMaxParams = 8;
inline constexpr int kMaxOuts = 8;

template <int Grad, int Row, int Call, int Group = 0, int Out = 0>
struct Head {
  static constexpr int kGrad = Grad;
  static constexpr int kRow = Row;
  static constexpr int kGroup = Group;
  static constexpr int kCall = Call;
  static constexpr int kOut = Out;
  static constexpr int kInputs = Grad + Row + Group;
  static_assert(kInputs <= kMaxInputs && Call <= kMaxParams && Out <= kMaxOuts);
};

// Followed by the body of the formula in braces.
#define HOTLOOP_HEAD(head_name)                                                                                       \
  static constexpr const char* kName = head_name;                                                                     \
  template <class T, class R = Real<T>>                                                                               \
  static HOTLOOP_INLINE T loss([[maybe_unused]] const T* d, [[maybe_unused]] const R* c, [[maybe_unused]] const R* p, \
                               [[maybe_unused]] R* out)

template <class... Heads>
struct HeadList {
  static constexpr int kSize = sizeof...(Heads);
};

// What the callers of a loop need to know of a head.
struct HeadInfo {
  const char* name;
  int grads;
  int rows;
  int groups;
  int params;
  int outs;
};

template <class H>
inline constexpr HeadInfo kInfo{H::kName, H::kGrad, H::kRow, H::kGroup, H::kCall, H::kOut};

// The formula at one row: the value in `loss`, its derivatives in `grad`. `in` holds the columns in the order of
// HeadInfo. A head without differentiable inputs runs on plain numbers.
template <class H, class R>
HOTLOOP_INLINE void evaluate(const R* in, const R* params, R* loss, R* grad, R* out) {
  const R* c = in + H::kGrad;
  if constexpr (H::kGrad == 0) {
    *loss = H::template loss<R>(in, c, params, out);
  } else {
    using T = Dual<R, H::kGrad>;
    T d[H::kGrad];
    HOTLOOP_UNROLL
    for (int k = 0; k < H::kGrad; ++k) d[k] = T::variable(in[k], k);
    const T y = H::template loss<T>(d, c, params, out);
    *loss = y.value;
    HOTLOOP_UNROLL
    for (int k = 0; k < H::kGrad; ++k) grad[k] = y.d[k];
  }
}

}  // namespace hotloop::pointwise
