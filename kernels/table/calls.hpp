// The calls of a table in device memory. No CUDA header is needed to make them.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/rules.hpp"
#include "table/store/layout.hpp"

namespace hotloop::table::gpu {

// Whether unknown keys may enter that a batch holds so often; in the order in which the batch first has them.
using Ask =
    std::function<void(std::int64_t n, const std::uint64_t* keys, const std::uint32_t* counts, std::uint8_t* admitted)>;

struct Keys {
  const std::uint64_t* data = nullptr;
  std::int64_t count = 0;
};

// Rows outside the table, `stride` bytes apart.
struct Rows {
  char* data = nullptr;
  std::int64_t stride = 0;
};

struct Moment {
  const std::uint64_t* scores = nullptr;  // (n,)
  std::uint64_t epoch = 0;
  std::uint32_t time = 0;
};

// All arrays of calls are in device memory, but for those of exports and imports, which are in the host's.
struct UpsertCall {
  const std::uint64_t* keys = nullptr;
  std::int64_t n = 0;
  Rows values{};  // without them rows of known keys stay and new ones are initialised
  Moment moment{};
  const Ask* ask = nullptr;
  bool keep_evicted = false;
  std::uint32_t* rows = nullptr;  // (n,) out
  std::uint8_t* found = nullptr;  // (n,) out, optional
};

enum class Mode : std::int32_t { kSum, kMean, kMax };

struct BagCall {
  const std::uint64_t* keys = nullptr;
  const std::uint32_t* rows = nullptr;
  const std::int64_t* offsets = nullptr;
  const float* weights = nullptr;
  std::int64_t n = 0, count = 0;
  Mode mode = Mode::kSum;
};

struct UpdateCall {
  RuleSpec spec{};
  std::uint32_t time = 0;
  std::uint64_t seed = 0;
  const float* grad = nullptr;  // (count, dim)
  std::int64_t grad_stride = 0;
  const std::int64_t* sizes = nullptr;
  const std::int64_t* largest = nullptr;
  bool counts = true;  // of positions that lost their row; the host waits for the number
};

// In host memory; null where not wanted or not given.
struct HostRows {
  std::uint64_t* keys = nullptr;
  Rows values{}, state{};
  std::uint64_t* scores = nullptr;
  std::uint32_t* times = nullptr;
};

inline void check_count(std::int64_t n) {
  if (n <= 0x7FFFFFFF) return;
  throw std::length_error("[Table] keys: expected at most 2^31 - 1 in one call, got " + std::to_string(n) + ".");
}

class Full : public std::exception {
 public:
  const char* what() const noexcept override { return "full"; }
};

}  // namespace hotloop::table::gpu
