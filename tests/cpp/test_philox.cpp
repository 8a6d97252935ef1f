// SPDX-License-Identifier: Apache-2.0
#include "core/philox.hpp"

#include <cstdint>

#include "check.hpp"

using namespace hotloop;

namespace {

void known(Philox4x32 counter, std::uint32_t key0, std::uint32_t key1, Philox4x32 answer) {
  const Philox4x32 found = philox4x32_10(counter, key0, key1);
  for (int i = 0; i < 4; ++i) CHECK(found.word[i] == answer.word[i]);
}

}  // namespace

// kat_vectors of Random123, "philox 4x32 10".
TEST(known_answers) {
  known({{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}});
  known({{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u, {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}});
  known({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0xa4093822u, 0x299f31d0u,
        {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}});
}

TEST(counter_is_item_then_offset_and_key_is_seed) {
  const std::uint64_t seed = 0x299f31d0a4093822u, item = 0x85a308d3243f6a88u, offset = 0x0370734413198a2eu;
  const Philox4x32 found = philox(seed, offset, item);
  CHECK(found.word[0] == 0xd16cfe09u && found.word[3] == 0x24126ea1u);
}

TEST(uniform_is_never_zero_and_may_be_one) {
  CHECK(uniform_open_closed(0) == 0x1p-24f);
  CHECK(uniform_open_closed(255) == 0x1p-24f);
  CHECK(uniform_open_closed(256) == 0x1p-23f);
  CHECK(uniform_open_closed(~0u) == 1.0f);
}

TEST_MAIN
