// SPDX-License-Identifier: Apache-2.0
// The collective operations of the threads of a block and of the blocks of a team: barrier, shuffle, ballot, fence,
// atomic, and a letter of 16 bytes that is read whole or not at all. Code written on these names also compiles for the
// host, where a test defines the functions of `emulated` and runs every thread as a fiber. So collective code is
// executed in tests, and not only compiled, on a machine without a GPU.
#pragma once

#include <bit>
#include <cstdint>

#include "core/macros.hpp"

// Everything collective is __host__ __device__, so that nvcc accepts it inside the walks, which are
// too; its host side under nvcc is never called.
#if defined(__CUDACC__)
#define HOTLOOP_BOTH __host__ __device__
#define HOTLOOP_OUTLINE __host__ __device__ __noinline__ inline
#else
#define HOTLOOP_BOTH
#define HOTLOOP_OUTLINE inline
#endif

namespace hotloop::cuda {

inline constexpr int kWarp = 32;

#if !defined(__CUDACC__)
namespace emulated {
void block_barrier();
std::uint64_t shuffle_xor(std::uint64_t x, int distance);  // of the 32 threads of a warp
std::uint64_t shuffle_up(std::uint64_t x, int distance);
std::uint64_t shuffle(std::uint64_t x, int lane);  // what the thread `lane` of the warp brought
std::uint32_t ballot(bool x);                      // bit i: what thread i of the warp brought
void wait();                                       // another thread runs
}  // namespace emulated
#endif

HOTLOOP_INLINE void block_barrier() {
#if defined(__CUDA_ARCH__)
  __syncthreads();
#elif !defined(__CUDACC__)
  emulated::block_barrier();
#endif
}

HOTLOOP_INLINE std::uint64_t shuffle_xor(std::uint64_t x, [[maybe_unused]] int distance) {
#if defined(__CUDA_ARCH__)
  return __shfl_xor_sync(0xffffffffu, x, distance);
#elif !defined(__CUDACC__)
  return emulated::shuffle_xor(x, distance);
#else
  return x;
#endif
}

// Of the thread `distance` below; a thread that has none below gets its own.
HOTLOOP_INLINE std::uint64_t shuffle_up(std::uint64_t x, [[maybe_unused]] int distance) {
#if defined(__CUDA_ARCH__)
  return __shfl_up_sync(0xffffffffu, x, static_cast<unsigned int>(distance));
#elif !defined(__CUDACC__)
  return emulated::shuffle_up(x, distance);
#else
  return x;
#endif
}

// What thread `lane` of the warp brought.
HOTLOOP_INLINE std::uint64_t shuffle(std::uint64_t x, [[maybe_unused]] int lane) {
#if defined(__CUDA_ARCH__)
  return __shfl_sync(0xffffffffu, x, lane);
#elif !defined(__CUDACC__)
  return emulated::shuffle(x, lane);
#else
  return x;
#endif
}
// The same for 32 bits, which are one instruction instead of two.
HOTLOOP_INLINE std::uint32_t shuffle(std::uint32_t x, [[maybe_unused]] int lane) {
#if defined(__CUDA_ARCH__)
  return __shfl_sync(0xffffffffu, x, lane);
#else
  return static_cast<std::uint32_t>(shuffle(std::uint64_t{x}, lane));
#endif
}
HOTLOOP_INLINE std::uint32_t shuffle_xor(std::uint32_t x, [[maybe_unused]] int distance) {
#if defined(__CUDA_ARCH__)
  return __shfl_xor_sync(0xffffffffu, x, distance);
#else
  return static_cast<std::uint32_t>(shuffle_xor(std::uint64_t{x}, distance));
#endif
}
HOTLOOP_INLINE float shuffle_xor(float x, int distance) {
  return std::bit_cast<float>(shuffle_xor(std::bit_cast<std::uint32_t>(x), distance));
}
HOTLOOP_INLINE double shuffle_xor(double x, int distance) {
  return std::bit_cast<double>(shuffle_xor(std::bit_cast<std::uint64_t>(x), distance));
}
HOTLOOP_INLINE float shuffle(float x, int lane) {
  return std::bit_cast<float>(shuffle(std::bit_cast<std::uint32_t>(x), lane));
}

// Over the threads of a warp, as a tree: all get the same bits.
template <class T>
HOTLOOP_INLINE T sum_of_warp(T x) {
  HOTLOOP_UNROLL
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += shuffle_xor(x, distance);
  return x;
}
// The largest. Of numbers other than NaN.
template <class T>
HOTLOOP_INLINE T most_of_warp(T x) {
  HOTLOOP_UNROLL
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const T y = shuffle_xor(x, distance);
    x = y > x ? y : x;
  }
  return x;
}
HOTLOOP_INLINE std::uint32_t most_of_warp(std::uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, x);
#else
  return most_of_warp<std::uint32_t>(x);
#endif
}

// Bit i: what thread i of the warp brought.
HOTLOOP_INLINE std::uint32_t ballot([[maybe_unused]] bool x) {
#if defined(__CUDA_ARCH__)
  return __ballot_sync(0xffffffffu, x ? 1 : 0);
#elif !defined(__CUDACC__)
  return emulated::ballot(x);
#else
  return 0;
#endif
}

// Bit i: whether thread i of the warp brought the same number, below 2^bits.
HOTLOOP_INLINE std::uint32_t equal_in_warp(std::uint32_t x, [[maybe_unused]] int bits) {
#if defined(__CUDA_ARCH__)
  return __match_any_sync(0xffffffffu, x);
#else
  std::uint32_t equal = 0xffffffffu;
  for (int bit = 0; bit < bits; ++bit) {
    const bool set = (x >> bit & 1u) != 0;
    const std::uint32_t with = ballot(set);
    equal &= set ? with : ~with;
  }
  return equal;
#endif
}

// What any thread of the warp wrote before, all of it read after.
HOTLOOP_INLINE void warp_barrier() {
#if defined(__CUDA_ARCH__)
  __syncwarp();
#elif !defined(__CUDACC__)
  static_cast<void>(emulated::ballot(true));
#endif
}

HOTLOOP_INLINE int count_bits(std::uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __popc(x);
#else
  return std::popcount(x);
#endif
}
HOTLOOP_INLINE int lowest_bit(std::uint32_t x) {  // of x != 0
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(x)) - 1;
#else
  return std::countr_zero(x);
#endif
}

HOTLOOP_INLINE void device_fence() {
#if defined(__CUDA_ARCH__)
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

// What a kernel only reads, in global memory: one access, of 16 bytes at a time where T is larger.
template <class T>
HOTLOOP_INLINE T read_global(const T* at) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 2) {
    return std::bit_cast<T>(__ldg(reinterpret_cast<const unsigned short*>(at)));
  } else if constexpr (sizeof(T) == 4) {
    return std::bit_cast<T>(__ldg(reinterpret_cast<const unsigned int*>(at)));
  } else if constexpr (sizeof(T) == 8) {
    return std::bit_cast<T>(__ldg(reinterpret_cast<const unsigned long long*>(at)));
  } else {
    static_assert(sizeof(T) % 16 == 0 && alignof(T) >= 16);
    struct Quads {
      uint4 quad[sizeof(T) / 16];
    } quads;
    HOTLOOP_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(T) / 16); ++i) {
      quads.quad[i] = __ldg(reinterpret_cast<const uint4*>(at) + i);
    }
    return std::bit_cast<T>(quads);
  }
#else
  return *at;
#endif
}

// Atomics on whole numbers: their order does not show in the result. The space is part of the name,
// for a generic address costs a test, and 64 bits a loop. Two return what was there before.
HOTLOOP_INLINE std::uint32_t add_shared(std::uint32_t* at, std::uint32_t x) {
#if defined(__CUDA_ARCH__)
  std::uint32_t before;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(at))), "r"(x)
               : "memory");
  return before;
#else
  const std::uint32_t before = *at;
  *at += x;
  return before;
#endif
}
HOTLOOP_INLINE std::uint32_t add_global(std::uint32_t* at, std::uint32_t x) {
#if defined(__CUDA_ARCH__)
  std::uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(at)), "r"(x)
               : "memory");
  return before;
#else
  const std::uint32_t before = *at;
  *at += x;
  return before;
#endif
}
HOTLOOP_INLINE void add_global(std::uint64_t* at, std::uint64_t x) {
#if defined(__CUDA_ARCH__)
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(at)), "l"(x) : "memory");
#else
  *at += x;
#endif
}
HOTLOOP_INLINE void max_global(std::uint64_t* at, std::uint64_t x) {
#if defined(__CUDA_ARCH__)
  asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(at)), "l"(x) : "memory");
#else
  *at = *at < x ? x : *at;
#endif
}

HOTLOOP_INLINE void max_global(std::uint32_t* at, std::uint32_t x) {
#if defined(__CUDA_ARCH__)
  asm volatile("red.relaxed.gpu.global.max.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(at)), "r"(x) : "memory");
#else
  *at = *at < x ? x : *at;
#endif
}

// A number and when it was sent. One 128-bit access each way, which the memory model promises to be
// whole (PTX ISA 8.3, sm_70): a reader that sees the epoch sees the number, without a fence between the two.
struct alignas(16) Letter {
  std::uint64_t number;
  std::uint64_t epoch;
};
HOTLOOP_INLINE void send(Letter* to, std::uint64_t number, std::uint64_t epoch) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "{\n\t.reg .b128 letter;\n\tmov.b128 letter, {%1, %2};\n\t"
      "st.relaxed.gpu.global.b128 [%0], letter;\n\t}"
      :
      : "l"(__cvta_generic_to_global(to)), "l"(number), "l"(epoch)
      : "memory");
#else
  *to = {number, epoch};
#endif
}
HOTLOOP_INLINE Letter look(const Letter* at) {
#if defined(__CUDA_ARCH__)
  Letter letter;
  asm volatile(
      "{\n\t.reg .b128 letter;\n\tld.relaxed.gpu.global.b128 letter, [%2];\n\t"
      "mov.b128 {%0, %1}, letter;\n\t}"
      : "=l"(letter.number), "=l"(letter.epoch)
      : "l"(__cvta_generic_to_global(at))
      : "memory");
  return letter;
#else
  return *at;
#endif
}
// Waits for the letter of this epoch. The sender is resident, for the launch is cooperative.
HOTLOOP_INLINE std::uint64_t receive(const Letter* at, std::uint64_t epoch) {
  for (;;) {
    const Letter letter = look(at);
    if (letter.epoch == epoch) return letter.number;
#if !defined(__CUDACC__)
    emulated::wait();
#endif
  }
}

}  // namespace hotloop::cuda
