// SPDX-License-Identifier: Apache-2.0
// CUDA pointwise loop: the kernel of one head, and the table of a room's heads. A grid-stride loop over the same heads
// as on the CPU: a thread takes four neighbouring rows (one in float64 maths), brings every input to the type of the
// maths in registers, runs the head on dual numbers, and writes loss and gradients from registers; nothing is staged in
// memory and one pass gives both. A contiguous, aligned column of any dtype is one packed access per four rows (16
// bytes for float32), every other column four strided ones; which of the two, and the dtype, is a branch per column
// that all threads take alike, so that kernels number heads x 2 and not heads x dtypes. A group column is read by the
// group of the row: a division, or a search in the offsets once per thread's rows and steps from there. Bytes per row
// for DPO in float32: 16 read, 8 (gradients) or 12 (and losses) written. Sums have one order: rows of a thread, threads
// of a block by a shuffle tree, blocks by a second kernel of one block (pointwise.cu); no atomics.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <span>

#include "core/dtype.hpp"
#include "core/head.hpp"
#include "core/macros.hpp"
#include "kernels/core/launch.cuh"
#include "kernels/core/pointwise_cuda.hpp"

namespace hotloop::pointwise::cuda_kernels {

inline constexpr int kThreads = 128;  // a block that 2^16 pairs spread over 128 multiprocessors
inline constexpr int kWarp = 32;

// Rows of a thread: 16 bytes of float32 are the widest load there is. A float64 row is bound by its
// arithmetic, and four of them would hold four times the registers.
template <class R>
inline constexpr int kRows = sizeof(R) == 4 ? 4 : 1;

enum class Layout : int { kNumber, kStrided, kPacked };

template <class R>
struct Input {
  const void* data;
  std::int64_t stride;
  R number;
  Dtype dtype;
  Layout layout;
};
struct Output {
  void* data;  // nullptr: not wanted
  std::int64_t stride;
  Dtype dtype;
  Layout layout;
};

// Passed by value: the kernel reads it from constant memory.
template <class R>
struct Arguments {
  std::int64_t n;
  Input<R> inputs[kMaxInputs];
  Groups groups;
  Input<R> weight;  // no data: every row counts once
  Output grads[kMaxInputs];
  Output loss;
  R params[kMaxParams];
  R grad_scale;
  double* partials;  // kWidth numbers per block; nullptr: no sums wanted
  bool reduce_outs;
};

template <class Storage, int kCount>
struct alignas(sizeof(Storage) * kCount < 16 ? sizeof(Storage) * kCount : 16) Pack {
  Storage item[kCount];
};

template <class Storage, class R>
HOTLOOP_INLINE void load(const Input<R>& column, std::int64_t first, std::int64_t n, R (&x)[kRows<R>]) {
  const Storage* data = static_cast<const Storage*>(column.data);
  if (column.layout == Layout::kPacked && first + kRows<R> <= n) {
    const auto pack = *reinterpret_cast<const Pack<Storage, kRows<R>>*>(data + first);
    HOTLOOP_UNROLL
    for (int i = 0; i < kRows<R>; ++i) x[i] = static_cast<R>(to_float(pack.item[i]));
  } else {
    HOTLOOP_UNROLL
    for (int i = 0; i < kRows<R>; ++i) {
      const std::int64_t row = first + i < n ? first + i : n - 1;  // past the end: the last again
      x[i] = static_cast<R>(to_float(data[row * column.stride]));
    }
  }
}

template <class R>
HOTLOOP_INLINE void load_any(const Input<R>& column, std::int64_t first, std::int64_t n, R (&x)[kRows<R>]) {
  if (column.layout == Layout::kNumber) {
    HOTLOOP_UNROLL
    for (int i = 0; i < kRows<R>; ++i) x[i] = column.number;
    return;
  }
  with_float(column.dtype, [&](auto storage) { load<decltype(storage)>(column, first, n, x); });
}

template <class Storage, class R>
HOTLOOP_INLINE void store(const Output& column, std::int64_t first, std::int64_t n, const R (&x)[kRows<R>]) {
  using A = typename Accumulate<Storage>::type;
  Storage* data = static_cast<Storage*>(column.data);
  if (column.layout == Layout::kPacked && first + kRows<R> <= n) {
    Pack<Storage, kRows<R>> pack;
    HOTLOOP_UNROLL
    for (int i = 0; i < kRows<R>; ++i) put(pack.item[i], static_cast<A>(x[i]));
    *reinterpret_cast<Pack<Storage, kRows<R>>*>(data + first) = pack;
  } else {
    HOTLOOP_UNROLL
    for (int i = 0; i < kRows<R>; ++i) {
      if (first + i < n) put(data[(first + i) * column.stride], static_cast<A>(x[i]));
    }
  }
}

template <class R>
HOTLOOP_INLINE void store_any(const Output& column, std::int64_t first, std::int64_t n, const R (&x)[kRows<R>]) {
  if (column.data == nullptr) return;
  with_float(column.dtype, [&](auto storage) { store<decltype(storage)>(column, first, n, x); });
}

struct Add {
  static __device__ __forceinline__ double of(double x, double y) { return x + y; }
};
struct Least {  // NaN stays
  static __device__ __forceinline__ double of(double x, double y) { return y < x || y != y ? y : x; }
};
struct Largest {
  static __device__ __forceinline__ double of(double x, double y) { return y > x || y != y ? y : x; }
};

// One number over the threads of a block, in a fixed order. All threads get it.
template <class Op>
__device__ __forceinline__ double over_block(double x) {
  __shared__ double parts[kThreads / kWarp];
  HOTLOOP_UNROLL
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = Op::of(x, __shfl_down_sync(0xffffffffu, x, offset));
  }
  const std::int64_t thread = cuda::thread_in_block();
  if (thread % kWarp == 0) parts[thread / kWarp] = x;
  __syncthreads();
  double total = parts[0];
  HOTLOOP_UNROLL
  for (int i = 1; i < kThreads / kWarp; ++i) total = Op::of(total, parts[i]);
  __syncthreads();  // the next reduction writes to the same memory
  return total;
}

template <class R>
HOTLOOP_INLINE R one(const Input<R>& column, std::int64_t at) {
  if (column.layout == Layout::kNumber) return column.number;
  const std::int64_t i = at * column.stride;
  return with_float(column.dtype, [&](auto storage) {
    return static_cast<R>(to_float(static_cast<const decltype(storage)*>(column.data)[i]));
  });
}

template <class H, class R>
__global__ void __launch_bounds__(kThreads) kernel(const __grid_constant__ Arguments<R> a) {
  constexpr int kPlain = H::kGrad + H::kRow;
  constexpr int kOuts = H::kOut > 0 ? H::kOut : 1;
  const std::int64_t step = cuda::thread_count() * kRows<R>;
  const double infinity = static_cast<double>(__int_as_float(0x7f800000));
  double sum = 0.0, counted = 0.0, sums[kOuts], least[kOuts], largest[kOuts];
  HOTLOOP_UNROLL
  for (int k = 0; k < kOuts; ++k) {
    sums[k] = 0.0;
    least[k] = infinity;
    largest[k] = -infinity;
  }
  for (std::int64_t first = cuda::thread_index() * kRows<R>; first < a.n; first += step) {
    R in[H::kInputs][kRows<R>];
    R loss[kRows<R>];
    R grad[H::kGrad > 0 ? H::kGrad : 1][kRows<R>];
    R weight[kRows<R>];
    HOTLOOP_UNROLL
    for (int k = 0; k < kPlain; ++k) load_any(a.inputs[k], first, a.n, in[k]);
    if constexpr (H::kGroup > 0) {
      HOTLOOP_UNROLL
      for (int i = 0; i < kRows<R>; ++i) {
        const std::int64_t group = group_of(a.groups, first + i < a.n ? first + i : a.n - 1);
        HOTLOOP_UNROLL
        for (int k = kPlain; k < H::kInputs; ++k) in[k][i] = one(a.inputs[k], group);
      }
    }
    const bool weighted = a.weight.data != nullptr;
    if (weighted) load_any(a.weight, first, a.n, weight);
    HOTLOOP_UNROLL
    for (int i = 0; i < kRows<R>; ++i) {
      R x[H::kInputs], g[H::kGrad > 0 ? H::kGrad : 1], out[kOuts];
      HOTLOOP_UNROLL
      for (int k = 0; k < H::kInputs; ++k) x[k] = in[k][i];
      evaluate<H>(x, a.params, &loss[i], g, out);
      HOTLOOP_UNROLL
      for (int k = 0; k < H::kGrad; ++k) grad[k][i] = g[k] * a.grad_scale;
      bool counts = first + i < a.n;
      if (weighted) {  // a row of weight 0 is left out, even where it is infinite or NaN
        const bool left_out = weight[i] == R(0);
        counts = counts && !left_out;
        loss[i] = left_out ? R(0) : weight[i] * loss[i];
        HOTLOOP_UNROLL
        for (int k = 0; k < H::kGrad; ++k) grad[k][i] = left_out ? R(0) : weight[i] * grad[k][i];
      }
      if (a.partials != nullptr && counts) {
        sum += static_cast<double>(loss[i]);
        counted += 1.0;
        HOTLOOP_UNROLL
        for (int k = 0; k < H::kOut; ++k) {
          const auto v = static_cast<double>(out[k]);
          sums[k] += v;
          least[k] = Least::of(least[k], v);
          largest[k] = Largest::of(largest[k], v);
        }
      }
    }
    store_any(a.loss, first, a.n, loss);
    HOTLOOP_UNROLL
    for (int k = 0; k < H::kGrad; ++k) store_any(a.grads[k], first, a.n, grad[k]);
  }
  if (a.partials == nullptr) return;
  const bool writer = cuda::thread_in_block() == 0;
  double* const mine = a.partials + cuda::block_index() * (a.reduce_outs ? kWidth : 1);
  const double total = over_block<Add>(sum);
  if (writer) mine[0] = total;
  if (!a.reduce_outs) return;
  const double rows = over_block<Add>(counted);
  if (writer) mine[1] = rows;
  HOTLOOP_UNROLL
  for (int k = 0; k < H::kOut; ++k) {
    const double s = over_block<Add>(sums[k]), low = over_block<Least>(least[k]),
                 high = over_block<Largest>(largest[k]);
    if (writer) {
      mine[2 + 3 * k] = s;
      mine[3 + 3 * k] = low;
      mine[4 + 3 * k] = high;
    }
  }
}

template <class R>
using Kernel = void (*)(Arguments<R>);

struct CudaEntry {
  HeadInfo info;
  Kernel<float> kernel_float;
  Kernel<double> kernel_double;
};

template <class... Heads>
std::span<const CudaEntry> entries(HeadList<Heads...>) {
  static const CudaEntry table[] = {{kInfo<Heads>, kernel<Heads, float>, kernel<Heads, double>}...};
  return table;
}

}  // namespace hotloop::pointwise::cuda_kernels

// For the file that CMake writes for a room; `hotloop::<room>::Heads` is the room's list.
#define HOTLOOP_ROOM_HEADS_CUDA(room)                                                     \
  namespace hotloop::pointwise::cuda_kernels {                                            \
  std::span<const CudaEntry> room##_heads() { return entries(::hotloop::room::Heads{}); } \
  }
