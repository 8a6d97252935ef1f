// CPU pair loop. Rows are taken in blocks that stay in L1: inputs of another type or stride are converted
// first, the head runs over the block as one SIMD loop on dual numbers, and what the caller wants in
// another type or stride is converted back. Bytes per pair for DPO in float32: 16 read, 8 (gradients) or 12 (and
// losses) written.
#include "preference/pair.hpp"

#include <atomic>
#include <cstdint>
#include <vector>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "preference/head_list.hpp"

#include "core/simd_begin.hpp"

namespace {

using namespace hotloop::preference;

// 256 rows x at most 24 float columns = 24 KiB: the block stays in a 32 KiB L1.
constexpr std::int64_t kBlock = 256;
// A block of DPO takes about 1 us; below sixteen blocks a second thread costs more than it brings.
constexpr std::int64_t kGrainBlocks = 16;

template <class Storage, class R>
void load(const InputColumn& column, std::int64_t first, std::int64_t count, R* out) {
  const Storage* x = static_cast<const Storage*>(column.data) + first * column.stride;
  if (column.stride == 1) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<R>(to_float(x[i]));
  } else {
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<R>(to_float(x[i * column.stride]));
  }
}

template <class R>
void load_any(const InputColumn& column, std::int64_t first, std::int64_t count, R* out) {
  switch (column.dtype) {
    case Dtype::kFloat64:
      return load<double>(column, first, count, out);
    case Dtype::kFloat16:
      return load<Float16>(column, first, count, out);
    case Dtype::kBFloat16:
      return load<BFloat16>(column, first, count, out);
    default:
      return load<float>(column, first, count, out);
  }
}

template <class Storage, class R>
void store(const OutputColumn& column, std::int64_t first, std::int64_t count, const R* x) {
  using A = typename Accumulate<Storage>::type;
  Storage* out = static_cast<Storage*>(column.data) + first * column.stride;
  if (column.stride == 1) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) put(out[i], static_cast<A>(x[i]));
  } else {
    for (std::int64_t i = 0; i < count; ++i) put(out[i * column.stride], static_cast<A>(x[i]));
  }
}

template <class R>
void store_any(const OutputColumn& column, std::int64_t first, std::int64_t count, const R* x) {
  switch (column.dtype) {
    case Dtype::kFloat64:
      return store<double>(column, first, count, x);
    case Dtype::kFloat16:
      return store<Float16>(column, first, count, x);
    case Dtype::kBFloat16:
      return store<BFloat16>(column, first, count, x);
    default:
      return store<float>(column, first, count, x);
  }
}

// Sum in a fixed order: sixteen interleaved partial sums, so that the additions do not wait for each other.
template <class R>
double sum_in_lanes(const R* x, std::int64_t count) {
  double lane[16] = {};
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (std::int64_t k = 0; k < 16; ++k) lane[k] += static_cast<double>(x[i + k]);
  }
  double total = 0.0;
  for (; i < count; ++i) total += static_cast<double>(x[i]);
  for (double part : lane) total += part;
  return total;
}

// One block. Every column is a dense array of R, a row of the caller's memory where that is what it is.
template <class Head, class R>
void run_block(const R* const* in, const R* params, R scale, R* loss, R* const* grad) {
  constexpr int kGrad = Head::kGrad;
  constexpr int kConst = Head::kConst;
  using T = Dual<R, kGrad>;
  // Not `omp simd`: that would give every lane its own copy of d and c in memory, and nothing vectorises.
#pragma GCC ivdep
  for (std::int64_t i = 0; i < kBlock; ++i) {
    T d[kGrad];
    R c[kConst > 0 ? kConst : 1];
    HOTLOOP_UNROLL
    for (int k = 0; k < kGrad; ++k) d[k] = T::variable(in[k][i], k);
    HOTLOOP_UNROLL
    for (int k = 0; k < kConst; ++k) c[k] = in[kGrad + k][i];
    const T y = Head::loss(d, c, params);
    loss[i] = y.value;
    HOTLOOP_UNROLL
    for (int k = 0; k < kGrad; ++k) grad[k][i] = y.d[k] * scale;
  }
}

template <class Head, class R>
void run_head(const PairCall& call) {
  constexpr int kInputs = Head::kGrad + Head::kConst;
  R params[kMaxHeadParams];
  for (int k = 0; k < kMaxHeadParams; ++k) params[k] = static_cast<R>(call.params[static_cast<std::size_t>(k)]);
  const std::int64_t blocks = (call.n + kBlock - 1) / kBlock;
  std::vector<double> totals(call.total != nullptr ? static_cast<std::size_t>(blocks) : 0);
  parallel_for(blocks, kGrainBlocks, [&](std::int64_t begin, std::int64_t end) {
    alignas(64) R in_buffer[kInputs][kBlock];
    alignas(64) R grad_buffer[Head::kGrad][kBlock];
    alignas(64) R loss[kBlock];
    const R* in[kInputs];
    R* grad[Head::kGrad];
    for (int k = 0; k < kInputs; ++k) {
      const InputColumn& column = call.inputs[static_cast<std::size_t>(k)];
      for (R& x : in_buffer[k]) x = R(1);  // the unused tail of the last block
      if (column.stride == 0) load_any(column, 0, kBlock, in_buffer[k]);
    }
    for (std::int64_t b = begin; b < end; ++b) {
      const std::int64_t first = b * kBlock;
      const std::int64_t count = call.n - first < kBlock ? call.n - first : kBlock;
      for (int k = 0; k < kInputs; ++k) {
        const InputColumn& column = call.inputs[static_cast<std::size_t>(k)];
        in[k] = in_buffer[k];
        if (column.stride == 1 && column.dtype == DtypeOf<R>::value && count == kBlock) {
          in[k] = static_cast<const R*>(column.data) + first;
        } else if (column.stride != 0) {
          load_any(column, first, count, in_buffer[k]);
        }
      }
      for (int k = 0; k < Head::kGrad; ++k) {
        const OutputColumn& column = call.grads[static_cast<std::size_t>(k)];
        const bool direct =
            column.data != nullptr && column.stride == 1 && column.dtype == DtypeOf<R>::value && count == kBlock;
        grad[k] = direct ? static_cast<R*>(column.data) + first : grad_buffer[k];
      }
      run_block<Head>(in, params, static_cast<R>(call.grad_scale), loss, grad);
      if (call.total != nullptr) totals[static_cast<std::size_t>(b)] = sum_in_lanes(loss, count);
      if (call.loss.data != nullptr) store_any(call.loss, first, count, loss);
      for (int k = 0; k < Head::kGrad; ++k) {
        const OutputColumn& column = call.grads[static_cast<std::size_t>(k)];
        if (column.data != nullptr && grad[k] == grad_buffer[k]) store_any(column, first, count, grad[k]);
      }
    }
  });
  if (call.total != nullptr) {
    double total = 0.0;
    for (double part : totals) total += part;
    *call.total = total;
  }
}

template <class... Heads>
void run(const PairCall& call, HeadList<Heads...>) {
  using Run = void (*)(const PairCall&);
  static constexpr Run kFloat[] = {run_head<Heads, float>...};
  static constexpr Run kDouble[] = {run_head<Heads, double>...};
  (call.double_precision ? kDouble : kFloat)[call.head](call);
}

}  // namespace

void pair_loop(const preference::PairCall& call) {
  note_simd_level();
  run(call, PairHeads{});
}

#include "core/simd_end.hpp"
