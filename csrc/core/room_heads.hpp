// SPDX-License-Identifier: Apache-2.0
// The end of the file that CMake writes for a room, which includes "<room>/heads.hpp" and defines HOTLOOP_ROOM as the
// room's name: instantiates the list `hotloop::<room>::Heads` for one instruction set.
#include <atomic>
#include <cstdint>
#include <span>

#include "core/pointwise.hpp"

#include "core/simd_begin.hpp"

namespace {

// Every column is a dense array of R. Stands after simd_begin.hpp: the target of the instruction set must be in force.
template <class H, class R>
void run_block(const R* const* in, const R* params, std::int64_t blocks, R scale, R* loss, R* const* grad,
               R* const* out) {
  // Of the function's own, so that a store to the loss cannot change them and they stay in registers.
  R p[H::kCall > 0 ? H::kCall : 1];
  for (int k = 0; k < H::kCall; ++k) p[k] = params[k];
  // Not `omp simd`: that would give every lane its own copy of the inputs in memory, and nothing vectorises.
  for (std::int64_t first = 0; first < blocks * pointwise::kBlock; first += pointwise::kBlock) {
#pragma GCC ivdep
    for (std::int64_t i = first; i < first + pointwise::kBlock; ++i) {
      R x[H::kInputs > 0 ? H::kInputs : 1];
      R g[H::kGrad > 0 ? H::kGrad : 1];
      R o[H::kOut > 0 ? H::kOut : 1];
      HOTLOOP_UNROLL
      for (int k = 0; k < H::kInputs; ++k) x[k] = in[k][i];
      pointwise::evaluate<H>(x, p, &loss[i], g, o);
      HOTLOOP_UNROLL
      for (int k = 0; k < H::kGrad; ++k) grad[k][i] = g[k] * scale;
      HOTLOOP_UNROLL
      for (int k = 0; k < H::kOut; ++k) out[k][i] = o[k];
    }
  }
}

template <class... Heads>
std::span<const pointwise::Entry> entries(pointwise::HeadList<Heads...>) {
  static const pointwise::Entry table[] = {
      {pointwise::kInfo<Heads>, run_block<Heads, float>, run_block<Heads, double>}...};
  return table;
}

}  // namespace

#define HOTLOOP_HEADS_OF(room) \
  std::span<const pointwise::Entry> room##_heads() { return entries(::hotloop::room::Heads{}); }
#define HOTLOOP_HEADS_OF_ROOM(room) HOTLOOP_HEADS_OF(room)
HOTLOOP_HEADS_OF_ROOM(HOTLOOP_ROOM)

#include "core/simd_end.hpp"
