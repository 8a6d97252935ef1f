// SPDX-License-Identifier: Apache-2.0
// The two hash maps of C++ that tables are measured against, behind one C interface that takes
// arrays: libcuckoo, which many threads may use at once, and absl::flat_hash_map, which many may
// read. A header that is not there leaves its map out.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#if __has_include(<libcuckoo/cuckoohash_map.hh>)
#define HOTLOOP_CUCKOO
#include <libcuckoo/cuckoohash_map.hh>
#endif
#if __has_include(<absl/container/flat_hash_map.h>) && !defined(HOTLOOP_NO_ABSL)
#define HOTLOOP_ABSL
#include <absl/container/flat_hash_map.h>
#endif

namespace {

// How many keys ahead a loop asks for cache lines; 4, 8 and 32 took the same within 5 % on 2^24
// slots, one core of Zen 5.
constexpr int64_t kAhead = 16;

// Calls body(begin, end) on equal slices of [0, n). The threads are those of OpenMP, which stay on
// their cores: two new std::threads often start on one, and 65,536 rows then took libcuckoo 11.9 ms
// instead of 5.1.
template <class Body>
void slices(int64_t n, int threads, Body body) {
  if (threads <= 1) return body(int64_t{0}, n);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t i = 0; i < threads; ++i) {
    body(n * i / threads, n * (i + 1) / threads);
  }
}

template <class Value>
class Map {
 public:
  virtual ~Map() = default;
  virtual void insert(const int64_t* keys, const Value* values, int64_t begin, int64_t end) = 0;
  virtual void find(const int64_t* keys, int64_t begin, int64_t end, Value* values, bool* found) const = 0;
  // The rows of `arena` that the values number; zeros for a key that is not there.
  virtual void gather(const int64_t* keys, int64_t begin, int64_t end, const char* arena, int64_t row_bytes, char* rows,
                      bool* found) const = 0;
  virtual int64_t size() const = 0;
  virtual double load_factor() const = 0;
};

inline void copy_row(bool found, int64_t row, const char* arena, int64_t row_bytes, char* out) {
  if (found) {
    std::memcpy(out, arena + row * row_bytes, static_cast<size_t>(row_bytes));
  } else {
    std::memset(out, 0, static_cast<size_t>(row_bytes));
  }
}

#ifdef HOTLOOP_CUCKOO
// libcuckoo takes bucket and tag from the bits of the hash and asks for a good one: std::hash of
// an integer is the integer, so the finaliser of MurmurHash3 mixes it.
struct Mixed {
  size_t operator()(int64_t key) const noexcept {
    auto h = static_cast<uint64_t>(key);
    h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdULL;
    h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53ULL;
    return h ^ (h >> 33);
  }
};

template <class Value>
class Cuckoo final : public Map<Value> {
 public:
  explicit Cuckoo(int64_t slots) : map_(static_cast<size_t>(slots)) {}

  void insert(const int64_t* keys, const Value* values, int64_t begin, int64_t end) override {
    for (int64_t i = begin; i < end; ++i) map_.insert_or_assign(keys[i], values[i]);
  }

  void find(const int64_t* keys, int64_t begin, int64_t end, Value* values, bool* found) const override {
    for (int64_t i = begin; i < end; ++i) {
      Value value{};
      found[i] = map_.find(keys[i], value);
      values[i] = value;
    }
  }

  void gather(const int64_t* keys, int64_t begin, int64_t end, const char* arena, int64_t row_bytes, char* rows,
              bool* found) const override {
    for (int64_t i = begin; i < end; ++i) {
      Value row{};
      found[i] = map_.find(keys[i], row);
      copy_row(found[i], static_cast<int64_t>(row), arena, row_bytes, rows + i * row_bytes);
    }
  }

  int64_t size() const override { return static_cast<int64_t>(map_.size()); }
  double load_factor() const override { return map_.load_factor(); }

 private:
  libcuckoo::cuckoohash_map<int64_t, Value, Mixed> map_;
};
#endif

#ifdef HOTLOOP_ABSL
// With `ahead` > 0 a loop prefetches for the key that is so far ahead, which absl has a call for.
template <class Value>
class Flat final : public Map<Value> {
 public:
  // Room for 7/8 of the slots is what makes it allocate them.
  Flat(int64_t slots, int64_t ahead) : ahead_(ahead) { map_.reserve(static_cast<size_t>(slots - slots / 8 - 1)); }

  void insert(const int64_t* keys, const Value* values, int64_t begin, int64_t end) override {
    for (int64_t i = begin; i < end; ++i) {
      look_ahead(keys, i, end);
      map_.insert_or_assign(keys[i], values[i]);
    }
  }

  void find(const int64_t* keys, int64_t begin, int64_t end, Value* values, bool* found) const override {
    for (int64_t i = begin; i < end; ++i) {
      look_ahead(keys, i, end);
      const auto at = map_.find(keys[i]);
      found[i] = at != map_.end();
      values[i] = found[i] ? at->second : Value{};
    }
  }

  void gather(const int64_t* keys, int64_t begin, int64_t end, const char* arena, int64_t row_bytes, char* rows,
              bool* found) const override {
    for (int64_t i = begin; i < end; ++i) {
      look_ahead(keys, i, end);
      const auto at = map_.find(keys[i]);
      found[i] = at != map_.end();
      const int64_t row = found[i] ? static_cast<int64_t>(at->second) : 0;
      copy_row(found[i], row, arena, row_bytes, rows + i * row_bytes);
    }
  }

  int64_t size() const override { return static_cast<int64_t>(map_.size()); }
  double load_factor() const override { return map_.load_factor(); }

 private:
  void look_ahead(const int64_t* keys, int64_t i, int64_t end) const {
    if (ahead_ > 0 && i + ahead_ < end) map_.prefetch(keys[i + ahead_]);
  }

  absl::flat_hash_map<int64_t, Value> map_;
  const int64_t ahead_;
};
#endif

using Pairs = Map<int64_t>;
using Rows = Map<uint32_t>;

// `name`: one of "libcuckoo", "absl", "absl prefetched".
template <class Value>
std::unique_ptr<Map<Value>> make([[maybe_unused]] const char* name, [[maybe_unused]] int64_t slots) {
#ifdef HOTLOOP_CUCKOO
  if (std::strcmp(name, "libcuckoo") == 0) return std::make_unique<Cuckoo<Value>>(slots);
#endif
#ifdef HOTLOOP_ABSL
  if (std::strcmp(name, "absl") == 0) return std::make_unique<Flat<Value>>(slots, 0);
  if (std::strcmp(name, "absl prefetched") == 0) {
    return std::make_unique<Flat<Value>>(slots, kAhead);
  }
#endif
  return nullptr;
}

}  // namespace

extern "C" {

// Null where the headers of that map were not there.
void* pairs_new(const char* name, int64_t slots) { return make<int64_t>(name, slots).release(); }

void pairs_delete(void* map) { delete static_cast<Pairs*>(map); }

int64_t pairs_size(const void* map) { return static_cast<const Pairs*>(map)->size(); }

double pairs_load_factor(const void* map) { return static_cast<const Pairs*>(map)->load_factor(); }

void pairs_insert(void* map, const int64_t* keys, const int64_t* values, int64_t n, int threads) {
  slices(n, threads, [=](int64_t begin, int64_t end) { static_cast<Pairs*>(map)->insert(keys, values, begin, end); });
}

void pairs_find(const void* map, const int64_t* keys, int64_t n, int64_t* values, bool* found, int threads) {
  slices(n, threads,
         [=](int64_t begin, int64_t end) { static_cast<const Pairs*>(map)->find(keys, begin, end, values, found); });
}

void* rows_new(const char* name, int64_t slots) { return make<uint32_t>(name, slots).release(); }

void rows_delete(void* map) { delete static_cast<Rows*>(map); }

double rows_load_factor(const void* map) { return static_cast<const Rows*>(map)->load_factor(); }

// Key i gets row i.
void rows_insert(void* map, const int64_t* keys, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const auto row = static_cast<uint32_t>(i);
    static_cast<Rows*>(map)->insert(keys + i, &row, 0, 1);
  }
}

void rows_gather(const void* map, const int64_t* keys, int64_t n, const char* arena, int64_t row_bytes, char* rows,
                 bool* found, int threads) {
  slices(n, threads, [=](int64_t begin, int64_t end) {
    static_cast<const Rows*>(map)->gather(keys, begin, end, arena, row_bytes, rows, found);
  });
}
}
