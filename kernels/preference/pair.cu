// CUDA pair loop. A grid-stride loop over the same heads as on the CPU: a thread takes four
// neighbouring rows (one in float64 maths), brings every input to the type of the maths in
// registers, runs the head on dual numbers, and writes loss and gradients from registers; nothing
// is staged in memory and one pass gives both. A contiguous, aligned column of any dtype is one
// packed access per four rows (16 bytes for float32), every other column four strided ones; which
// of the two, and the dtype, is a branch per column that all threads take alike, so that kernels
// number heads x 2 and not heads x dtypes. Bytes per row for DPO in float32: 16 read, 8 (gradients)
// or 12 (and losses) written. The sum of the losses has one order: rows of a thread, threads of a
// block by a shuffle tree, blocks by a second kernel of one block; no atomics.
#include "kernels/preference/pair_cuda.hpp"

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.hpp"
#include "core/dual.hpp"
#include "core/macros.hpp"
#include "kernels/core/launch.cuh"
#include "preference/head_list.hpp"

namespace hotloop::preference {

namespace {

constexpr const char* kOp = "pair_loop";
constexpr int kThreads = 128;  // a block that 2^16 pairs spread over 128 multiprocessors
constexpr int kWarp = 32;

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
  Input<R> inputs[kMaxHeadInputs];
  Output grads[kMaxHeadInputs];
  Output loss;
  R params[kMaxHeadParams];
  R grad_scale;
  double* partials;  // one per block; nullptr: no sum wanted
};

template <class Storage, int kCount>
struct alignas(sizeof(Storage) * kCount < 16 ? sizeof(Storage) * kCount : 16) Pack {
  Storage item[kCount];
};

template <class Storage, class R>
__device__ __forceinline__ void load(const Input<R>& column, std::int64_t first, std::int64_t n, R (&x)[kRows<R>]) {
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
__device__ __forceinline__ void load_any(const Input<R>& column, std::int64_t first, std::int64_t n, R (&x)[kRows<R>]) {
  if (column.layout == Layout::kNumber) {
    HOTLOOP_UNROLL
    for (int i = 0; i < kRows<R>; ++i) x[i] = column.number;
    return;
  }
  // Apart, so that the usual dtype does not go through the jump table of the switch.
  if (column.dtype == Dtype::kFloat32) return load<float>(column, first, n, x);
  switch (column.dtype) {
    case Dtype::kFloat64:
      return load<double>(column, first, n, x);
    case Dtype::kFloat16:
      return load<Float16>(column, first, n, x);
    default:
      return load<BFloat16>(column, first, n, x);
  }
}

template <class Storage, class R>
__device__ __forceinline__ void store(const Output& column, std::int64_t first, std::int64_t n,
                                      const R (&x)[kRows<R>]) {
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
__device__ __forceinline__ void store_any(const Output& column, std::int64_t first, std::int64_t n,
                                          const R (&x)[kRows<R>]) {
  if (column.data == nullptr) return;
  if (column.dtype == Dtype::kFloat32) return store<float>(column, first, n, x);
  switch (column.dtype) {
    case Dtype::kFloat64:
      return store<double>(column, first, n, x);
    case Dtype::kFloat16:
      return store<Float16>(column, first, n, x);
    default:
      return store<BFloat16>(column, first, n, x);
  }
}

// Sum over the threads of a block, in a fixed order.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double parts[kThreads / kWarp];
  HOTLOOP_UNROLL
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x += __shfl_down_sync(0xffffffffu, x, offset);
  }
  const std::int64_t thread = cuda::thread_in_block();
  if (thread % kWarp == 0) parts[thread / kWarp] = x;
  __syncthreads();
  double total = 0.0;
  HOTLOOP_UNROLL
  for (int i = 0; i < kThreads / kWarp; ++i) total += parts[i];
  return total;
}

template <class Head, class R>
__global__ void __launch_bounds__(kThreads) pair_kernel(const __grid_constant__ Arguments<R> a) {
  constexpr int kGrad = Head::kGrad;
  constexpr int kInputs = Head::kGrad + Head::kConst;
  using T = Dual<R, kGrad>;
  const std::int64_t step = cuda::thread_count() * kRows<R>;
  double sum = 0.0;
  for (std::int64_t first = cuda::thread_index() * kRows<R>; first < a.n; first += step) {
    R in[kInputs][kRows<R>];
    R loss[kRows<R>];
    R grad[kGrad][kRows<R>];
    HOTLOOP_UNROLL
    for (int k = 0; k < kInputs; ++k) load_any(a.inputs[k], first, a.n, in[k]);
    HOTLOOP_UNROLL
    for (int i = 0; i < kRows<R>; ++i) {
      T d[kGrad];
      R c[Head::kConst > 0 ? Head::kConst : 1];
      HOTLOOP_UNROLL
      for (int k = 0; k < kGrad; ++k) d[k] = T::variable(in[k][i], k);
      HOTLOOP_UNROLL
      for (int k = kGrad; k < kInputs; ++k) c[k - kGrad] = in[k][i];
      const T y = Head::loss(d, c, a.params);
      loss[i] = y.value;
      HOTLOOP_UNROLL
      for (int k = 0; k < kGrad; ++k) grad[k][i] = y.d[k] * a.grad_scale;
    }
    if (a.partials != nullptr) {
      HOTLOOP_UNROLL
      for (int i = 0; i < kRows<R>; ++i) {
        sum += first + i < a.n ? static_cast<double>(loss[i]) : 0.0;
      }
    }
    store_any(a.loss, first, a.n, loss);
    HOTLOOP_UNROLL
    for (int k = 0; k < kGrad; ++k) store_any(a.grads[k], first, a.n, grad[k]);
  }
  if (a.partials != nullptr) {
    const double total = block_sum(sum);
    if (cuda::thread_in_block() == 0) a.partials[cuda::block_index()] = total;
  }
}

__global__ void __launch_bounds__(kThreads) total_kernel(const double* partials, std::int64_t count, Output out) {
  double sum = 0.0;
  for (std::int64_t i = cuda::thread_in_block(); i < count; i += kThreads) sum += partials[i];
  const double total = block_sum(sum);
  if (cuda::thread_in_block() != 0) return;
  if (out.dtype == Dtype::kFloat64) {
    *static_cast<double*>(out.data) = total;
  } else {
    *static_cast<float*>(out.data) = static_cast<float>(total);
  }
}

Layout layout_of(const void* data, Dtype dtype, std::int64_t stride, int rows) {
  const auto bytes = static_cast<std::uintptr_t>(item_size(dtype) * rows);
  const std::uintptr_t alignment = bytes < 16 ? bytes : 16;
  const bool packed = rows > 1 && stride == 1 && reinterpret_cast<std::uintptr_t>(data) % alignment == 0;
  return packed ? Layout::kPacked : Layout::kStrided;
}

Output output_of(const OutputColumn& column, int rows) {
  return {column.data, column.stride, column.dtype, layout_of(column.data, column.dtype, column.stride, rows)};
}

template <class R>
Input<R> input_of(const InputColumn& column, bool on_host) {
  if (on_host) {
    const auto number = static_cast<R>(*static_cast<const double*>(column.data));
    return {nullptr, 0, number, column.dtype, Layout::kNumber};
  }
  return {column.data, column.stride, R(0), column.dtype,
          layout_of(column.data, column.dtype, column.stride, kRows<R>)};
}

template <class R, class... Heads>
void launch(const PairCudaCall& call, unsigned int blocks, HeadList<Heads...>) {
  using Kernel = void (*)(Arguments<R>);
  static constexpr Kernel kKernels[] = {pair_kernel<Heads, R>...};
  const PairCall& pairs = call.pairs;
  Arguments<R> a{};
  a.n = pairs.n;
  for (std::size_t k = 0; k < kMaxHeadInputs; ++k) {
    a.inputs[k] = input_of<R>(pairs.inputs[k], call.on_host[k]);
    a.grads[k] = output_of(pairs.grads[k], kRows<R>);
  }
  a.loss = output_of(pairs.loss, kRows<R>);
  for (std::size_t k = 0; k < kMaxHeadParams; ++k) a.params[k] = static_cast<R>(pairs.params[k]);
  a.grad_scale = static_cast<R>(pairs.grad_scale);
  a.partials = call.total.data != nullptr ? call.partials : nullptr;
  kKernels[pairs.head]<<<blocks, kThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(a);
}

}  // namespace

void pair_loop_cuda(const PairCudaCall& call) {
  const std::int64_t n = call.pairs.n > 0 ? call.pairs.n : 0;
  const bool total = call.total.data != nullptr;
  if (n == 0 && !total) return;  // the sum over no rows is still written: it is 0
  const std::int64_t rows = call.pairs.double_precision ? kRows<double> : kRows<float>;
  const std::int64_t items = n / rows + (n % rows != 0 ? 1 : 0);
  const unsigned int blocks = cuda::grid_blocks(kOp, items, kThreads, kPairPartials);
  const cuda::DeviceScope scope(kOp, call.device);
  if (n > 0 && call.pairs.double_precision) {
    launch<double>(call, blocks, PairHeads{});
  } else if (n > 0) {
    launch<float>(call, blocks, PairHeads{});
  }
  if (total) {
    total_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(call.partials, blocks,
                                                                             output_of(call.total, 1));
  }
  cuda::check_launch(kOp);
}

}  // namespace hotloop::preference
