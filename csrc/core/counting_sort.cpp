// SPDX-License-Identifier: Apache-2.0
// A stable counting sort in passes (stable_pass.hpp).
//
// Up to kMostBins keys one pass over the keys themselves is enough. Above, passes of 11 bits go from the lowest digit
// to the highest and move items that carry their key: 8 bytes each if key and position fit in them, else 16.
#include "core/counting_sort.hpp"

#include <algorithm>
#include <bit>
#include <memory>
#include <type_traits>
#include <vector>

#include "core/parallel.hpp"
#include "core/stable_pass.hpp"

namespace hotloop {

namespace {

constexpr std::int64_t kMostBins = 65536;  // counters of one thread in L2: 512 KiB
constexpr int kDigitBits = 11;             // 2048 counters: 16 KiB, half of L1
constexpr std::int64_t kGrain = 32768;     // items worth a thread

struct Narrow {  // key and position below 2^32
  std::uint64_t both;
  Narrow() = default;
  Narrow(std::uint64_t key, std::int64_t at) : both(key << 32 | static_cast<std::uint64_t>(at)) {}
  std::uint64_t key() const { return both >> 32; }
  std::int64_t at() const { return static_cast<std::int64_t>(both & 0xffffffffu); }
};
struct Wide {
  std::uint64_t key_;
  std::int64_t at_;
  Wide() = default;
  Wide(std::uint64_t key, std::int64_t at) : key_(key), at_(at) {}
  std::uint64_t key() const { return key_; }
  std::int64_t at() const { return at_; }
};

// By digits, the least significant first. `largest`: the largest key that occurs.
template <class Item, class Key>
void radix_sort(const Key* keys, std::int64_t n, std::uint64_t largest, std::int64_t* order, std::int64_t* offsets,
                std::int64_t num_keys) {
  const auto size = static_cast<std::size_t>(n);
  std::unique_ptr<Item[]> items(new Item[size]), next(new Item[size]);
  for (std::int64_t i = 0; i < n; ++i) items[i] = Item(static_cast<std::uint64_t>(keys[i]), i);
  for (int shift = 0; shift < static_cast<int>(std::bit_width(largest)); shift += kDigitBits) {
    const auto digit = [&](std::int64_t i) {
      return static_cast<std::int64_t>(items[i].key() >> shift & ((1u << kDigitBits) - 1));
    };
    stable_pass(n, std::int64_t{1} << kDigitBits, kGrain, nullptr, digit,
                [&](std::int64_t i, std::int64_t to) { next[to] = items[i]; });
    items.swap(next);
  }
  for (std::int64_t i = 0; i < n; ++i) order[i] = items[i].at();
  if (offsets == nullptr) return;
  std::int64_t key = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    while (key <= static_cast<std::int64_t>(items[i].key())) offsets[key++] = i;
  }
  while (key <= num_keys) offsets[key++] = n;
}

// The largest key; or -1, and in `bad` the position of the first one outside [0, num_keys).
template <class Key>
std::int64_t largest_key(const Key* keys, std::int64_t n, std::int64_t num_keys, std::int64_t& bad) {
  using Unsigned = std::make_unsigned_t<Key>;  // where those below 0 are the largest
  std::uint64_t all = 0;
  const std::int64_t blocks = n / kGrain + 1;
  std::vector<std::uint64_t> largest(static_cast<std::size_t>(blocks), 0);
  parallel_for(blocks, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t b = first; b < last; ++b) {
      Unsigned most = 0;
      const std::int64_t end = std::min(n, (b + 1) * kGrain);
      for (std::int64_t i = b * kGrain; i < end; ++i) most = std::max(most, static_cast<Unsigned>(keys[i]));
      largest[static_cast<std::size_t>(b)] = most;
    }
  });
  for (std::uint64_t each : largest) all = std::max(all, each);
  bad = -1;
  if (n == 0 || all < static_cast<std::uint64_t>(num_keys)) return static_cast<std::int64_t>(all);
  bad = 0;
  while (keys[bad] >= 0 && static_cast<std::int64_t>(keys[bad]) < num_keys) ++bad;
  return -1;
}

template <class Key>
std::int64_t sort(const Key* keys, std::int64_t n, std::int64_t num_keys, std::int64_t* order, std::int64_t* counts,
                  std::int64_t* offsets) {
  std::int64_t bad = -1;
  const std::int64_t largest = largest_key(keys, n, num_keys, bad);
  if (bad >= 0) return bad;
  std::unique_ptr<std::int64_t[]> own;
  if (offsets == nullptr && counts != nullptr) {
    own.reset(new std::int64_t[static_cast<std::size_t>(num_keys) + 1]);
    offsets = own.get();
  }
  if (largest < kMostBins && (offsets == nullptr || num_keys <= kMostBins)) {
    const std::int64_t bins = offsets != nullptr ? num_keys : largest + 1;
    if (bins > 0) {
      stable_pass(
          n, bins, kGrain, offsets, [&](std::int64_t i) { return static_cast<std::int64_t>(keys[i]); },
          [&](std::int64_t i, std::int64_t to) { order[to] = i; });
    } else if (offsets != nullptr) {
      offsets[0] = 0;
    }
  } else if (largest <= std::int64_t{0xffffffff} && n <= std::int64_t{0xffffffff}) {
    radix_sort<Narrow>(keys, n, static_cast<std::uint64_t>(largest), order, offsets, num_keys);
  } else {
    radix_sort<Wide>(keys, n, static_cast<std::uint64_t>(largest), order, offsets, num_keys);
  }
  if (counts != nullptr) {
    for (std::int64_t k = 0; k < num_keys; ++k) counts[k] = offsets[k + 1] - offsets[k];
  }
  return -1;
}

}  // namespace

std::int64_t counting_sort(const void* keys, Dtype dtype, std::int64_t n, std::int64_t num_keys, std::int64_t* order,
                           std::int64_t* counts, std::int64_t* offsets) {
  return with_integer(dtype, [&](auto key) {
    return sort(static_cast<const decltype(key)*>(keys), n, num_keys, order, counts, offsets);
  });
}

std::int64_t first_outside(const void* keys, Dtype dtype, std::int64_t n, std::int64_t num_keys) {
  std::int64_t bad = -1;
  with_integer(dtype, [&](auto key) { largest_key(static_cast<const decltype(key)*>(keys), n, num_keys, bad); });
  return bad;
}

}  // namespace hotloop
