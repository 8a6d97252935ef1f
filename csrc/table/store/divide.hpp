// SPDX-License-Identifier: Apache-2.0
// How a batch of keys that changes a table is divided among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/parallel.hpp"
#include "table/store/table.hpp"

namespace hotloop::table {

inline constexpr std::int64_t kKeysPerThread = 512;

inline std::int64_t threads_for(std::int64_t count) {
  return std::clamp<std::int64_t>(count / kKeysPerThread, 1, max_threads());
}

// The thread that a key belongs to, from bits of its hash that decide neither home bucket nor tag.
inline std::int64_t owner_by_hash(std::uint64_t hash, std::int64_t threads) {
  return static_cast<std::int64_t>(((hash >> 8) & 0xFFFFu) * static_cast<std::uint64_t>(threads) >> 16);
}

// Divides keys among threads by owner(key), so that one thread meets all occurrences of a key, in order: calls
// work(thread, positions, count, outcomes) on each, then put(position, outcome). Each thread has an array of outcomes
// of its own until then, since threads that wrote by turns into one array would share all of its cache lines.
// `some`: the positions, or null for [begin, begin + count).
template <class Owner, class Work, class Put>
void divide(Keys keys, const std::int64_t* some, std::int64_t begin, std::int64_t count, std::int64_t threads,
            Owner&& owner, Work&& work, Put&& put) {
  const auto position = [&](std::int64_t i) { return some != nullptr ? some[begin + i] : begin + i; };
  const auto n = static_cast<std::size_t>(count), t = static_cast<std::size_t>(threads);
  std::vector<std::int64_t> positions(n);
  std::vector<Outcome> outcomes(n);
  // ends[worker][reader]: the end of the positions that thread `reader` found for thread `worker`, in order.
  std::vector<std::size_t> ends(t * t);
  const auto each_thread = [&](auto&& body) {
    parallel_for(threads, 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t i = first; i < last; ++i) body(static_cast<std::size_t>(i));
    });
  };
  const auto each_read = [&](std::size_t reader, auto&& body) {
    for (std::int64_t i = count * static_cast<std::int64_t>(reader) / threads,
                      last = count * static_cast<std::int64_t>(reader + 1) / threads;
         i < last; ++i) {
      body(static_cast<std::size_t>(i), position(i));
    }
  };
  if (threads == 1) {
    each_read(0, [&](std::size_t i, std::int64_t at) { positions[i] = at; });
    ends[0] = n;
  } else {
    std::vector<std::uint16_t> owners(n);
    each_thread([&](std::size_t reader) {
      std::vector<std::size_t> mine(t);
      each_read(reader, [&](std::size_t i, std::int64_t at) {
        owners[i] = static_cast<std::uint16_t>(owner(keys[at]));
        ++mine[owners[i]];
      });
      for (std::size_t worker = 0; worker < t; ++worker) ends[worker * t + reader] = mine[worker];
    });
    std::exclusive_scan(ends.begin(), ends.end(), ends.begin(), std::size_t{0});
    each_thread([&](std::size_t reader) {
      std::vector<std::size_t> mine(t);
      for (std::size_t worker = 0; worker < t; ++worker) mine[worker] = ends[worker * t + reader];
      each_read(reader, [&](std::size_t i, std::int64_t at) { positions[mine[owners[i]]++] = at; });
      for (std::size_t worker = 0; worker < t; ++worker) ends[worker * t + reader] = mine[worker];
    });
  }
  const auto begin_of = [&](std::size_t worker, std::size_t reader) {
    return worker + reader == 0 ? 0 : ends[worker * t + reader - 1];
  };
  each_thread([&](std::size_t worker) {
    const std::size_t first = begin_of(worker, 0), last = ends[worker * t + t - 1];
    work(static_cast<std::int64_t>(worker), positions.data() + first, static_cast<std::int64_t>(last - first),
         outcomes.data() + first);
  });
  each_thread([&](std::size_t reader) {
    for (std::size_t worker = 0; worker < t; ++worker) {
      for (std::size_t k = begin_of(worker, reader); k < ends[worker * t + reader]; ++k) put(positions[k], outcomes[k]);
    }
  });
}

// `divide` for long batches, one slice after the other: the lists of positions of a slice stay in the cache.
inline constexpr std::int64_t kSlice = std::int64_t{1} << 16;
template <class Work, class Put>
void divide_all(const Table& table, Keys keys, Work&& work, Put&& put) {
  for (std::int64_t begin = 0; begin < keys.count; begin += kSlice) {
    const std::int64_t count = std::min(kSlice, keys.count - begin), threads = threads_for(count);
    divide(
        keys, nullptr, begin, count, threads,
        [&](std::uint64_t key) { return owner_by_hash(table.hash_of(key), threads); }, work, put);
  }
}

}  // namespace hotloop::table
