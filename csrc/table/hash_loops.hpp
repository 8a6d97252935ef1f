// SPDX-License-Identifier: Apache-2.0
// Hashing many keys at once.
#pragma once

#include <cstdint>

namespace hotloop::table {

void salted_hash_bucket(std::int64_t n, const std::int64_t* keys, std::uint64_t salt, std::uint64_t buckets,
                        std::int64_t* out);

// String i is bytes[offsets[i]] to bytes[offsets[i + 1]].
void hash_strings(std::int64_t n, const unsigned char* bytes, const std::int64_t* offsets, std::int64_t* out);

}  // namespace hotloop::table
