// SPDX-License-Identifier: Apache-2.0
// The gradients of expert rows: written past the caches where there are many of them, while the next row of the experts
// is asked for. Those rows lie anywhere, and a line written through the caches is read first. Included behind
// row_access.hpp: the loops here are compiled for the level.

constexpr std::int64_t kStrip = 256;      // columns between two requests for memory, a multiple of the lanes
constexpr std::int64_t kLarge = 1 << 24;  // bytes of a result that the caches would not hold until it is read

// Copies to memory that is not read again soon, past the caches: the line that is written is not read first. `from` is
// in cache. A fence must follow before others may read it.
inline void stream(void* to, const void* from, std::int64_t bytes) {
  auto* out = static_cast<char*>(to);
  const auto* in = static_cast<const char*>(from);
#if defined(__x86_64__)
  constexpr std::int64_t kLine = 64;
  const std::int64_t odd =
      std::min(bytes, (kLine - static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out) % kLine)) % kLine);
  __builtin_memcpy(out, in, static_cast<std::size_t>(odd));
  std::int64_t at = odd;
  for (; at + kLine <= bytes; at += kLine) {
#if HOTLOOP_SIMD_LEVEL == 2
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + at), _mm512_loadu_si512(in + at));
#elif HOTLOOP_SIMD_LEVEL == 1
    for (int i = 0; i < 64; i += 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + at + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + at + i)));
    }
#else
    for (int i = 0; i < 64; i += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + at + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + at + i)));
    }
#endif
  }
  out += at;
  in += at;
  bytes -= at;
#endif
  __builtin_memcpy(out, in, static_cast<std::size_t>(bytes));
}

inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// <x, y>, and to = weight * x; asks for the memory of `next` meanwhile, which lies anywhere.
template <class S, class R>
double dot_and_scale(const R* x, const S* y, R weight, std::int64_t n, S* to, const S* next, bool past_caches) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(S));
  R lane[kLanes] = {};
  S strip[kStrip];
  for (std::int64_t first = 0; first < n; first += kStrip) {
    const std::int64_t count = n - first < kStrip ? n - first : kStrip;
    for (std::int64_t j = 0; j < count; j += kLine) __builtin_prefetch(next + first + j);
    add_dot(x + first, y + first, count, lane);
    S* out = past_caches ? strip : to + first;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j) put_narrow(out[j], weight * x[first + j]);
    if (past_caches) stream(to + first, strip, count * static_cast<std::int64_t>(sizeof(S)));
  }
  return sum_of(lane);
}
