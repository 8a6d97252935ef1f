// SPDX-License-Identifier: Apache-2.0
// Which ids keep their slot when new ones compete for it, over a whole table at once.
#pragma once

#include <cstdint>
#include <vector>

namespace hotloop::table {

enum class MchPolicy { kLfu, kLru, kDistanceLfu };

// Slots hold ids, counts and the step of the last access; the last slot is never used. All arrays are updated.
struct MchCall {
  std::int64_t slots;
  std::int64_t* slot_ids;     // (slots,)
  std::int64_t* slot_counts;  // (slots,)
  std::int64_t* slot_last;    // (slots,)
  std::uint8_t* slot_used;    // (slots,)
  std::int64_t incoming;
  const std::int64_t* ids;       // (incoming,), distinct
  const std::int64_t* counts;    // (incoming,)
  const std::int64_t* last;      // (incoming,)
  const std::uint8_t* admitted;  // (incoming,), or null: all
  std::int64_t now;
  MchPolicy policy;
  double decay_exponent;
  std::int64_t* mapping;  // (incoming,): the slot of each id, slots - 1 for those without one
};

struct MchResult {
  std::vector<std::int64_t> refilled;     // slots that were given a new id, best of the evicted first
  std::vector<std::int64_t> evicted_ids;  // what they held; meaningless where `was_used` is 0
  std::vector<std::uint8_t> was_used;
  std::int64_t duplicate = -1;  // the first incoming id that stands twice: nothing was changed then
};

MchResult mch_evict_batch(const MchCall& call);

}  // namespace hotloop::table
