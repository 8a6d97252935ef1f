// The body of <room>/heads.simd.cpp: instantiates the heads of a room for one instruction set. Included after
// core/simd_begin.hpp, inside the namespace of the instruction set, whose target must be in force.
#ifndef HOTLOOP_SIMD_NAMESPACE
#error "include core/simd_begin.hpp before core/room_heads.hpp"
#endif

namespace {

// Every column is a dense array of R.
template <class H, class R>
void run_block(const R* const* in, const R* params, R scale, R* loss, R* const* grad, R* const* out) {
  // Not `omp simd`: that would give every lane its own copy of the inputs in memory, and nothing vectorises.
#pragma GCC ivdep
  for (std::int64_t i = 0; i < pointwise::kBlock; ++i) {
    R x[H::kInputs > 0 ? H::kInputs : 1];
    R g[H::kGrad > 0 ? H::kGrad : 1];
    R o[H::kOut > 0 ? H::kOut : 1];
    HOTLOOP_UNROLL
    for (int k = 0; k < H::kInputs; ++k) x[k] = in[k][i];
    pointwise::evaluate<H>(x, params, &loss[i], g, o);
    HOTLOOP_UNROLL
    for (int k = 0; k < H::kGrad; ++k) grad[k][i] = g[k] * scale;
    HOTLOOP_UNROLL
    for (int k = 0; k < H::kOut; ++k) out[k][i] = o[k];
  }
}

template <class... Heads>
std::span<const pointwise::Entry> entries(pointwise::HeadList<Heads...>) {
  static const pointwise::Entry table[] = {
      {pointwise::kInfo<Heads>, run_block<Heads, float>, run_block<Heads, double>}...};
  return table;
}

}  // namespace

// `hotloop::<room>::Heads` is the room's list.
#define HOTLOOP_ROOM_HEADS(room) \
  std::span<const pointwise::Entry> room##_heads() { return entries(::hotloop::room::Heads{}); }
