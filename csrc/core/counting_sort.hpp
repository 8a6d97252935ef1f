// SPDX-License-Identifier: Apache-2.0
// Stable sort of small integers by counting: the order in which keys rise, equal keys as they came.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"

namespace hotloop {

// keys: (n,), int32 or int64. order: (n,), the positions of the keys in rising order. counts: (num_keys,) and offsets:
// (num_keys + 1,), how often each key occurs and where its run begins in `order`; either may be nullptr. The result is
// unique, so it does not depend on threads. Working memory is O(n) for any num_keys.
// Returns -1, or the position of a key outside [0, num_keys); then nothing is written.
std::int64_t counting_sort(const void* keys, Dtype dtype, std::int64_t n, std::int64_t num_keys, std::int64_t* order,
                           std::int64_t* counts, std::int64_t* offsets);

// The position of the first key outside [0, num_keys), or -1.
std::int64_t first_outside(const void* keys, Dtype dtype, std::int64_t n, std::int64_t num_keys);

}  // namespace hotloop
