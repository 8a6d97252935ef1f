// SPDX-License-Identifier: Apache-2.0
// A machine for kernels/table/basic_table.cuh whose warps are fibers: all of a table in device memory but cub and the
// CUDA runtime then runs in a test. Fresh memory is poisoned, and a budget lets allocations fail.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "emulated_gpu.hpp"
#include "kernels/table/basic_table.cuh"

namespace hotloop::test {

struct EmulatedMachine {
  struct State {
    std::mt19937_64 random{1};
    std::int64_t held = 0, budget = std::int64_t{1} << 40;
    std::int64_t fails_in = 0;  // allocations from now, or never
    std::vector<std::pair<void*, std::int64_t>> blocks;
  };
  std::shared_ptr<State> state = std::make_shared<State>();

  struct Entered {
    ~Entered() {}
  };
  Entered enter() const { return {}; }

  void* allocate(std::size_t bytes) {
    if (state->fails_in > 0 && --state->fails_in == 0) throw std::runtime_error("out of memory");
    if (state->held + static_cast<std::int64_t>(bytes) > state->budget) throw std::runtime_error("out of memory");
    void* at = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(at, 0xA5, bytes);
    state->held += static_cast<std::int64_t>(bytes);
    state->blocks.emplace_back(at, bytes);
    return at;
  }
  void release(void* at) {
    const auto is_it = [&](const auto& x) { return x.first == at; };
    const auto b = std::find_if(state->blocks.begin(), state->blocks.end(), is_it);
    state->held -= b->second;
    state->blocks.erase(b);
    std::free(at);
  }
  void fill(void* at, int byte, std::size_t bytes) { std::memset(at, byte, bytes); }
  void upload(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  void download(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  void copy(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

  void use(void*) {}
  template <class Body>
  void run(const Body& body, std::int64_t floats, table::gpu::Buffers<EmulatedMachine>&) {
    run_warps<float>(body, state->random, 8, floats, std::nanf(""));
  }

  void select(const std::uint8_t* flags, std::int64_t n, std::uint32_t* which, std::uint32_t* count,
              table::gpu::Buffers<EmulatedMachine>&) {
    *count = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      if (flags[i] != 0) which[(*count)++] = static_cast<std::uint32_t>(i);
    }
  }
  template <class Key>
  static std::vector<std::uint32_t> order_of(const Key* keys, std::int64_t n) {
    std::vector<std::uint32_t> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) { return keys[a] < keys[b]; });
    return order;
  }
  std::int64_t select_room(std::int64_t) { return 1; }
  void sort_hashes(std::uint64_t* hashes, std::uint32_t* positions, std::int64_t n,
                   table::gpu::Buffers<EmulatedMachine>&) {
    const std::vector<std::uint64_t> h(hashes, hashes + n);
    const std::vector<std::uint32_t> p(positions, positions + n);
    const std::vector<std::uint32_t> order = order_of(h.data(), n);
    for (std::size_t i = 0; i < order.size(); ++i) {
      hashes[i] = h[order[i]];
      positions[i] = p[order[i]];
    }
  }
  void sort_slots(const std::uint32_t* slots, std::int64_t n, int bits, std::uint32_t* sorted, std::uint32_t* positions,
                  table::gpu::Buffers<EmulatedMachine>&) {
    std::vector<std::uint32_t> low(slots, slots + n);
    for (std::uint32_t& s : low) s &= bits >= 32 ? ~0u : (1u << bits) - 1u;  // as a radix sort sees them
    const std::vector<std::uint32_t> order = order_of(low.data(), n);
    for (std::size_t i = 0; i < order.size(); ++i) {
      sorted[i] = slots[order[i]];
      positions[i] = order[i];
    }
  }
};

using EmulatedTable = table::gpu::BasicTable<EmulatedMachine>;

using Key = std::uint64_t;
using Floats = std::vector<float>;

inline Floats draw(std::mt19937_64& g, std::size_t n) {
  std::normal_distribution<float> normal;
  Floats x(n);
  for (float& v : x) v = normal(g);
  return x;
}
// Rows of a matrix of floats that are `width` long.
inline table::Values rows_of(const Floats& x, std::int64_t width) {
  return {reinterpret_cast<char*>(const_cast<float*>(x.data())), width * 4};
}

// A call of upsert with its outputs.
struct Batch {
  explicit Batch(const std::vector<Key>& keys) : rows(keys.size()), found(keys.size(), 7) {
    call.keys = {keys.data(), static_cast<std::int64_t>(keys.size())};
    call.rows = rows.data();
    call.found = found.data();
  }
  Batch(Batch&&) = default;
  std::vector<std::uint32_t> rows;
  std::vector<std::uint8_t> found;
  table::gpu::UpsertCall call;
};

}  // namespace hotloop::test
