// SPDX-License-Identifier: Apache-2.0
// The hashes of this room. All but `place_hash` are part of the checkpoint format and never change: the values in
// tests/table/test_table_hashing.py pin them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/macros.hpp"

namespace hotloop::table {

// Odd, so that multiplying by them is a bijection: 2^64 / golden ratio, and a prime with as many ones as zeros.
inline constexpr std::uint64_t kFeatureFactor = 0x9E3779B97F4A7C15u;
inline constexpr std::uint64_t kChunkFactor = 0xC2B2AE3D27D4EB4Fu;
inline constexpr std::uint64_t kBytesFactor = 0x165667B19E3779F9u;

// The finaliser of MurmurHash3: a bijection of 64 bits; mix64(0) = 0.
HOTLOOP_INLINE std::uint64_t mix64(std::uint64_t k) {
  k ^= k >> 33;
  k *= 0xFF51AFD7ED558CCDu;
  k ^= k >> 33;
  k *= 0xC4CEB9FE1A85EC53u;
  k ^= k >> 33;
  return k;
}

// One salt per (feature, chunk, seed): taken out of the loop over keys.
HOTLOOP_INLINE std::uint64_t hash_salt(std::uint64_t feature, std::uint64_t chunk, std::uint64_t seed) {
  return mix64(feature * kFeatureFactor + chunk * kChunkFactor + seed);
}

HOTLOOP_INLINE std::uint64_t salted_hash(std::uint64_t key, std::uint64_t feature, std::uint64_t chunk,
                                         std::uint64_t seed) {
  return mix64(key ^ hash_salt(feature, chunk, seed));
}

// Where a key lies in one table, by the seed of that table. Files hold rows and no places, so the seed may differ from
// table to table: a caller that does not know it cannot choose keys that share a bucket. Not a cryptographic hash.
inline constexpr std::uint64_t kPlaceSeed = 0xD1B54A32D192ED03ull;
HOTLOOP_INLINE std::uint64_t place_hash(std::uint64_t key, std::uint64_t seed) { return mix64(key ^ seed); }

// For the containers of the standard library, whose own hash of a number is the number.
struct SeededHash {
  std::uint64_t seed = kPlaceSeed;
  std::size_t operator()(std::uint64_t key) const { return static_cast<std::size_t>(mix64(key ^ seed)); }
};

// The seed of hash tables that live for one call, drawn once per process. Results do not depend on it.
std::uint64_t process_seed();

// floor(h * buckets / 2^64): no division, and the high bits of h decide.
HOTLOOP_INLINE std::uint64_t bucket_of(std::uint64_t h, std::uint64_t buckets) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(h, buckets);
#else
  __extension__ using Wide = unsigned __int128;
  return static_cast<std::uint64_t>((static_cast<Wide>(h) * buckets) >> 64);
#endif
}

// 64 bits of a string: eight bytes at a time, little-endian, the last word filled up with zeros, chained by mix64
// from a start that holds the length. Not for strings chosen by an attacker: it has no secret.
inline std::uint64_t hash_bytes(const unsigned char* bytes, std::int64_t size) {
  std::uint64_t h = mix64(static_cast<std::uint64_t>(size) + kBytesFactor);
  for (; size > 0; size -= 8, bytes += 8) {
    std::uint64_t word = 0;
    if (size >= 8) {
      std::memcpy(&word, bytes, 8);
    } else {
      std::memcpy(&word, bytes, static_cast<std::size_t>(size));
    }
    h = mix64(h ^ word);
  }
  return h;
}

}  // namespace hotloop::table
