// SPDX-License-Identifier: Apache-2.0
// What the pass over rows needs around its loops: the weights of its norm in the type of the arithmetic, memory for the
// parts of sums over tokens, and their merge. Parts belong to blocks of tokens, whose number follows from the shape.
// permute only copies, and so needs no instruction set of its own.
#include "moe/row_pass.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "core/parallel.hpp"

namespace hotloop::moe {

namespace {

constexpr std::int64_t kMostBlocks = 128;
constexpr std::int64_t kLeastBlock = 4;

template <class T>
std::unique_ptr<T[]> memory(std::int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(count)]);
}

// A row in the type of the arithmetic, and `otherwise` in its place.
template <class R>
void widen(const Rows& row, std::int64_t n, R otherwise, R* out) {
  if (row.data == nullptr) {
    std::fill_n(out, n, otherwise);
    return;
  }
  with_float(row.dtype, [&](auto storage) {
    const auto* from = static_cast<const decltype(storage)*>(row.data);
    for (std::int64_t j = 0; j < n; ++j) out[j] = static_cast<R>(to_float(from[j]));
  });
}

// Weight and bias of a norm, side by side, each only if a norm needs it.
template <class R>
std::unique_ptr<R[]> affine(const Norm& norm, std::int64_t n) {
  auto both = memory<R>(2 * n);
  widen<R>(norm.weight, n, R(1), both.get());
  widen<R>(norm.bias, n, R(0), both.get() + n);
  return both;
}

bool run(const StepCall& call) { HOTLOOP_SIMD_DISPATCH(moe_step(call)) }
void run(const BackwardCall& call) { HOTLOOP_SIMD_DISPATCH(moe_step_backward(call)) }

template <class R>
bool step_as(StepCall& call) {
  std::unique_ptr<R[]> both;
  if (call.norm.kind != NormKind::kNone) {
    both = affine<R>(call.norm, call.columns);
    call.weight = both.get();
    call.bias = both.get() + call.columns;
  }
  return run(call);
}

// out[j] = the sum over blocks of parts[b * stride + j], in order and in double.
template <class R>
void merge(const R* parts, std::int64_t blocks, std::int64_t stride, std::int64_t n, const RowsOut& out) {
  if (out.data == nullptr) return;
  constexpr std::int64_t kColumns = 256;
  double sum[kColumns];
  for (std::int64_t first = 0; first < n; first += kColumns) {
    const std::int64_t count = std::min(kColumns, n - first);
    std::fill_n(sum, count, 0.0);
    for (std::int64_t b = 0; b < blocks; ++b) {
      for (std::int64_t j = 0; j < count; ++j) sum[j] += static_cast<double>(parts[b * stride + first + j]);
    }
    with_float(out.dtype, [&](auto storage) {
      using S = decltype(storage);
      auto* to = static_cast<S*>(out.data) + first;
      for (std::int64_t j = 0; j < count; ++j) {
        if constexpr (std::is_same_v<S, double>) {
          to[j] = sum[j];
        } else {
          put(to[j], static_cast<float>(sum[j]));
        }
      }
    });
  }
}

// Rows that no slot reads have slope 0.
void clear_others(const BackwardCall& call) {
  const Slots& s = call.mixture.slots;
  const RowsOut& out = call.slope_rows;
  if (out.data == nullptr || s.k == 0) return;
  const std::int64_t size = item_size(out.dtype), slots = call.tokens * s.k;
  for (std::int64_t r = 0; r < s.rows; ++r) {
    const std::int64_t slot = s.slot_of_row[r];
    const bool read = slot >= 0 && slot < slots && s.row_of_slot[slot] == r;
    if (!read) {
      std::memset(static_cast<char*>(out.data) + r * out.stride * size, 0,
                  static_cast<std::size_t>(call.columns * size));
    }
  }
}

template <class R>
void backward_as(BackwardCall& call) {
  const std::int64_t n = call.columns;
  std::unique_ptr<R[]> both, parts;
  if (call.norm.kind != NormKind::kNone) {
    both = affine<R>(call.norm, n);
    call.weight = both.get();
  }
  if (call.slope_norm_weight.data != nullptr || call.slope_norm_bias.data != nullptr) {
    parts = memory<R>(call.blocks * 2 * n);
    call.parts = parts.get();
  }
  const auto numbers = memory<double>(call.blocks * kMaxSlopes);
  const auto weights = memory<double>(call.blocks * call.mixture.slots.k);
  call.number_parts = numbers.get();
  call.weight_parts = weights.get();
  run(call);
  if (parts != nullptr) {
    merge(parts.get(), call.blocks, 2 * n, n, call.slope_norm_weight);
    merge(parts.get() + n, call.blocks, 2 * n, n, call.slope_norm_bias);
  }
  if (call.slope_numbers != nullptr) {
    merge(numbers.get(), call.blocks, kMaxSlopes, kMaxSlopes, RowsOut{call.slope_numbers, Dtype::kFloat64, 0});
  }
}

}  // namespace

bool step(StepCall call) { return call.wide ? step_as<double>(call) : step_as<float>(call); }

void step_backward(BackwardCall call) {
  call.block = std::max(kLeastBlock, (call.tokens + kMostBlocks - 1) / kMostBlocks);
  call.blocks = (call.tokens + call.block - 1) / call.block;
  call.grain = 1 + grain_of(call.columns, call.mixture.slots.k) / (2 * call.block);
  clear_others(call);
  call.wide ? backward_as<double>(call) : backward_as<float>(call);
}

bool permute(const Rows& x, std::int64_t tokens, std::int64_t columns, const Slots& slots, const RowsOut& out) {
  const std::int64_t size = item_size(x.dtype), all = tokens * slots.k;
  const auto bytes = static_cast<std::size_t>(columns * size);
  std::atomic<bool> agree{true};
  parallel_for(slots.rows, grain_of(columns, 0), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      char* const to = static_cast<char*>(out.data) + r * out.stride * size;
      const std::int64_t slot = slots.slot_of_row[r];
      if (slot == -1) {
        std::memset(to, 0, bytes);
      } else if (static_cast<std::uint64_t>(slot) >= static_cast<std::uint64_t>(all) || slots.row_of_slot[slot] != r) {
        agree = false;
      } else {
        std::memcpy(to, static_cast<const char*>(x.data) + slot / slots.k * x.stride * size, bytes);
      }
    }
  });
  // Backward goes from slots to rows.
  for (std::int64_t slot = 0; slot < all; ++slot) {
    const std::int64_t row = slots.row_of_slot[slot];
    if (row != -1 && !slots.agree(slot, row)) agree = false;
  }
  return agree;
}

}  // namespace hotloop::moe
