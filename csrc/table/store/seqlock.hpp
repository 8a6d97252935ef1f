// SPDX-License-Identifier: Apache-2.0
// Rows are read without a lock and written under one of a few thousand sequence locks.
//
// A reader notes the sequence, copies the row, and looks again: an odd or changed number means that a writer was
// there, and it copies anew. The copy races with the writer by design and is thrown away when it did; under
// ThreadSanitizer the same code copies by relaxed atomic words, so that what it reports is the protocol.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hotloop::table {

#if defined(__SANITIZE_THREAD__)
inline constexpr bool kWordByWord = true;
#else
inline constexpr bool kWordByWord = false;
#endif

inline void spin(int& rounds) {
#if defined(__x86_64__)
  _mm_pause();
#endif
  if (++rounds % 64 == 0) std::this_thread::yield();  // the owner may have lost its core
}

template <class T>
static inline T load_relaxed(const void* p) {
  return __atomic_load_n(static_cast<const T*>(p), __ATOMIC_RELAXED);
}
template <class T>
static inline void store_relaxed(void* p, T x) {
  __atomic_store_n(static_cast<T*>(p), x, __ATOMIC_RELAXED);
}

// The key in rows that hold none: fresh memory, and rows given back. 0 is also a valid key; for it the live bit of the
// row says whether the key is there (Arena::holds).
inline constexpr std::uint64_t kNobody = 0;

// A reader that finds a key in a row sees everything that was written before the key.
static inline std::uint64_t row_key(const char* row) {
  return __atomic_load_n(reinterpret_cast<const std::uint64_t*>(row), __ATOMIC_ACQUIRE);
}
static inline void publish_key(char* row, std::uint64_t key) {
  __atomic_store_n(reinterpret_cast<std::uint64_t*>(row), key, __ATOMIC_RELEASE);
}

template <class Word>
static inline void copy_words(char* to, const char* from, std::size_t& bytes, std::size_t& at, bool shared_source) {
  for (; at + sizeof(Word) <= bytes; at += sizeof(Word)) {
    Word word;
    if (shared_source) {
      word = load_relaxed<Word>(from + at);
      std::memcpy(to + at, &word, sizeof(Word));
    } else {
      std::memcpy(&word, from + at, sizeof(Word));
      store_relaxed<Word>(to + at, word);
    }
  }
}

// A call of memcpy costs as much as a short row.
static inline void copy_bytes(void* to, const void* from, std::size_t bytes) {
  if (bytes == 8)
    std::memcpy(to, from, 8);
  else
    std::memcpy(to, from, bytes);
}

// Out of a row (from) or into one (to). Parts of a row start at multiples of 4 bytes.
inline void copy_out(void* to, const void* from, std::size_t bytes) {
  if constexpr (!kWordByWord) {
    copy_bytes(to, from, bytes);
  } else {
    std::size_t at = 0;
    copy_words<std::uint32_t>(static_cast<char*>(to), static_cast<const char*>(from), bytes, at, true);
    copy_words<std::uint8_t>(static_cast<char*>(to), static_cast<const char*>(from), bytes, at, true);
  }
}
inline void copy_in(void* to, const void* from, std::size_t bytes) {
  if constexpr (!kWordByWord) {
    copy_bytes(to, from, bytes);
  } else {
    std::size_t at = 0;
    copy_words<std::uint32_t>(static_cast<char*>(to), static_cast<const char*>(from), bytes, at, false);
    copy_words<std::uint8_t>(static_cast<char*>(to), static_cast<const char*>(from), bytes, at, false);
  }
}

class SeqLocks {
 public:
  // 16 KiB: in L1, and with dozens of threads two rarely meet.
  static constexpr std::uint32_t kCount = 4096;

  SeqLocks() : sequence_(new std::atomic<std::uint32_t>[kCount]()) {}

  std::uint32_t begin_read(std::uint32_t row) const {
    const std::atomic<std::uint32_t>& s = sequence_[place(row)];
    std::uint32_t v = s.load(std::memory_order_acquire);
    for (int rounds = 0; (v & 1u) != 0; v = s.load(std::memory_order_acquire)) spin(rounds);
    return v;
  }
  bool end_read(std::uint32_t row, std::uint32_t v) const {
    // A fence orders the copy before the second look; ThreadSanitizer knows no fences, a read-modify-write it does.
    if constexpr (kWordByWord) return sequence_[place(row)].fetch_add(0, std::memory_order_acq_rel) == v;
    std::atomic_thread_fence(std::memory_order_acquire);
    return sequence_[place(row)].load(std::memory_order_relaxed) == v;
  }

  // Held while a row is written. The sequence is odd meanwhile.
  class Writing {
   public:
    Writing(const SeqLocks& locks, std::uint32_t row) : s_(locks.sequence_[place(row)]) {
      std::uint32_t v = s_.load(std::memory_order_relaxed);
      for (int rounds = 0;;) {
        if ((v & 1u) == 0) {
          // seq_cst, for Table::mark: a reader that sees the row unlocked before this sees its version, too.
          if (s_.compare_exchange_weak(v, v + 1, std::memory_order_seq_cst)) break;
          continue;
        }
        spin(rounds);
        v = s_.load(std::memory_order_relaxed);
      }
      held_ = v + 1;
      if constexpr (!kWordByWord) std::atomic_thread_fence(std::memory_order_release);
    }
    ~Writing() { s_.store(held_ + 1, std::memory_order_release); }
    Writing(const Writing&) = delete;
    Writing& operator=(const Writing&) = delete;

   private:
    std::atomic<std::uint32_t>& s_;
    std::uint32_t held_ = 0;
  };

 private:
  // Rows beside each other have their numbers in different lines: threads that share a batch are often at neighbours.
  static std::uint32_t place(std::uint32_t row) { return (row % (kCount / 16)) * 16 + row / (kCount / 16) % 16; }

  std::unique_ptr<std::atomic<std::uint32_t>[]> sequence_;
};

}  // namespace hotloop::table
