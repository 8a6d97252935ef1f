// SPDX-License-Identifier: Apache-2.0
// What the calls of a table take, in host memory and in a device's.
#pragma once

#include <cstdint>
#include <exception>

#include "core/dtype.hpp"
#include "core/macros.hpp"
#include "core/rules.hpp"

namespace hotloop::table {

struct Keys {
  const std::uint64_t* data = nullptr;
  std::int64_t count = 0;
  std::uint64_t operator[](std::int64_t i) const { return data[i]; }
};

// Rows of values outside the table, `stride` bytes apart.
struct Values {
  char* data = nullptr;
  std::int64_t stride = 0;
  HOTLOOP_INLINE char* row(std::int64_t i) const { return data + i * stride; }
  explicit operator bool() const { return data != nullptr; }
};

// What a write leaves in the rows beside values.
struct Stamp {
  const std::uint64_t* scores = nullptr;  // (n,) of the caller: custom scores, or increments of LFU
  std::uint64_t epoch = 0;
  std::uint32_t time = 0;
  std::uint64_t tick = 0;  // the number of this call; 0: the table takes the next
};

// Columns of rows that are exported or imported; null where not wanted or not given.
struct Export {
  std::uint64_t* keys = nullptr;
  Values values{}, state{};
  std::uint64_t* scores = nullptr;
  std::uint32_t* times = nullptr;
};

enum class Pool : std::int32_t { kSum, kMean, kMax };

// Bag b holds the positions [offsets[b], offsets[b + 1]); without offsets every position is a bag of its own.
// A key without a row is as if it were not in the bag, and so is `padding`.
struct Bags {
  Keys keys{};
  const std::int64_t* offsets = nullptr;  // (count + 1,), checked by the caller
  std::int64_t count = 0;
  const float* weights = nullptr;  // (n,), sums only
  Pool pool = Pool::kSum;
  float scale = 1;                      // of int8 rows: what a step is worth
  const std::uint32_t* rows = nullptr;  // (n,) as a write gave them, kNoRow to leave a position out; null: look up

  HOTLOOP_INLINE std::int64_t begin(std::int64_t b) const { return offsets != nullptr ? offsets[b] : b; }
  HOTLOOP_INLINE std::int64_t end(std::int64_t b) const { return begin(b + 1); }
};

// What comes of bags. out: (count, dim), float32 or the type of the table; empty bags are zeros. sizes: (count,), how
// many keys of a bag had rows. largest: (count, dim), for kMax: the position each maximum came from, or -1.
struct Pooled {
  Values out{};
  Dtype dtype = Dtype::kFloat32;
  std::int64_t* sizes = nullptr;
  std::int64_t* largest = nullptr;
};

// Gradients of bags (count, dim), merged per row in the order of the batch and applied by the rule, every row once.
// sizes and largest: as pooling gave them.
struct Update {
  RuleSpec spec{};
  Stamp stamp{};
  std::uint64_t seed = 0;  // of stochastic rounding
  const float* grad = nullptr;
  std::int64_t grad_stride = 0;
  const std::int64_t* sizes = nullptr;
  const std::int64_t* largest = nullptr;
};

class TableFull : public std::exception {
 public:
  const char* what() const noexcept override { return "full"; }
};

}  // namespace hotloop::table
