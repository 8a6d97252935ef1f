// SPDX-License-Identifier: Apache-2.0
#include "table/hash_loops.hpp"

#include <random>

#include "core/parallel.hpp"
#include "table/hash.hpp"

namespace hotloop::table {

// 2^15 keys take about 100 us: less is not worth waking a thread.
constexpr std::int64_t kKeysPerThread = std::int64_t{1} << 15;

std::uint64_t process_seed() {
  static const std::uint64_t seed = [] {
    std::random_device device;
    return std::uint64_t{device()} << 32 | device();
  }();
  return seed;
}

void salted_hash_bucket(std::int64_t n, const std::int64_t* keys, std::uint64_t salt, std::uint64_t buckets,
                        std::int64_t* out) {
  parallel_for(n, kKeysPerThread, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      out[i] = static_cast<std::int64_t>(bucket_of(mix64(static_cast<std::uint64_t>(keys[i]) ^ salt), buckets));
    }
  });
}

void hash_strings(std::int64_t n, const unsigned char* bytes, const std::int64_t* offsets, std::int64_t* out) {
  parallel_for(n, kKeysPerThread, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      out[i] = static_cast<std::int64_t>(hash_bytes(bytes + offsets[i], offsets[i + 1] - offsets[i]));
    }
  });
}

}  // namespace hotloop::table
