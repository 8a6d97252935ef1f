// SPDX-License-Identifier: Apache-2.0
// Function qualifiers shared by host and device code.
#pragma once

#if defined(__CUDACC__)
#define HOTLOOP_INLINE __host__ __device__ __forceinline__
#else
// always_inline so that a head compiled at baseline is inlined into, and vectorised with, the wider
// instruction set of the loop that calls it.
#define HOTLOOP_INLINE inline __attribute__((always_inline))
#endif

// Before a loop over the few inputs of a head: unrolled early, its arrays become registers and the loop
// over rows around it vectorises.
#if defined(__CUDACC__)
#define HOTLOOP_UNROLL _Pragma("unroll")
#elif defined(__clang__)
#define HOTLOOP_UNROLL _Pragma("unroll")
#else
#define HOTLOOP_UNROLL _Pragma("GCC unroll 16")
#endif
