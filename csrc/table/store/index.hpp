// SPDX-License-Identifier: Apache-2.0
// From keys to rows: buckets of one cache line, probed in order.
//
// A bucket has twelve slots, each a byte of the hash (the tag) and a row number. The row holds the key, so no key is
// reserved and two keys never share a row. A key lives in its home bucket or, if that was full, in one of the next.
// Every bucket counts the keys that went past it, and a search ends at a bucket with a count of 0. No key ever moves,
// so readers need no lock: the key in the row proves what they found.
//
// Bytes per key at a load of 0.85: 64 / 12 / 0.85 = 6.3, and in the row 8 for the key and 1/8 for its live bit.
#pragma once

#include <bit>
#include <cstdint>

#include "core/memory.hpp"
#include "table/hash.hpp"
#include "table/store/layout.hpp"
#include "table/store/seqlock.hpp"

namespace hotloop::table {

static_assert(std::endian::native == std::endian::little, "tag i is byte i of a word");

struct alignas(64) Bucket {
  static constexpr int kSlots = 12;
  static constexpr std::uint32_t kAll = (1u << kSlots) - 1;
  static constexpr std::uint32_t kLock = 1u << 12;
  static constexpr std::uint32_t kPassed = 1u << 13;  // one more key that went past
  static constexpr std::uint32_t kMostPassed = ~0u << 13;

  std::uint64_t tags_low;      // of slots 0 to 7
  std::uint32_t tags_high;     // of slots 8 to 11
  std::uint32_t header;        // bits 0-11: slot used; 12: locked; 13 and up: keys that went past, at the top for good
  std::uint32_t rows[kSlots];  // plus one; 0 in a free slot, and in one that is claimed but not filled yet

  std::uint32_t read_header() const { return __atomic_load_n(&header, __ATOMIC_ACQUIRE); }
  std::uint32_t row(int slot) const { return __atomic_load_n(&rows[slot], __ATOMIC_ACQUIRE) - 1u; }  // kNoRow for 0

  // Slots whose tag may be this one: all that are, and rarely one more (a borrow); the key in the row decides.
  std::uint32_t match(std::uint8_t tag) const {
#if defined(__SSE2__) && !defined(__SANITIZE_THREAD__)
    const __m128i tags = _mm_load_si128(reinterpret_cast<const __m128i*>(this));
    return static_cast<std::uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(tags, _mm_set1_epi8(static_cast<char>(tag))))) &
           kAll;
#endif
    constexpr std::uint64_t kOnes = 0x0101010101010101ull, kHigh = 0x8080808080808080ull;
    const std::uint64_t pattern = kOnes * tag;
    const std::uint64_t a = __atomic_load_n(&tags_low, __ATOMIC_RELAXED) ^ pattern;
    const std::uint64_t b = __atomic_load_n(&tags_high, __ATOMIC_RELAXED) ^ (pattern & 0xFFFFFFFFull);
    return mask8((a - kOnes) & ~a & kHigh) | mask8((b - (kOnes & 0xFFFFFFFFull)) & ~b & (kHigh & 0xFFFFFFFFull)) << 8;
  }

  // Held while a key of this home is inserted or erased; given back whatever happens.
  class Holding {
   public:
    explicit Holding(Bucket& bucket) : bucket_(bucket) { bucket.lock(); }
    ~Holding() { bucket_.unlock(); }
    Holding(const Holding&) = delete;
    Holding& operator=(const Holding&) = delete;

   private:
    Bucket& bucket_;
  };

  void lock() {
    for (int rounds = 0; (__atomic_fetch_or(&header, kLock, __ATOMIC_ACQUIRE) & kLock) != 0;) {
      while ((__atomic_load_n(&header, __ATOMIC_RELAXED) & kLock) != 0) spin(rounds);
    }
  }
  void unlock() { __atomic_fetch_and(&header, ~kLock, __ATOMIC_RELEASE); }

  // Takes a free slot for itself, or says -1.
  int claim() {
    std::uint32_t h = __atomic_load_n(&header, __ATOMIC_RELAXED);
    for (;;) {
      const std::uint32_t free = ~h & kAll;
      if (free == 0) return -1;
      const int slot = std::countr_zero(free);
      if (__atomic_compare_exchange_n(&header, &h, h | (1u << slot), true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        return slot;
    }
  }
  void publish(int slot, std::uint8_t tag, std::uint32_t row) {
    unsigned char* tags = reinterpret_cast<unsigned char*>(this);
    __atomic_store_n(&rows[slot], row + 1u, __ATOMIC_RELEASE);
    __atomic_store_n(tags + slot, tag, __ATOMIC_RELEASE);
  }
  // The row number is cleared before the slot is freed: in a slot that the next key has claimed but not filled, a
  // search must not find the row of the last key, which may be back in another slot with the same row.
  void vacate(int slot) {
    __atomic_store_n(&rows[slot], 0u, __ATOMIC_RELAXED);
    __atomic_fetch_and(&header, ~(1u << slot), __ATOMIC_RELEASE);
  }
  // A count that has reached its top says no more how many there were, so it stays there until the index is rebuilt:
  // searches for keys that are nowhere then go on where they could end, and no key is missed.
  void passed(bool more) {
    std::uint32_t h = __atomic_load_n(&header, __ATOMIC_RELAXED);
    do {
      if (h >= kMostPassed) return;
    } while (!__atomic_compare_exchange_n(&header, &h, more ? h + kPassed : h - kPassed, true, __ATOMIC_RELEASE,
                                          __ATOMIC_RELAXED));
  }

  // For the only writer: plain loads and stores, in an order that readers may follow.
  bool full() const { return (header & kAll) == kAll; }
  void publish_alone(std::uint8_t tag, std::uint32_t row) {
    const int slot = std::countr_zero(~header & kAll);
    publish(slot, tag, row);
    __atomic_store_n(&header, header | (1u << slot), __ATOMIC_RELEASE);
  }
  void passed_alone() {
    if (header < kMostPassed) __atomic_store_n(&header, header + kPassed, __ATOMIC_RELEASE);
  }

 private:
  // Bit i from the high bit of byte i.
  static std::uint32_t mask8(std::uint64_t high) {
    return static_cast<std::uint32_t>(((high >> 7) * 0x0102040810204080ull) >> 56);
  }
};
static_assert(sizeof(Bucket) == 64);

class Index {
 public:
  explicit Index(std::int64_t buckets) : count_(buckets), pages_(bytes(), bytes() >= (1 << 20)) {
    buckets_ = static_cast<Bucket*>(pages_.data());
  }

  std::int64_t buckets() const { return count_; }
  std::size_t bytes() const { return static_cast<std::size_t>(count_) * sizeof(Bucket); }

  // The upper bits say where, the lowest byte is the tag.
  static std::uint8_t tag(std::uint64_t hash) { return static_cast<std::uint8_t>(hash); }
  Bucket* home(std::uint64_t hash) const { return buckets_ + bucket_of(hash, static_cast<std::uint64_t>(count_)); }
  Bucket* next(Bucket* b) const { return b + 1 == buckets_ + count_ ? buckets_ : b + 1; }

  // Threads may have the buckets to themselves, as equal ranges of them.
  std::int64_t owner(std::uint64_t hash, std::int64_t threads) const {
    const auto bucket = static_cast<std::int64_t>(bucket_of(hash, static_cast<std::uint64_t>(count_)));
    return bucket * threads / count_;
  }
  // Behind the range of a thread.
  const Bucket* end_of(std::int64_t thread, std::int64_t threads) const {
    return buckets_ + ((thread + 1) * count_ + threads - 1) / threads;
  }

  // Slot and bucket of a key, by a test of rows; false if it is not there.
  struct Place {
    Bucket* bucket = nullptr;
    int slot = -1;
    std::uint32_t row = kNoRow;
    explicit operator bool() const { return bucket != nullptr; }
  };
  template <class IsMine>
  Place search(std::uint64_t hash, IsMine&& is_mine) const {
    Bucket* b = home(hash);
    for (std::int64_t seen = 0; seen < count_; ++seen, b = next(b)) {
      const std::uint32_t header = b->read_header();
      for (std::uint32_t m = b->match(tag(hash)) & header; m != 0; m &= m - 1) {
        const int slot = std::countr_zero(m);
        const std::uint32_t row = b->row(slot);
        if (row != kNoRow && is_mine(row)) return {b, slot, row};
      }
      if (header < Bucket::kPassed) break;
    }
    return {};
  }

  // Enters a row whose key is known to be absent. There is room: the caller counted.
  void place(std::uint64_t hash, std::uint32_t row) {
    Bucket* const first = home(hash);
    int slot;
    Bucket* b = first;
    for (; (slot = b->claim()) < 0;) b = next(b);
    for (Bucket* p = first; p != b; p = next(p)) p->passed(true);
    b->publish(slot, tag(hash), row);
  }
  // The same for the only writer of the buckets before `end`. Room there is asked for first: null if there is none.
  Bucket* room_before(const Bucket* end, std::uint64_t hash) const {
    Bucket* b = home(hash);
    for (; b->full();) {
      if (++b == end) return nullptr;
    }
    return b;
  }
  void place_alone(Bucket* b, std::uint64_t hash, std::uint32_t row) {
    for (Bucket* p = home(hash); p != b; ++p) p->passed_alone();
    b->publish_alone(tag(hash), row);
  }
  void remove(std::uint64_t hash, const Place& place) {
    place.bucket->vacate(place.slot);
    for (Bucket* p = home(hash); p != place.bucket; p = next(p)) p->passed(false);
  }

 private:
  std::int64_t count_;
  Pages pages_;
  Bucket* buckets_ = nullptr;
};

}  // namespace hotloop::table
