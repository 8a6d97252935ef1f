// SPDX-License-Identifier: Apache-2.0
// The first values of a row: a function of (seed, key) alone, so that a key gets the same row on any machine, in
// any order, at any instruction set. Compiled without contraction of a b + c.
#pragma once

#include <cstdint>

#include "core/simd.hpp"
#include "table/store/layout.hpp"

namespace hotloop::table {

// Element j comes from word j mod 4 of Philox(seed, offset j / 4, item key): uniform first + (second - first) u,
// normal first + second z (Box-Muller on words (0, 1) and (2, 3)), or the constant `first`.
using InitializeRow = void (*)(Initializer kind, float first, float second, std::uint64_t seed, std::uint64_t key,
                               std::int64_t dim, float* out);
InitializeRow initialize_row();

}  // namespace hotloop::table

HOTLOOP_FOR_EACH_SIMD(void table_initialize_row(hotloop::table::Initializer kind, float first, float second,
                                                std::uint64_t seed, std::uint64_t key, std::int64_t dim, float* out);)
