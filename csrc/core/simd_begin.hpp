// SPDX-License-Identifier: Apache-2.0
// Opens the namespace and the target of one SIMD level; simd_end.hpp closes the namespace. Include every
// other header first: plain functions that stand before this line are not compiled for the level.
// GCC compiles a template with the options in force at its definition: a loop in a header that stands before
// this line stays baseline code, and what it calls of this file is not inlined into it. Loops that a
// *.simd.cpp takes from a header are therefore always_inline, or the header is included behind this line.
// The target stays in force to the end of the file, for what is instantiated there. Templates that a *.simd.cpp
// shares with other files are `static` or always_inline: a shared copy could be the AVX-512 one on a CPU
// without it. tests/cpp/check_instructions.cmake fails on baseline arithmetic in an object file of a level.
// tests/cpp/check_weak_symbols.cmake fails when an object file of a level exports a shared function.
// No include guard: used once per *.simd.cpp.
#ifndef HOTLOOP_SIMD_LEVEL
#error "a *.simd.cpp is compiled once per level; CMake sets HOTLOOP_SIMD_LEVEL"
#endif

#if HOTLOOP_SIMD_LEVEL == 2
#define HOTLOOP_SIMD_NAMESPACE simd_avx512
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi2,f16c,prefer-vector-width=512")
#endif
#elif HOTLOOP_SIMD_LEVEL == 1
#define HOTLOOP_SIMD_NAMESPACE simd_avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2,f16c")
#endif
#else
#define HOTLOOP_SIMD_NAMESPACE simd_baseline
#endif

namespace hotloop::HOTLOOP_SIMD_NAMESPACE {

inline void note_simd_level() { last_simd_level.store(HOTLOOP_SIMD_LEVEL, std::memory_order_relaxed); }
