// How keys become places.
#pragma once

#include <cstdint>

#include "core/macros.hpp"

namespace hotloop::table {

// The finaliser of MurmurHash3: a bijection of 64 bits, so different keys have different hashes.
HOTLOOP_INLINE std::uint64_t mix64(std::uint64_t k) {
  k ^= k >> 33;
  k *= 0xff51afd7ed558ccdull;
  k ^= k >> 33;
  k *= 0xc4ceb9fe1a85ec53ull;
  k ^= k >> 33;
  return k;
}

}  // namespace hotloop::table
