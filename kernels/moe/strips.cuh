// SPDX-License-Identifier: Apache-2.0
// Strips of eight neighbouring numbers of a row, of any float dtype, in and out of the type of the arithmetic: 16 bytes
// at a time where rows begin at multiples of 16 bytes. A thread has a strip of every pass over a row.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.hpp"
#include "kernels/moe/blocks.cuh"
#include "moe/row_pass.hpp"

namespace hotloop::moe::gpu {

inline constexpr int kStrip = 8;

template <class Storage>
struct alignas(16) Strip {
  Storage of[kStrip];
};

HOTLOOP_INLINE bool begins_aligned(const void* data, Dtype dtype, std::int64_t stride) {
  const auto apart = static_cast<std::uintptr_t>(stride * item_size(dtype));
  return ((reinterpret_cast<std::uintptr_t>(data) | apart) & 15) == 0;
}

// Rows that are read, or nothing: zeros.
struct Source {
  const void* data = nullptr;
  std::int64_t stride = 0;
  Dtype dtype = Dtype::kFloat32;
  bool packed = false;

  Source() = default;
  HOTLOOP_INLINE explicit Source(const Rows& a)
      : data(a.data), stride(a.stride), dtype(a.dtype), packed(begins_aligned(a.data, a.dtype, a.stride)) {}
};
// Rows that are written, or nothing.
struct Target {
  void* data = nullptr;
  std::int64_t stride = 0;
  Dtype dtype = Dtype::kFloat32;
  bool packed = false;

  Target() = default;
  HOTLOOP_INLINE explicit Target(const RowsOut& a)
      : data(a.data), stride(a.stride), dtype(a.dtype), packed(begins_aligned(a.data, a.dtype, a.stride)) {}
};

template <class R, class Storage>
HOTLOOP_INLINE R widened(Storage x) {
  return static_cast<R>(to_float(x));
}
template <class Storage, class R>
HOTLOOP_INLINE Storage narrowed(R x) {
  if constexpr (std::is_same_v<Storage, double>) {
    return static_cast<double>(x);
  } else {
    Storage out;
    put(out, static_cast<float>(x));
    return out;
  }
}

// Calls f(Storage{}) for streams, states and expert rows, which are float64 if and only if the arithmetic is.
template <class R, class F>
HOTLOOP_INLINE decltype(auto) with_own(Dtype dtype, F&& f) {
  if constexpr (std::is_same_v<R, double>) {
    return f(double{});
  } else {
    return with_row_type(dtype, f);
  }
}

// n numbers from `at` on, the rest of the strip is 0. kMoves: they were written by this thread.
template <class Storage, bool kMoves = false>
HOTLOOP_INLINE Strip<Storage> strip_at(const Storage* at, int n, bool packed) {
  if (packed && n >= kStrip) {
    if constexpr (kMoves) {
      return *reinterpret_cast<const Strip<Storage>*>(at);
    } else {
      return cuda::read_global(reinterpret_cast<const Strip<Storage>*>(at));
    }
  }
  Strip<Storage> found;
  HOTLOOP_UNROLL
  for (int i = 0; i < kStrip; ++i) found.of[i] = i < n ? at[i] : Storage{};
  return found;
}
template <class Storage>
HOTLOOP_INLINE void put_strip(const Strip<Storage>& strip, Storage* at, int n, bool packed) {
  if (packed && n >= kStrip) {
    *reinterpret_cast<Strip<Storage>*>(at) = strip;
    return;
  }
  HOTLOOP_UNROLL
  for (int i = 0; i < kStrip; ++i) {
    if (i < n) at[i] = strip.of[i];
  }
}

// Columns [column, column + n) of row t. kAny: of any float dtype, not only those of with_own.
template <bool kAny = false, bool kMoves = false, class R>
HOTLOOP_INLINE void load(const Source& a, std::int64_t t, std::int64_t column, int n, R* out) {
  if (a.data == nullptr || n <= 0) {
    HOTLOOP_UNROLL
    for (int i = 0; i < kStrip; ++i) out[i] = R(0);
    return;
  }
  const auto read = [&](auto storage) {
    using Storage = decltype(storage);
    const auto strip =
        strip_at<Storage, kMoves>(static_cast<const Storage*>(a.data) + t * a.stride + column, n, a.packed);
    HOTLOOP_UNROLL
    for (int i = 0; i < kStrip; ++i) out[i] = widened<R>(strip.of[i]);
  };
  if constexpr (kAny) {
    with_float(a.dtype, read);
  } else {
    with_own<R>(a.dtype, read);
  }
}

// Writes x, and rounds it to what was written.
template <bool kAny = false, class R>
HOTLOOP_INLINE void store(const Target& a, std::int64_t t, std::int64_t column, int n, R* x) {
  if (a.data == nullptr || n <= 0) return;
  const auto write = [&](auto storage) {
    using Storage = decltype(storage);
    Strip<Storage> strip;
    HOTLOOP_UNROLL
    for (int i = 0; i < kStrip; ++i) {
      strip.of[i] = narrowed<Storage>(x[i]);
      x[i] = widened<R>(strip.of[i]);
    }
    put_strip(strip, static_cast<Storage*>(a.data) + t * a.stride + column, n, a.packed);
  };
  if constexpr (kAny) {
    with_float(a.dtype, write);
  } else {
    with_own<R>(a.dtype, write);
  }
}

template <class R>
HOTLOOP_INLINE R number_at(const Rows& a, std::int64_t t, std::int64_t j) {
  return with_float(a.dtype, [&](auto storage) {
    return widened<R>(static_cast<const decltype(storage)*>(a.data)[t * a.stride + j]);
  });
}
template <class R>
HOTLOOP_INLINE void put_number(const RowsOut& a, std::int64_t t, std::int64_t j, R x) {
  with_float(a.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    static_cast<Storage*>(a.data)[t * a.stride + j] = narrowed<Storage>(x);
  });
}

// Numbers of a rule, the first of them, where there are any, in device memory.
struct Numbers {
  double fixed[kMaxNumbers] = {};
  const double* live;
  int live_count;

  Numbers(const double* numbers, const double* in_memory, int count) : live(in_memory), live_count(count) {
    for (int i = 0; i < kMaxNumbers; ++i) fixed[i] = numbers[i];
  }
  template <int kCount, class R>
  HOTLOOP_BOTH void read(R* out) const {
    HOTLOOP_UNROLL
    for (int i = 0; i < kCount; ++i) out[i] = static_cast<R>(i < live_count ? live[i] : fixed[i]);
  }
};

// The threads of a block that has a row: a strip each, as far as there are threads.
inline constexpr int kMostRowThreads = 256;
HOTLOOP_INLINE int threads_for(std::int64_t columns) {
  const std::int64_t strips = (columns + kStrip - 1) / kStrip, threads = (strips + kWarp - 1) / kWarp * kWarp;
  return static_cast<int>(threads < kWarp ? kWarp : threads < kMostRowThreads ? threads : kMostRowThreads);
}

// f(first column, how many) for the strips of a thread; all threads come by as often, some without a column.
template <class F>
HOTLOOP_INLINE void each_strip(int thread, int threads, std::int64_t columns, F&& f) {
  for (std::int64_t base = 0; base < columns; base += static_cast<std::int64_t>(threads) * kStrip) {
    const std::int64_t first = base + static_cast<std::int64_t>(thread) * kStrip, left = columns - first;
    f(first, static_cast<int>(left < 0 ? 0 : left < kStrip ? left : kStrip));
  }
}

template <class R>
HOTLOOP_INLINE R sum_of_strip(const R* x) {
  R sum = R(0);
  HOTLOOP_UNROLL
  for (int i = 0; i < kStrip; ++i) sum += x[i];
  return sum;
}

// Over the block; `of_warp`, a number for each warp, is not used again before the next barrier. All get the same bits.
template <class R>
HOTLOOP_BOTH inline double sum_of_block(R x, double* of_warp, int thread, int threads) {
  x = cuda::sum_of_warp(x);
  if (thread % kWarp == 0) of_warp[thread / kWarp] = static_cast<double>(x);
  cuda::block_barrier();
  double sum = 0.0;
  for (int w = 0; w < threads / kWarp; ++w) sum += of_warp[w];
  return sum;
}

// The expert rows of a token.
template <class R>
struct SlotsOf {
  std::int64_t* row;  // -1: none
  R* weight;

  HOTLOOP_BOTH SlotsOf(Arrays& arrays, std::int64_t k) : row(arrays.take<std::int64_t>(k)), weight(arrays.take<R>(k)) {}

  // A barrier follows.
  HOTLOOP_BOTH void read(const Mixture& m, std::int64_t t, int thread, int threads) const {
    for (std::int64_t i = thread; i < m.slots.k; i += threads) {
      const std::int64_t slot = t * m.slots.k + i, at = m.slots.row_of_slot[slot];
      row[i] = m.slots.agree(slot, at) ? at : -1;
      weight[i] = m.weights.data != nullptr ? number_at<R>(m.weights, t, i) : R(1);
    }
  }
};

// The mixture of a token on a strip: its expert rows, added in the order of its slots, or its row; then the shared row.
template <class R>
struct MixtureRows {
  Source rows, shared;
  std::int64_t k = 0;

  explicit MixtureRows(const Mixture& m) : rows(m.rows), shared(m.shared), k(m.slots.k) {}

  HOTLOOP_BOTH void read(const SlotsOf<R>& slots, std::int64_t t, std::int64_t column, int n, R* z) const {
    if (k == 0) {
      load(rows, t, column, n, z);
    } else {
      HOTLOOP_UNROLL
      for (int i = 0; i < kStrip; ++i) z[i] = R(0);
      if (n > 0) with_own<R>(rows.dtype, [&](auto storage) { add<decltype(storage)>(slots, column, n, z); });
    }
    if (shared.data == nullptr) return;
    R more[kStrip];
    load(shared, t, column, n, more);
    HOTLOOP_UNROLL
    for (int i = 0; i < kStrip; ++i) z[i] += more[i];
  }

 private:
  static constexpr int kTogether = 4;  // rows on their way at once

  template <class Storage>
  HOTLOOP_BOTH void add(const SlotsOf<R>& slots, std::int64_t column, int n, R* z) const {
    for (std::int64_t first = 0; first < k; first += kTogether) {
      Strip<Storage> y[kTogether];
      std::int64_t row[kTogether];
      HOTLOOP_UNROLL
      for (int q = 0; q < kTogether; ++q) {
        row[q] = first + q < k ? slots.row[first + q] : -1;
        y[q] = {};
        if (row[q] < 0) continue;
        y[q] = strip_at(static_cast<const Storage*>(rows.data) + row[q] * rows.stride + column, n, rows.packed);
      }
      HOTLOOP_UNROLL
      for (int q = 0; q < kTogether; ++q) {
        if (row[q] < 0) continue;
        const R weight = slots.weight[first + q];
        HOTLOOP_UNROLL
        for (int i = 0; i < kStrip; ++i) z[i] += weight * widened<R>(y[q].of[i]);
      }
    }
  }
};

}  // namespace hotloop::moe::gpu
