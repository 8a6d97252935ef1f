// SPDX-License-Identifier: Apache-2.0
// Between the memories of host and device, and what all verbs of a table work with: the machine and its scratch memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/table/buffers.cuh"
#include "kernels/table/calls.hpp"

namespace hotloop::table::gpu {

template <class Machine>
class Transfers {
 public:
  explicit Transfers(Machine machine) : machine_(std::move(machine)), scratch_(machine_, true) {}

  template <class T>
  std::vector<T> host(const T* from, std::int64_t n) {
    std::vector<T> v(static_cast<std::size_t>(n));
    if (n > 0) machine_.download(v.data(), from, v.size() * sizeof(T));
    return v;
  }
  template <class T>
  void fetch(T* to, const T* from, std::int64_t n) {
    if (to != nullptr) machine_.download(to, from, static_cast<std::size_t>(n) * sizeof(T));
  }
  void fetch_rows(Values to, const char* from, std::int64_t n, std::int64_t width) {
    if (to.stride == width) return machine_.download(to.data, from, static_cast<std::size_t>(n * width));
    const std::vector<char> packed = host(from, n * width);
    for (std::int64_t i = 0; i < n; ++i) {
      std::memcpy(to.data + i * to.stride, packed.data() + i * width, static_cast<std::size_t>(width));
    }
  }
  template <class T>
  Held<Machine, T> sent(const T* from, std::int64_t n) {
    auto held = scratch_.template take<T>(n);
    machine_.upload(held.get(), from, static_cast<std::size_t>(n) * sizeof(T));
    return held;
  }
  Held<Machine, char> sent_rows(Values from, std::int64_t n, std::int64_t width) {
    if (from.stride == width) return sent(from.data, n * width);
    std::vector<char> packed(static_cast<std::size_t>(n * width));
    for (std::int64_t i = 0; i < n; ++i) {
      std::memcpy(packed.data() + i * width, from.data + i * from.stride, static_cast<std::size_t>(width));
    }
    return sent(packed.data(), n * width);
  }

  Machine machine_;
  Buffers<Machine> scratch_;  // kept for the next call
};

}  // namespace hotloop::table::gpu
