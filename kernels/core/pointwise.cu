// SPDX-License-Identifier: Apache-2.0
// The launcher of the CUDA pointwise loop and the second pass of its sums; the kernels are in pointwise.cuh.
//
// A handle names a room and a place in its list of heads. A launch allocates nothing: each block leaves its sums in a
// buffer of the caller, and a second kernel of one block adds them in a fixed order.
#include "kernels/core/pointwise.cuh"

// HOTLOOP_ROOM(<room>) for every room with heads, written by CMake.
#define HOTLOOP_ROOM(room)                     \
  namespace hotloop::pointwise::cuda_kernels { \
  std::span<const CudaEntry> room##_heads();   \
  }
#include "pointwise_rooms.inc"
#undef HOTLOOP_ROOM

namespace hotloop::pointwise {

using namespace cuda_kernels;

namespace {

constexpr const char* kOp = "pointwise";

const std::vector<RoomHeads<CudaEntry>> kRooms = {
#define HOTLOOP_ROOM(room) {#room, room##_heads},
#include "pointwise_rooms.inc"
#undef HOTLOOP_ROOM
};

__device__ void put_total(const Output& out, std::int64_t at, double x) {
  if (out.data == nullptr) return;
  if (out.dtype == Dtype::kFloat64) {
    static_cast<double*>(out.data)[at] = x;
  } else {
    static_cast<float*>(out.data)[at] = static_cast<float>(x);
  }
}

template <class Op>
__device__ double over_blocks(const double* partials, std::int64_t count, std::int64_t width, double start) {
  double x = start;
  for (std::int64_t i = cuda::thread_in_block(); i < count; i += kThreads) x = Op::of(x, partials[i * width]);
  return over_block<Op>(x);
}

// counted and outs: float64, written where they are wanted; outs holds sum, least and largest of each extra value.
__global__ void __launch_bounds__(kThreads) total_kernel(const double* partials, std::int64_t count, Output total,
                                                         double* counted, double* outs, int out_count) {
  const std::int64_t width = outs != nullptr ? kWidth : 1;
  const double infinity = static_cast<double>(__int_as_float(0x7f800000));
  const bool writer = cuda::thread_in_block() == 0;
  const double sum = over_blocks<Add>(partials, count, width, 0.0);
  if (writer) put_total(total, 0, sum);
  if (outs == nullptr) return;
  const double rows = over_blocks<Add>(partials + 1, count, width, 0.0);
  if (writer) *counted = rows;
  for (int k = 0; k < out_count; ++k) {
    const double s = over_blocks<Add>(partials + 2 + 3 * k, count, width, 0.0);
    const double low = over_blocks<Least>(partials + 3 + 3 * k, count, width, infinity);
    const double high = over_blocks<Largest>(partials + 4 + 3 * k, count, width, -infinity);
    if (writer) {
      outs[3 * k] = s;
      outs[3 * k + 1] = low;
      outs[3 * k + 2] = high;
    }
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

template <class R>
void launch(Kernel<R> kernel, const CudaCall& call, unsigned int blocks) {
  const Call& rows = call.rows;
  Arguments<R> a{};
  a.n = rows.n;
  for (std::size_t k = 0; k < kMaxInputs; ++k) {
    a.inputs[k] = input_of<R>(rows.inputs[k], call.on_host[k]);
    a.grads[k] = output_of(rows.grads[k], kRows<R>);
  }
  a.groups = rows.groups;
  a.weight = input_of<R>(rows.weight, false);
  a.loss = output_of(rows.loss, kRows<R>);
  for (std::size_t k = 0; k < kMaxParams; ++k) a.params[k] = static_cast<R>(rows.params[k]);
  a.grad_scale = static_cast<R>(rows.grad_scale);
  a.reduce_outs = call.outs != nullptr;
  a.partials = call.total.data != nullptr || a.reduce_outs ? call.partials : nullptr;
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(a);
}

}  // namespace

const HeadInfo& info_cuda(int handle) { return find_head(kRooms, handle).info; }

std::vector<RoomInfo> rooms_cuda() { return infos_of(kRooms); }

void loop_cuda(int handle, const CudaCall& call) {
  const CudaEntry& head = find_head(kRooms, handle);
  const std::int64_t n = call.rows.n > 0 ? call.rows.n : 0;
  const bool total = call.total.data != nullptr || call.outs != nullptr;
  if (n == 0 && !total) return;  // the sum over no rows is still written: it is 0
  const std::int64_t rows = call.rows.double_precision ? kRows<double> : kRows<float>;
  const std::int64_t items = n / rows + (n % rows != 0 ? 1 : 0);
  const unsigned int blocks = cuda::grid_blocks(kOp, items, kThreads, kPartials);
  const cuda::DeviceScope scope(kOp, call.device);
  if (n > 0 && call.rows.double_precision) {
    launch<double>(head.kernel_double, call, blocks);
  } else if (n > 0) {
    launch<float>(head.kernel_float, call, blocks);
  }
  if (total) {
    total_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(
        call.partials, blocks, output_of(call.total, 1), call.counted, call.outs, head.info.outs);
  }
  cuda::check_launch(kOp);
}

}  // namespace hotloop::pointwise
