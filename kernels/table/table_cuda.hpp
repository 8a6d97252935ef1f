// A table in the memory of a CUDA device. No CUDA header is needed to use it.
//
// One table is used from one stream at a time: calls are enqueued on the stream that `use` named last, which first
// waits for what the table had enqueued on another. Calls that return numbers, and those that may insert, wait for the
// stream.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/table/calls.hpp"
#include "table/store/layout.hpp"

namespace hotloop::table::gpu {

// std::runtime_error where the device refuses: what a failed call had allocated is given back, and growth that fails
// leaves the old table as it was.
class CudaTable {
 public:
  CudaTable(const Settings& settings, int device, void* stream);
  ~CudaTable();
  CudaTable(const CudaTable&) = delete;
  CudaTable& operator=(const CudaTable&) = delete;

  void use(void* stream);  // cudaStream_t

  const Settings& settings() const;
  std::int64_t row_bytes() const;
  std::int64_t states() const;
  std::int64_t size();
  std::int64_t capacity() const;
  std::int64_t slots() const;
  std::int64_t bytes() const;
  std::uint64_t tick() const;
  void set_tick(std::uint64_t tick);
  std::uint64_t generation() const;
  void set_generation(std::uint64_t generation);
  std::uint64_t mark();

  void find(Keys keys, Rows values, std::uint8_t* found, std::uint64_t* scores);
  void locate(Keys keys, std::uint32_t* rows);
  void upsert(const UpsertCall& call);  // throws Full before anything is written
  void assign(Keys keys, Rows values, const Moment& moment, bool accumulate, std::uint8_t* found);
  void erase(Keys keys, std::uint8_t* found);
  void erase_host(Keys keys, std::uint8_t* found);
  void clear();
  void reserve(std::int64_t rows);
  std::int64_t expire(std::uint32_t time);
  std::int64_t export_rows(std::int64_t begin, std::int64_t end, std::uint64_t since, const HostRows& out);
  void import_rows(Keys keys, const HostRows& in, bool beyond);
  std::int64_t evicted() const;
  void take_evicted(std::uint64_t* keys, Rows values, std::uint64_t* scores);
  void pool(const BagCall& call, Rows out, bool wide, std::int64_t* sizes, std::int64_t* largest);
  // kept: (n, dim) of the type of the table, the rows as they were when the bags were pooled.
  void weight_gradient(const BagCall& call, Rows kept, const float* grad, std::int64_t grad_stride, float* out);
  std::int64_t update(const BagCall& call, const UpdateCall& update);
  std::vector<std::uint64_t> erased_since(std::uint64_t since);  // throws std::out_of_range
  void forget_erased(std::uint64_t until);
  bool changed_since(std::uint64_t since);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace hotloop::table::gpu
