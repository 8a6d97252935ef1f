// SPDX-License-Identifier: Apache-2.0
// A table in device memory, as its callers see it. No CUDA header is needed to use it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "table/store/calls.hpp"
#include "table/store/layout.hpp"

namespace hotloop::table::gpu {

// Whether unknown keys may enter that a batch holds so often; in the order in which the batch first has them.
using Ask =
    std::function<void(std::int64_t n, const std::uint64_t* keys, const std::uint32_t* counts, std::uint8_t* admitted)>;

// All arrays of calls are in device memory, but for those of exports and imports, which are in the host's.
struct UpsertCall {
  Keys keys{};
  Values values{};  // without them rows of known keys stay and new ones are initialised
  table::Stamp stamp{};
  const Ask* ask = nullptr;
  bool keep_evicted = false;
  std::uint32_t* rows = nullptr;  // (n,) out
  std::uint8_t* found = nullptr;  // (n,) out, optional
};

inline void check_count(std::int64_t n) {
  if (n <= 0x7FFFFFFF) return;
  throw std::length_error("[Table] keys: expected at most 2^31 - 1 in one call, got " + std::to_string(n) + ".");
}

// One table is used from one stream at a time: calls are enqueued on the stream that `use` named last, which first
// waits for what the table had enqueued on another. Calls that return numbers, and those that may insert, wait for the
// stream. std::runtime_error where the device refuses: what a failed call had allocated is given back, and growth that
// fails leaves the old table as it was.
class DeviceTable {
 public:
  explicit DeviceTable(Settings settings) : settings_(std::move(settings)) {}
  virtual ~DeviceTable() = default;
  DeviceTable(const DeviceTable&) = delete;
  DeviceTable& operator=(const DeviceTable&) = delete;

  const Settings& settings() const { return settings_; }
  std::uint64_t tick() const { return tick_; }
  void set_tick(std::uint64_t tick) { tick_ = tick; }
  std::uint64_t generation() const { return generation_; }
  void set_generation(std::uint64_t g) { generation_ = g; }
  std::uint64_t mark() {
    if (generation_ >= 0xFFFFFFFEu) throw std::overflow_error("a table counts to 2^32 marks");
    return generation_++;
  }
  // Keys and rows that left in the last upsert that kept them.
  std::int64_t evicted() const { return evicted_; }

  virtual void use(void* stream) = 0;  // cudaStream_t
  virtual std::int64_t row_bytes() const = 0;
  virtual std::int64_t size() = 0;
  virtual std::int64_t capacity() const = 0;
  virtual std::int64_t slots() const = 0;
  virtual std::int64_t bytes() const = 0;

  // found, scores, values: out, null where not wanted.
  virtual void find(Keys keys, Values values, std::uint8_t* found, std::uint64_t* scores) = 0;
  virtual void locate(Keys keys, std::uint32_t* rows) = 0;
  virtual void upsert(const UpsertCall& call) = 0;  // throws TableFull before anything is written
  virtual void assign(Keys keys, Values values, const table::Stamp& stamp, bool accumulate, std::uint8_t* found) = 0;
  virtual void erase(Keys keys, std::uint8_t* found) = 0;
  virtual void erase_host(Keys keys, std::uint8_t* found) = 0;  // keys and found in host memory
  virtual void clear() = 0;
  virtual void reserve(std::int64_t rows) = 0;
  virtual std::int64_t expire(std::uint32_t time) = 0;
  // Rows of slots [begin, end) whose version is above `since`, from the front of host arrays on; says how many.
  virtual std::int64_t export_rows(std::int64_t begin, std::int64_t end, std::uint64_t since, const Export& out) = 0;
  // Puts rows back, from host arrays, as exported. beyond: of a replica; without a strategy there is no bound then.
  virtual void import_rows(Keys keys, const Export& in, bool beyond) = 0;
  virtual void take_evicted(std::uint64_t* keys, Values values, std::uint64_t* scores) = 0;
  virtual void pool(const table::Bags& bags, const Pooled& pooled) = 0;
  // kept: (n, dim) of the type of the table, the rows as they were when the bags were pooled.
  virtual void weight_gradient(const table::Bags& bags, Values kept, const float* grad, std::int64_t grad_stride,
                               float* out) = 0;
  // Says how many positions have lost their row since they were given one, where that `counts`: the host waits for it.
  virtual std::int64_t update(const table::Bags& bags, const Update& update, bool counts) = 0;
  virtual std::vector<std::uint64_t> erased_since(std::uint64_t since) = 0;  // throws std::out_of_range
  virtual void forget_erased(std::uint64_t until) = 0;
  // Whether a row was written, used or erased after `since`.
  virtual bool changed_since(std::uint64_t since) = 0;

 protected:
  Settings settings_;
  std::uint64_t tick_ = 0, generation_ = 1;
  std::int64_t evicted_ = 0;
};

std::unique_ptr<DeviceTable> cuda_table(const Settings& settings, int device, void* stream);

}  // namespace hotloop::table::gpu
