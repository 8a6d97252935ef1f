// SPDX-License-Identifier: Apache-2.0
// What a table is made of: the settings of one table, and where in a row each part lies.
//
// A row is [key | score? | time? | version? | values | optimizer state], so that one probe serves lookup, pooling,
// gradient and update. What a table does not use takes no bytes.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.hpp"
#include "table/hash.hpp"

namespace hotloop::table {

inline constexpr std::uint32_t kNoRow = 0xFFFFFFFFu;
inline constexpr std::int64_t kMaxRows = 0xFFFFFFF0ll;

// kEpoch*: the caller's epoch in the upper 32 bits.
enum class Strategy : std::int32_t { kNone, kLru, kLfu, kEpochLru, kEpochLfu, kCustom };

enum class Initializer : std::int32_t { kConstant, kUniform, kNormal };

struct Settings {
  std::int64_t dim = 1;
  Dtype dtype = Dtype::kFloat32;       // kUInt8 stands for int8 rows
  std::vector<float> initial_state{};  // optimizer state of a new row; its length is the state's
  Strategy strategy = Strategy::kNone;
  bool times = false;     // last use, in seconds
  bool versions = false;  // when a row last changed, for deltas
  Initializer initializer = Initializer::kConstant;
  float first = 0, second = 0;           // constant; low and high; mean and standard deviation
  std::uint64_t seed = 0;                // of the first values
  std::uint64_t hash_seed = kPlaceSeed;  // of the places of keys, and of nothing else
  std::int64_t capacity = 0;             // rows the table starts with room for
  std::int64_t max_rows = kMaxRows;
  double max_load_factor = 0.85;
};

class RowLayout {
 public:
  explicit RowLayout(const Settings& s)
      : dim(s.dim), item(item_size(s.dtype)), states(static_cast<std::int64_t>(s.initial_state.size())) {
    std::int64_t at = 8;
    const auto place = [&](bool used, std::int64_t bytes) {
      const std::int64_t where = used ? at : -1;
      if (used) at += bytes;
      return where;
    };
    score = place(s.strategy != Strategy::kNone, 8);
    time = place(s.times, 4);
    version = place(s.versions, 4);
    values = place(true, (dim * item + 3) / 4 * 4);
    state = place(true, states * 4);
    stride = (at + 7) / 8 * 8;
  }
  std::int64_t value_bytes() const { return dim * item; }

  std::int64_t dim, item, states;
  std::int64_t score, time, version;  // byte offsets, -1 where absent
  std::int64_t values, state, stride;
};

}  // namespace hotloop::table
