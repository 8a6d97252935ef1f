// SPDX-License-Identifier: Apache-2.0
// Tables under threads: readers, writers, growers, erasers, evictors. What the sanitizers cannot see, the rows show:
// all elements of a row are equal, and say whose they are.
#include "table/store/table.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "check.hpp"

using namespace hotloop;
using namespace hotloop::table;

namespace {

constexpr std::int64_t kDim = 64;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kRounds = 2000;
#else
constexpr int kRounds = 20000;
#endif

Settings settings(Strategy strategy = Strategy::kNone, std::int64_t max_rows = kMaxRows) {
  Settings s;
  s.dim = kDim;
  s.capacity = 1;
  s.strategy = strategy;
  s.max_rows = max_rows;
  s.times = s.versions = true;
  return s;
}

// Rows that keep neither score nor version are filled without a lock where a writer is alone.
Settings plain() {
  Settings s = settings();
  s.times = s.versions = false;
  return s;
}

// A number of its own for every thread and step.
std::uint64_t next(std::uint64_t& state) { return mix64(state += 0x9E3779B97F4A7C15ull); }

// A batch of keys below `range`, from `first` on, with rows that hold key % 1000 + 1000 * mark.
struct Batch {
  Batch(std::uint64_t& random, std::uint64_t first, std::uint64_t range, std::size_t count, int mark)
      : keys(count), values(count * kDim), rows(count), found(count) {
    for (std::size_t i = 0; i < count; ++i) {
      keys[i] = first + next(random) % range;
      for (std::int64_t j = 0; j < kDim; ++j) {
        values[i * kDim + static_cast<std::size_t>(j)] =
            static_cast<float>(keys[i] % 1000 + 1000u * static_cast<unsigned>(mark));
      }
    }
  }
  Keys view() const { return {keys.data(), static_cast<std::int64_t>(keys.size())}; }
  Values out() { return {reinterpret_cast<char*>(values.data()), kDim * 4}; }
  // Found rows are whole and their keys' own.
  bool whole() const {
    for (std::size_t i = 0; i < keys.size(); ++i) {
      if (found[i] == 0) continue;
      const float* const row = values.data() + i * kDim;
      if (static_cast<std::uint64_t>(row[0]) % 1000 != keys[i] % 1000) return false;
      for (std::int64_t j = 1; j < kDim; ++j) {
        if (row[j] != row[0]) return false;
      }
    }
    return true;
  }
  std::vector<std::uint64_t> keys;
  std::vector<float> values;
  std::vector<std::uint32_t> rows;
  std::vector<std::uint8_t> found;
};

void insert(Table& table, Batch& b, std::uint32_t time = 1, Evicted* evicted = nullptr) {
  table.upsert({.keys = b.view(),
                .values = b.out(),
                .stamp = {.time = time},
                .evicted = evicted,
                .rows = b.rows.data(),
                .found = b.found.data()});
}

// Index and rows agree: whoever is in a row is found, and there are as many as the table says.
bool consistent(const Table& table) {
  std::int64_t live = 0;
  for (std::uint32_t r = 0; r < table.arena().end(); ++r) {
    if (!table.arena().live(r)) continue;
    ++live;
    const std::uint64_t key = table.arena().key(r);
    if (table.row_of(*table.index(), key, table.hash_of(key)) != r) return false;
  }
  return live == table.size();
}

template <class... Works>
void together(Works... works) {
  std::vector<std::thread> threads;
  (threads.emplace_back(works), ...);
  for (std::thread& t : threads) t.join();
}

}  // namespace

TEST(a_slot_that_is_taken_but_not_filled_is_nobodys) {
  // The key left slot 0 and came back with the same row to slot 1, while somebody else has taken slot 0.
  Index index(1);
  const std::uint64_t hash = 0x1234;
  const auto mine = [](std::uint32_t row) { return row == 7; };
  index.place(hash, 7);
  const Index::Place before = index.search(hash, mine);
  CHECK(before && before.slot == 0);
  index.remove(hash, before);
  CHECK(!index.search(hash, mine));
  CHECK(index.home(hash)->claim() == 0);
  CHECK(!index.search(hash, mine));
  index.place(hash, 7);
  CHECK(index.search(hash, mine).slot == 1);
}

TEST(a_fresh_slot_that_is_taken_but_not_filled_is_nobodys) {
  Index index(1);
  CHECK(index.home(0)->claim() == 0);
  CHECK(!index.search(0, [](std::uint32_t row) { return row == 0; }));
}

TEST(more_keys_go_past_a_bucket_than_can_be_counted) {
  // The count of 19 bits wrapped to 0, where a search ends. At the top it stays, since it is not known any more.
  Index index(2);
  Bucket& home = *index.home(0);
  index.place(0, 1);
  const std::uint32_t used = home.read_header();
  for (int i = 0; i < (1 << 19) + 3; ++i) {
    home.passed(true);
    CHECK(home.read_header() >= Bucket::kPassed + used);
  }
  CHECK(home.read_header() == (Bucket::kMostPassed | used));
  home.passed_alone();
  CHECK(home.read_header() == (Bucket::kMostPassed | used));
  for (int i = 0; i < 1 << 19; ++i) home.passed(false);
  CHECK(home.read_header() == (Bucket::kMostPassed | used));
  Bucket& other = *index.next(&home);
  for (int i = 0; i < 9; ++i) other.passed(true);
  for (int i = 0; i < 9; ++i) other.passed(false);
  CHECK(other.read_header() == 0);
}

TEST(a_freed_row_is_no_keys) {
  // Whatever its last owners were: ~key of the last one could be asked for.
  Table table(plain());
  for (const std::uint64_t key : {7ull, 0ull, ~7ull, ~0ull}) {
    std::uint64_t random = 1;
    Batch b(random, key, 1, 1, 0);
    insert(table, b);
    const std::uint32_t row = b.rows[0];
    float out[kDim];
    CHECK(table.read(key, row, out) && table.arena().holds(row, key));
    table.erase(b.view(), b.found.data());
    for (const std::uint64_t other : {7ull, 0ull, ~7ull, ~0ull}) {
      CHECK(!table.read(other, row, out) && !table.use(other, row, {}, 0));
      CHECK(!table.edit(other, row, {}, -1, [](char*) {}));
    }
    CHECK(!table.read(0, row + 1, out));  // memory that was never a row
  }
}

TEST(candidates_for_eviction_take_bounded_memory) {
  Table table(settings(Strategy::kCustom, 1000));
  std::vector<std::uint64_t> keys(1000), scores(1000);
  std::vector<std::uint32_t> rows(1000);
  for (std::uint64_t i = 0; i < 1000; ++i) keys[i] = i, scores[i] = 1'000'000 + i;
  const auto use = [&](std::int64_t n) {
    table.upsert({.keys = {keys.data(), n}, .stamp = {.scores = scores.data()}, .rows = rows.data()});
  };
  use(1000);
  keys[0] = 5000;
  use(1);  // somebody leaves, so candidates are kept from here on
  keys[0] = 0;
  const std::int64_t before = table.bytes();
  for (std::uint64_t round = 0; round < 500; ++round) {
    for (std::uint64_t i = 1; i < 1000; ++i) scores[i] = 100'000 - round * 7 + i % 3;
    use(1000);
  }
  CHECK(table.bytes() - before < 100'000);
}

TEST(hashes_of_standard_containers_know_a_seed) {
  std::uint64_t same = 0;
  for (std::uint64_t i = 1; i < 1000; ++i) same += SeededHash{5}(i * 107897) % 107897 == SeededHash{5}(0) % 107897;
  CHECK(same < 10);
}

void writers_erasers_and_growers(const Settings& s, int writers) {
  Table table(s);
  std::atomic<int> writing{writers};
  std::atomic<bool> whole{true};
  const auto write = [&](std::uint64_t seed) {
    for (int i = 0; i < kRounds; ++i) {
      Batch b(seed, 0, 60, 16, i % 9);
      insert(table, b);
      Batch gone(seed, 0, 60, 8, 0);
      table.erase(gone.view(), gone.found.data());
      if (i % 8 == 0) {
        Batch given(seed, 0, 60, 8, 3);
        table.assign(given.view(), given.out(), {.time = 2}, false, given.found.data());
      }
    }
    --writing;
  };
  const auto read = [&](std::uint64_t seed) {
    while (writing > 0) {
      Batch b(seed, 0, 60, 16, 0);
      table.find(b.view(), b.out(), b.found.data(), nullptr);
      if (!b.whole()) whole = false;
    }
  };
  const auto grow = [&] {
    for (std::int64_t rows = 2; writing > 0; rows += 13) {
      if (rows < 20000) table.reserve(rows);
      std::this_thread::yield();
    }
  };
  const auto second = [&] {
    if (writers == 2) write(2);
  };
  together([&] { write(1); }, second, [&] { read(3); }, [&] { read(4); }, grow);
  CHECK(whole.load());
  CHECK(consistent(table));
}

TEST(rows_are_whole_under_writers_erasers_and_growers) {
  for (const int writers : {1, 2}) {
    writers_erasers_and_growers(settings(), writers);
    writers_erasers_and_growers(plain(), writers);
  }
}

TEST(writers_of_their_own_keys_lose_nothing) {
  Table table(settings());
  constexpr int kWriters = 3;
  std::vector<std::vector<int>> last(kWriters, std::vector<int>(40, -1));
  const auto write = [&](int who) {
    std::uint64_t random = static_cast<std::uint64_t>(who) * 77;
    const std::uint64_t first = static_cast<std::uint64_t>(who) * 1000;
    for (int i = 0; i < kRounds; ++i) {
      Batch b(random, first, 40, 6, i % 9);
      if (i % 3 == 2) {
        table.erase(b.view(), b.found.data());
        for (const std::uint64_t key : b.keys) last[static_cast<std::size_t>(who)][key - first] = -1;
      } else {
        insert(table, b);
        for (const std::uint64_t key : b.keys) last[static_cast<std::size_t>(who)][key - first] = i % 9;
      }
    }
  };
  together([&] { write(0); }, [&] { write(1); }, [&] { write(2); });
  std::int64_t count = 0;
  for (std::uint64_t who = 0; who < kWriters; ++who) {
    for (std::uint64_t k = 0; k < 40; ++k) {
      const std::uint64_t key = who * 1000 + k;
      const int wanted = last[who][k];
      float row[kDim];
      std::uint8_t found = 0;
      table.find({&key, 1}, {reinterpret_cast<char*>(row), sizeof row}, &found, nullptr);
      CHECK((found != 0) == (wanted >= 0));
      if (found != 0 && wanted >= 0)
        CHECK(row[kDim - 1] == static_cast<float>(k + 1000 * static_cast<std::uint64_t>(wanted)));
      count += wanted >= 0;
    }
  }
  CHECK(table.size() == count);
  CHECK(consistent(table));
}

TEST(eviction_under_readers_and_erasers) {
  for (const std::int64_t bound : {1, 3, 40}) {
    Table table(settings(Strategy::kLru, bound));
    const auto range = static_cast<std::uint64_t>(2 * bound + 1);
    std::atomic<int> writing{2};
    std::atomic<bool> whole{true}, fits{true};
    const auto write = [&](std::uint64_t seed) {
      try {
        for (int i = 0; i < kRounds / 3; ++i) {
          Evicted evicted;
          Batch b(seed, 0, range, 8, i % 9);
          insert(table, b, 1, &evicted);
          Batch one(seed, 0, range, 1, 5);  // often known when it is looked up, and evicted when it is written
          insert(table, one);
          if (evicted.keys.size() != evicted.scores.size()) whole = false;
        }
      } catch (const TableFull&) {
        fits = false;
      }
      --writing;
    };
    const auto read = [&] {
      std::uint64_t seed = 9;
      while (writing > 0) {
        Batch b(seed, 0, range, 8, 0);
        table.find(b.view(), b.out(), b.found.data(), nullptr);
        if (!b.whole()) whole = false;
        Batch gone(seed, 0, range, 2, 0);
        table.erase(gone.view(), gone.found.data());
      }
    };
    together([&] { write(1); }, [&] { write(2); }, read);
    CHECK(whole.load());
    CHECK(fits.load());
    CHECK(table.size() <= bound);
    CHECK(consistent(table));
  }
}

void scans_beside_a_writer(const Settings& s) {
  Table table(s);
  std::atomic<bool> writing{true}, whole{true};
  const auto write = [&] {
    std::uint64_t seed = 1;
    for (int i = 0; i < kRounds; ++i) {
      Batch b(seed, 0, 200, 16, i % 9);
      insert(table, b, static_cast<std::uint32_t>(i % 7));
    }
    writing = false;
  };
  const auto scan = [&] {
    constexpr std::size_t kMost = 4096;
    std::uint64_t seed = 3;
    Batch b(seed, 0, 1, kMost, 0);
    while (writing) {
      const std::uint32_t end = std::min<std::uint32_t>(table.arena().end(), kMost);
      const std::int64_t n = table.export_rows(0, end, 0, {.keys = b.keys.data(), .values = b.out()});
      for (std::size_t i = 0; i < kMost; ++i) b.found[i] = static_cast<std::int64_t>(i) < n;
      if (!b.whole()) whole = false;
      table.mark();
    }
  };
  const auto remove = [&] {
    for (std::uint32_t i = 0; writing; ++i) {
      if (s.times) table.expire(i % 7);
      if (i % 50 == 0) table.clear();
      std::this_thread::yield();
    }
  };
  together(write, scan, remove);
  CHECK(whole.load());
  CHECK(consistent(table));
}

TEST(scans_expiry_and_clearing_beside_a_writer) {
  scans_beside_a_writer(settings());
  scans_beside_a_writer(plain());
}

// Keys of one batch that find no room in the buckets of their thread, or in the table, are entered after the others:
// of one key, still in order.
TEST(of_repeated_keys_the_last_stays_through_growth) {
  for (const std::size_t count : {700u, 20000u, 150000u}) {
    Table table(plain());
    std::uint64_t random = count;
    Batch b(random, 0, count / 3, count, 0);
    for (std::size_t i = 0; i < count; ++i) b.values[i * kDim] = static_cast<float>(i);
    insert(table, b);
    std::vector<float> last(count / 3, -1.0f);
    for (std::size_t i = 0; i < count; ++i) last[b.keys[i]] = static_cast<float>(i);
    for (std::uint64_t key = 0; key < last.size(); ++key) {
      float row[kDim];
      std::uint8_t found = 0;
      table.find({&key, 1}, {reinterpret_cast<char*>(row), sizeof row}, &found, nullptr);
      CHECK((found != 0) == (last[key] >= 0));
      if (found != 0) CHECK(row[0] == last[key]);
    }
    CHECK(consistent(table));
  }
}

// What a replica takes of a table at work: readers find what is there meanwhile, nobody is evicted, and the next who
// enters evicts as many as there are too many.
TEST(rows_beyond_the_bound_stay_until_somebody_enters) {
  for (const bool trims : {false, true}) {
    Table table(settings(Strategy::kLru, 100));
    std::uint64_t random = 3;
    std::vector<std::uint64_t> scores;
    std::atomic<bool> whole = true, done = false;
    together(
        [&] {
          for (std::uint64_t first = 0; first < 3000; first += 300) {
            Batch b(random, first, 300, 300, 0);
            for (std::size_t i = 0; i < 300; ++i) {
              b.keys[i] = first + i;
              std::fill_n(&b.values[i * kDim], kDim, static_cast<float>(b.keys[i] % 1000));
              scores.push_back(5000 - b.keys[i]);
            }
            Export rows;
            rows.values = b.out();
            rows.scores = scores.data() + first;
            table.import_rows(b.view(), rows, true);
          }
          done = true;
        },
        [&] {
          std::uint64_t mine = 4;
          while (!done) {
            Batch b(mine, 0, 3000, 100, 0);
            table.find(b.view(), b.out(), b.found.data(), nullptr);
            if (!b.whole()) whole = false;
          }
        });
    CHECK(whole && table.size() == 3000 && table.capacity() == 100 && consistent(table));
    if (trims) {
      CHECK(table.trim() == 2900 && table.trim() == 0);
    } else {
      table.set_tick(9999);
      Batch one(random, 100000, 1, 1, 0);
      insert(table, one);
      CHECK(one.rows[0] != kNoRow);
    }
    CHECK(table.size() == 100 && consistent(table));
    for (std::uint64_t key = 0; key < 3000; ++key) {  // the highest scores are those of the lowest keys
      std::uint32_t row = 0;
      table.locate({&key, 1}, &row);
      CHECK((row != kNoRow) == (key < (trims ? 100u : 99u)));
    }
  }
}

TEST(changes_since_a_mark_are_seen) {
  Table table(settings());
  std::uint64_t random = 5;
  Batch b(random, 0, 50, 50, 0);
  insert(table, b);
  const std::uint64_t first = table.mark();
  CHECK(!table.changed_since(first) && table.changed_since(first - 1));
  table.use(b.keys[0], b.rows[0], {.time = 7}, 0);  // leaves its second in the row
  CHECK(table.changed_since(first));
  const std::uint64_t second = table.mark();
  CHECK(!table.changed_since(second));
  table.erase({b.keys.data(), 1}, b.found.data());
  CHECK(table.changed_since(second));
  const std::uint64_t third = table.mark();
  table.clear();
  CHECK(table.changed_since(third) && !table.changed_since(table.mark()));
}

TEST_MAIN
