// SPDX-License-Identifier: Apache-2.0
// The table in device memory without a GPU: kernels/table on an emulated one, with the sorts of the standard library,
// against a plain map per bucket and against the formulas of the CPU.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.hpp"
#include "emulated_table.hpp"
#include "table/rows/row_rules.hpp"
#include "table/store/floats.hpp"
#include "table/store/initialize.hpp"

using namespace hotloop;
using namespace hotloop::table;
using namespace hotloop::table::gpu;
using namespace hotloop::test;

namespace {

struct Row {
  Floats values;
  std::uint64_t score = 0;
  std::uint32_t time = 0;
  bool operator==(const Row&) const = default;
};

// Keys in buckets, one after the other: what the table in device memory says it does.
class Model {
 public:
  Model(const Settings& s, std::uint64_t buckets, std::size_t most) : s_(s), buckets_(buckets), most_(most) {}

  struct Gone {
    Key key;
    std::uint64_t score;
    Floats values;
    bool operator==(const Gone&) const = default;
  };
  std::map<Key, Row> rows;

  Floats first(Key key) const {
    Floats drawn(static_cast<std::size_t>(s_.dim));
    initialize_row()(s_.initializer, s_.first, s_.second, s_.seed, key, s_.dim, drawn.data());
    return drawn;
  }
  std::vector<Gone> upsert(const std::vector<Key>& keys, const Floats* values, const std::vector<std::uint64_t>* scores,
                           std::uint64_t epoch, std::uint32_t time, std::uint64_t tick) {
    std::map<std::uint64_t, std::vector<std::size_t>> unknown;  // by hash
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const auto at = rows.find(keys[i]);
      if (at == rows.end())
        unknown[place_hash(keys[i], kPlaceSeed)].push_back(i);
      else
        use(at->second, i, values, scores, epoch, time, tick, false);
    }
    std::vector<Gone> gone;
    for (const auto& [hash, positions] : unknown) {
      const Key key = keys[positions[0]];
      Row row{first(key), 0, 0};
      for (const std::size_t i : positions) use(row, i, values, scores, epoch, time, tick, i == positions[0]);
      std::vector<Key> mates;
      for (const auto& [k, r] : rows) {
        if (bucket_of(place_hash(k, kPlaceSeed), buckets_) == bucket_of(hash, buckets_)) mates.push_back(k);
      }
      if (mates.size() >= most_) {
        const Key low = *std::min_element(mates.begin(), mates.end(), [&](Key a, Key b) {
          return std::pair(rows[a].score, a) < std::pair(rows[b].score, b);
        });
        if (s_.strategy != Strategy::kLfu && row.score < rows[low].score) {
          if (values != nullptr) gone.push_back({key, row.score, row.values});
          continue;
        }
        gone.push_back({low, rows[low].score, rows[low].values});
        rows.erase(low);
      }
      rows[key] = row;
    }
    return gone;
  }

 private:
  void use(Row& row, std::size_t i, const Floats* values, const std::vector<std::uint64_t>* scores, std::uint64_t epoch,
           std::uint32_t time, std::uint64_t tick, bool fresh) const {
    const auto dim = static_cast<std::ptrdiff_t>(s_.dim), at = static_cast<std::ptrdiff_t>(i) * dim;
    if (values != nullptr) row.values.assign(values->begin() + at, values->begin() + at + dim);
    row.time = std::max(row.time, time);
    row.score = next_score(s_.strategy, Use{scores != nullptr ? (*scores)[i] : 1, epoch, tick, scores != nullptr, true},
                           fresh, row.score);
  }

  Settings s_;
  std::uint64_t buckets_;
  std::size_t most_;
};

Batch upsert(EmulatedTable& t, const std::vector<Key>& keys, const Floats* values = nullptr,
             const std::vector<std::uint64_t>* scores = nullptr, std::uint64_t epoch = 0, std::uint32_t time = 0,
             bool keep = false, const Ask* ask = nullptr) {
  Batch b(keys);
  if (values != nullptr) b.call.values = rows_of(*values, t.shape().dim);
  b.call.stamp = {scores != nullptr ? scores->data() : nullptr, epoch, time};
  b.call.keep_evicted = keep;
  b.call.ask = ask;
  t.upsert(b.call);
  return b;
}

Keys view(const std::vector<Key>& keys) { return {keys.data(), static_cast<std::int64_t>(keys.size())}; }

struct Found {
  Floats values;
  std::vector<std::uint8_t> found;
  std::vector<std::uint64_t> scores;
};
Found find(EmulatedTable& t, const std::vector<Key>& keys) {
  const auto n = keys.size(), dim = static_cast<std::size_t>(t.shape().dim);
  Found f{Floats(n * dim, std::nanf("")), std::vector<std::uint8_t>(n, 7), std::vector<std::uint64_t>(n, 7)};
  t.find(view(keys), rows_of(f.values, t.shape().dim), f.found.data(), f.scores.data());
  return f;
}

std::map<Key, Row> content(EmulatedTable& t, std::uint64_t since = 0) {
  std::map<Key, Row> all;
  const std::int64_t step = 200;
  const auto dim = static_cast<std::size_t>(t.shape().dim);
  for (std::int64_t begin = 0; begin < t.slots(); begin += step) {
    std::vector<Key> keys(step);
    std::vector<std::uint64_t> scores(step);
    std::vector<std::uint32_t> times(step);
    Floats values(step * (dim + 1));  // rows that are apart
    const Export out{keys.data(), rows_of(values, t.shape().dim + 1), {}, scores.data(), times.data()};
    const std::int64_t m = t.export_rows(begin, begin + step, since, out);
    for (std::size_t i = 0; i < static_cast<std::size_t>(m); ++i) {
      const auto at = values.begin() + static_cast<std::ptrdiff_t>(i * (dim + 1));
      CHECK(!all.contains(keys[i]));
      all[keys[i]] = {Floats(at, at + static_cast<std::ptrdiff_t>(dim)), scores[i], times[i]};
    }
  }
  return all;
}

const std::vector<Key> kOddKeys = {0, ~Key{0}, Key{1} << 63, 1, 2};

std::vector<Key> draw_keys(std::mt19937_64& g, std::size_t n, std::uint64_t range) {
  std::vector<Key> keys(n);
  for (Key& k : keys) {
    const std::uint64_t r = g() % range;
    k = r < kOddKeys.size() ? kOddKeys[r] : mix64(r);
  }
  return keys;
}
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

Settings settings_of(std::int64_t dim, Strategy strategy = Strategy::kNone, std::int64_t max_rows = kMaxRows) {
  Settings s;
  s.dim = dim;
  s.strategy = strategy;
  s.max_rows = max_rows;
  s.capacity = std::min<std::int64_t>(max_rows, 100);
  s.initializer = Initializer::kNormal;
  s.second = 1.0f;
  s.seed = 11;
  return s;
}

// Keys of one bucket of a table with so many.
std::vector<Key> bucket_mates(std::size_t n, std::uint64_t buckets, std::uint64_t bucket) {
  std::vector<Key> keys;
  for (Key k = 0; keys.size() < n; ++k) {
    if (bucket_of(place_hash(k, kPlaceSeed), buckets) == bucket) keys.push_back(k);
  }
  return keys;
}

}  // namespace

TEST(verbs_against_a_map) {
  for (const std::int64_t dim : {1, 4, 7, 33}) {
    std::mt19937_64 g(static_cast<std::uint64_t>(dim));
    Settings s = settings_of(dim);
    s.times = true;
    EmulatedTable t(s, EmulatedMachine{});
    Model model(s, ~0ull, ~std::size_t{0});
    const auto d = static_cast<std::size_t>(dim);
    for (int round = 0; round < 14; ++round) {
      const std::size_t n = round == 3 ? 0 : 1 + g() % 180;
      const std::vector<Key> keys = draw_keys(g, n, 500);
      const Floats values = draw(g, n * d);
      const auto time = static_cast<std::uint32_t>(g() % 9);
      if (round % 5 <= 1) {
        std::set<Key> known;
        for (const auto& [k, r] : model.rows) known.insert(k);
        const bool given = round % 5 == 0;
        const Batch b = upsert(t, keys, given ? &values : nullptr, nullptr, 0, time);
        model.upsert(keys, given ? &values : nullptr, nullptr, 0, time, 0);
        for (std::size_t i = 0; i < n; ++i) {
          CHECK(b.rows[i] != kNoRow && b.found[i] == (known.insert(keys[i]).second ? 0 : 1));
          CHECK(t.store().keys[b.rows[i]] == keys[i]);
        }
      } else if (round % 5 <= 3) {
        const bool add = round % 5 == 3;
        std::vector<std::uint8_t> found(n, 7);
        t.assign(view(keys), rows_of(values, dim), {nullptr, 0, time}, add, found.data());
        std::map<Key, Floats> sums;
        for (std::size_t i = 0; i < n; ++i) {
          const auto at = model.rows.find(keys[i]);
          CHECK(found[i] == (at != model.rows.end() ? 1 : 0));
          if (at == model.rows.end()) continue;
          at->second.time = std::max(at->second.time, time);
          Floats& sum = sums.try_emplace(keys[i], d, 0.0f).first->second;
          for (std::size_t j = 0; j < d; ++j) {
            if (add)
              sum[j] += values[i * d + j];
            else
              at->second.values[j] = values[i * d + j];
          }
        }
        if (add) {
          for (const auto& [k, sum] : sums) {
            for (std::size_t j = 0; j < d; ++j) model.rows[k].values[j] += sum[j];
          }
        }
      } else {
        std::vector<std::uint8_t> found(n, 7);
        t.erase(view(keys), found.data());
        for (std::size_t i = 0; i < n; ++i) CHECK(found[i] == model.rows.erase(keys[i]));
      }
      CHECK(t.size() == static_cast<std::int64_t>(model.rows.size()));
      CHECK(content(t) == model.rows);
    }
    const std::vector<Key> asked = draw_keys(g, 300, 1000);
    const Found f = find(t, asked);
    int hits = 0;
    for (std::size_t i = 0; i < asked.size(); ++i) {
      const auto at = model.rows.find(asked[i]);
      const Floats wanted = at == model.rows.end() ? Floats(d, 0.0f) : at->second.values;
      CHECK(f.found[i] == (at != model.rows.end()));
      const auto from = f.values.begin() + static_cast<std::ptrdiff_t>(i * d);
      CHECK(same_bits(wanted, Floats(from, from + dim)));
      hits += f.found[i];
    }
    CHECK(hits > 20 && hits < 280);
    CHECK(t.slots() > 2 * kSlots);  // it grew from two buckets
    t.clear();
    CHECK(t.size() == 0 && content(t).empty());
  }
}

TEST(first_rows_are_those_of_the_cpu) {
  for (const Initializer kind : {Initializer::kConstant, Initializer::kUniform, Initializer::kNormal}) {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
      for (const std::int64_t dim : {1, 6, 64, 131}) {
        Settings s = settings_of(dim);
        s.dtype = dtype;
        s.initializer = kind;
        s.first = -0.25f;
        s.second = 0.75f;
        EmulatedTable t(s, EmulatedMachine{});
        const Batch b = upsert(t, kOddKeys);
        for (std::size_t i = 0; i < kOddKeys.size(); ++i) {
          Floats drawn(static_cast<std::size_t>(dim));
          initialize_row()(kind, s.first, s.second, s.seed, kOddKeys[i], dim, drawn.data());
          std::vector<char> stored(static_cast<std::size_t>(dim * item_size(dtype)));
          store_floats(dtype, drawn.data(), stored.data(), dim);
          CHECK(std::memcmp(stored.data(), row_at(t.store(), t.shape(), b.rows[i]), stored.size()) == 0);
        }
      }
    }
  }
}

TEST(evictions_against_buckets_of_a_map) {
  const Strategy all[] = {Strategy::kLru, Strategy::kLfu, Strategy::kEpochLru, Strategy::kEpochLfu, Strategy::kCustom};
  for (const Strategy strategy : all) {
    std::int64_t refused = 0, left = 0;
    for (const std::int64_t max_rows : {1, 90, 256, 300}) {
      std::mt19937_64 g(static_cast<std::uint64_t>(max_rows) * 8 + static_cast<std::uint64_t>(strategy));
      Settings s = settings_of(3, strategy, max_rows);
      s.times = true;
      s.capacity = max_rows;
      EmulatedTable t(s, EmulatedMachine{});
      const auto buckets = static_cast<std::uint64_t>(t.slots() / kSlots);
      const auto most = static_cast<std::size_t>(max_rows) / buckets;
      CHECK(t.capacity() == static_cast<std::int64_t>(most * buckets));
      Model model(s, buckets, most);
      for (int round = 0; round < 9; ++round) {
        const std::size_t n = 1 + g() % (round == 0 ? 500 : 150);
        const std::vector<Key> keys = draw_keys(g, n, 900);
        const Floats values = draw(g, n * 3);
        std::vector<std::uint64_t> scores(n);
        for (auto& x : scores) x = g() % 50 + (strategy == Strategy::kCustom && round % 2 == 0 ? 40 : 0);
        const bool given = g() % 2 == 0, scored = strategy == Strategy::kCustom || g() % 2 == 0, keep = g() % 3 != 0;
        const std::uint64_t epoch = g() % 4;
        const auto time = static_cast<std::uint32_t>(g() % 50);
        const Batch b = upsert(t, keys, given ? &values : nullptr, scored ? &scores : nullptr, epoch, time, keep);
        const auto gone =
            model.upsert(keys, given ? &values : nullptr, scored ? &scores : nullptr, epoch, time, t.tick());
        CHECK(content(t) == model.rows);
        CHECK(t.size() == static_cast<std::int64_t>(model.rows.size()) && t.size() <= max_rows);
        for (std::size_t i = 0; i < n; ++i) {
          CHECK((b.rows[i] != kNoRow) == model.rows.contains(keys[i]));
          CHECK(b.rows[i] == kNoRow || t.store().keys[b.rows[i]] == keys[i]);
          refused += b.rows[i] == kNoRow ? 1 : 0;
        }
        left += static_cast<std::int64_t>(gone.size());
        CHECK(t.evicted() == (keep ? static_cast<std::int64_t>(gone.size()) : 0));
        if (!keep || t.evicted() != static_cast<std::int64_t>(gone.size())) continue;
        std::vector<Key> k(gone.size());
        std::vector<std::uint64_t> sc(gone.size());
        Floats v(gone.size() * 3);
        t.take_evicted(k.data(), rows_of(v, 3), sc.data());
        for (std::size_t i = 0; i < gone.size(); ++i) {
          const auto at = v.begin() + static_cast<std::ptrdiff_t>(i * 3);
          CHECK((gone[i] == Model::Gone{k[i], sc[i], Floats(at, at + 3)}));
        }
      }
      const Found f = find(t, draw_keys(g, 50, 900));
      for (const std::uint64_t score : f.scores) CHECK(score == 0 || strategy != Strategy::kNone);
    }
    CHECK(left > 0 && refused > 0);
  }
}

TEST(the_seed_decides_the_bucket) {
  // Keys that share a bucket under one seed are spread under another.
  const std::uint64_t buckets = 8;
  std::vector<Key> keys;
  for (Key k = 0; keys.size() < 200; ++k) {
    if (bucket_of(place_hash(k, 1), buckets) == 3) keys.push_back(k);
  }
  for (const std::uint64_t seed : {1u, 2u}) {
    Settings s = settings_of(3, Strategy::kLru, static_cast<std::int64_t>(buckets) * kSlots);
    s.capacity = s.max_rows;
    s.hash_seed = seed;
    EmulatedTable t(s, EmulatedMachine{});
    CHECK(t.slots() == static_cast<std::int64_t>(buckets) * kSlots);
    upsert(t, keys);
    CHECK(t.size() == (seed == 1 ? kSlots : 200));
    std::int64_t there = 0;
    for (const std::uint8_t f : find(t, keys).found) there += f;
    CHECK(there == t.size());
  }
}

TEST(scores_stay_at_the_top_and_clocks_go_on) {
  constexpr std::uint64_t kTop = 0x7FFFFFFFFFFFFFFFu;
  EmulatedTable uses(settings_of(3, Strategy::kLfu, 100), EmulatedMachine{});
  const std::vector<Key> keys(300, 7);  // more than a tile
  const std::vector<std::uint64_t> scores(keys.size(), kTop - 5);
  for (int round = 0; round < 2; ++round) {
    upsert(uses, keys, nullptr, &scores);
    CHECK(content(uses).at(7).score == kTop);
  }
  EmulatedTable clock(settings_of(3, Strategy::kEpochLru, 100), EmulatedMachine{});
  upsert(clock, {1}, nullptr, nullptr, 1);
  clock.set_tick(0xFFFFFFFBu);
  for (Key k = 2; k < 9; ++k) upsert(clock, {k}, nullptr, nullptr, 1);
  std::uint64_t before = 0;
  for (const auto& [key, row] : content(clock)) {
    CHECK(row.score >> 32 == 1 && (key == 1 || row.score > before));
    before = row.score;
  }
}

TEST(a_bucket_keeps_the_highest_scores) {
  Settings s = settings_of(2, Strategy::kCustom, 256);
  EmulatedTable t(s, EmulatedMachine{});
  const auto buckets = static_cast<std::uint64_t>(t.slots() / kSlots);
  CHECK(buckets == 2);
  std::mt19937_64 g(5);
  std::vector<Key> keys = bucket_mates(400, buckets, 1);
  std::vector<std::uint64_t> scores(keys.size());
  for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = 1000 + i;
  std::shuffle(scores.begin(), scores.end(), g);
  for (std::size_t at = 0; at < keys.size(); at += 100) {
    const auto from = static_cast<std::ptrdiff_t>(at), to = from + 100;
    const std::vector<Key> part(keys.begin() + from, keys.begin() + to);
    const std::vector<std::uint64_t> their(scores.begin() + from, scores.begin() + to);
    upsert(t, part, nullptr, &their);
  }
  std::set<Key> wanted;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (scores[i] >= 1000 + keys.size() - kSlots) wanted.insert(keys[i]);
  }
  std::set<Key> got;
  for (const auto& [k, r] : content(t)) got.insert(k);
  CHECK(got == wanted);
}

TEST(a_table_that_evicts_grows_first) {
  Settings s = settings_of(2, Strategy::kLru, 2000);
  s.capacity = 10;
  EmulatedTable t(s, EmulatedMachine{});
  std::mt19937_64 g(6);
  const std::int64_t small = t.slots();
  CHECK(small < 1100);
  for (int round = 0; round < 12; ++round) {
    const std::vector<Key> keys = draw_keys(g, 400, 1u << 30);
    const Batch b = upsert(t, keys);
    CHECK(round > 2 || std::count(b.rows.begin(), b.rows.end(), kNoRow) == 0);
    CHECK(t.size() <= 2000);
  }
  CHECK(t.slots() > small && t.capacity() <= 2000 && t.capacity() >= 1750 && t.size() > 1700);
  const std::int64_t slots = t.slots();
  t.reserve(1'000'000);
  CHECK(t.slots() == slots);
}

TEST(a_full_table_refuses_before_it_writes) {
  Settings s = settings_of(2, Strategy::kNone, 150);
  EmulatedTable t(s, EmulatedMachine{});
  std::mt19937_64 g(3);
  std::vector<Key> keys = draw_keys(g, 400, 100000);
  std::sort(keys.begin(), keys.end());
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  const std::vector<Key> first(keys.begin(), keys.begin() + 150), mixed(keys.begin() + 100, keys.begin() + 151);
  upsert(t, first);
  const auto before = content(t);
  const Floats values = draw(g, 2 * mixed.size());
  CHECK(error_of([&] { upsert(t, mixed, &values); }) == "full" && t.size() == 150 && content(t) == before);
  upsert(t, first, nullptr);  // known keys still are welcome
  CHECK(content(t) == before);
}

TEST(growth_that_finds_no_memory_changes_nothing) {
  EmulatedMachine machine;
  const auto state = machine.state;
  {
    EmulatedTable t(settings_of(8), machine);
    std::mt19937_64 g(4);
    const std::vector<Key> some = draw_keys(g, 120, 100000), many = draw_keys(g, 3000, 100000);
    upsert(t, some);
    const auto before = content(t);
    const std::int64_t slots = t.slots(), held = state->held;
    int failures = 0;
    for (std::int64_t more = 0; more < 400'000; more += 9'000) {
      state->budget = held + more;
      if (error_of([&] { upsert(t, many); }).empty()) break;
      ++failures;
      state->budget = std::int64_t{1} << 40;
      // A doubling that was finished may stay; rows and their number are as before.
      CHECK(content(t) == before && t.size() == static_cast<std::int64_t>(before.size()));
    }
    CHECK(failures > 3 && t.slots() > slots);
    state->budget = std::int64_t{1} << 40;
    upsert(t, many);
    const Found f = find(t, many);
    CHECK(std::all_of(f.found.begin(), f.found.end(), [](auto x) { return x == 1; }));
    for (const auto& [k, r] : before) CHECK(content(t).at(k) == r);
  }
  CHECK(state->held == 0 && state->blocks.empty());
}

// Each allocation of an upsert that updates, inserts, evicts and keeps who leaves fails in turn.
TEST(an_upsert_without_memory_changes_nothing) {
  std::int64_t failures = 0;
  for (std::int64_t which = 1;; ++which) {
    Settings s = settings_of(3, Strategy::kLru, 256);
    s.versions = s.times = true;
    s.capacity = 256;
    EmulatedMachine machine;
    const auto state = machine.state;
    EmulatedTable t(s, machine);
    std::mt19937_64 g(9);
    const std::vector<Key> first = draw_keys(g, 300, 100000), next = draw_keys(g, 200, 100000);
    for (auto at = first.begin(); at != first.end(); at += 10) upsert(t, {at, at + 10});  // little scratch is kept
    std::vector<Key> mixed(first.begin() + 100, first.begin() + 200);
    mixed.insert(mixed.end(), next.begin(), next.end());
    const Floats values = draw(g, 3 * mixed.size());
    const auto before = content(t);
    const std::uint64_t mark = t.mark();
    state->fails_in = which;
    const bool failed = !error_of([&] { upsert(t, mixed, &values, nullptr, 0, 5, true); }).empty();
    state->fails_in = 0;
    if (!failed) {
      CHECK(t.evicted() > 0 && content(t) != before);
      break;
    }
    ++failures;
    CHECK(content(t) == before && t.size() == static_cast<std::int64_t>(before.size()) && t.erased_since(mark).empty());
  }
  CHECK(failures > 5);
}

TEST(admission_is_asked_once_per_key_in_order) {
  EmulatedTable t(settings_of(3), EmulatedMachine{});
  upsert(t, {5});
  const std::vector<Key> keys = {9, 5, 7, 9, 8, 7, 9};
  std::vector<Key> asked;
  std::vector<std::uint32_t> counts;
  const Ask ask = [&](std::int64_t n, const std::uint64_t* k, const std::uint32_t* c, std::uint8_t* in) {
    for (std::int64_t i = 0; i < n; ++i) {
      asked.push_back(k[i]);
      counts.push_back(c[i]);
      in[i] = k[i] != 7;
    }
  };
  const Batch b = upsert(t, keys, nullptr, nullptr, 0, 0, false, &ask);
  CHECK((asked == std::vector<Key>{9, 7, 8} && counts == std::vector<std::uint32_t>{3, 2, 1}));
  CHECK((b.found == std::vector<std::uint8_t>{0, 1, 0, 1, 0, 0, 1}));
  CHECK(b.rows[2] == kNoRow && b.rows[5] == kNoRow && b.rows[0] == b.rows[6] && b.rows[0] != kNoRow && t.size() == 3);
  const Ask nobody = [](std::int64_t n, const std::uint64_t*, const std::uint32_t*, std::uint8_t* in) {
    std::fill_n(in, n, std::uint8_t{0});
  };
  const Batch none = upsert(t, {100, 9}, nullptr, nullptr, 0, 0, false, &nobody);
  CHECK(none.rows[0] == kNoRow && none.rows[1] == b.rows[0] && t.size() == 3);
}

TEST(a_replica_takes_more_rows_than_its_bound_and_knows_what_changed) {
  Settings s = settings_of(3);
  s.max_rows = 10;
  s.times = s.versions = true;
  EmulatedTable t(s, EmulatedMachine{});
  std::vector<Key> keys(25);
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = 3 * i;
  Floats values(75, 2.0f);
  std::vector<std::uint32_t> times(25, 7);
  const Export in{keys.data(), rows_of(values, 3), {}, nullptr, times.data()};
  CHECK(error_of([&] { t.import_rows(view(keys), in, false); }) == "full" && t.size() == 0);
  t.import_rows(view(keys), in, true);
  CHECK(t.size() == 25 && content(t).size() == 25);
  const std::uint64_t mark = t.mark();
  CHECK(!t.changed_since(mark) && t.changed_since(mark - 1));
  upsert(t, {3, 6}, nullptr, nullptr, 0, 90);  // uses that leave their second
  CHECK(t.changed_since(mark) && content(t, mark).size() == 2);
  const std::uint64_t second = t.mark();
  std::uint8_t found = 0;
  t.erase_host({keys.data(), 1}, &found);
  CHECK(found == 1 && t.changed_since(second) && !t.changed_since(t.mark()));
}

TEST(export_and_import_expiry_and_erasures) {
  Settings s = settings_of(3, Strategy::kCustom, 512);
  s.times = s.versions = true;
  s.initial_state = {1.5f, 2.5f};
  EmulatedTable t(s, EmulatedMachine{}), u(s, EmulatedMachine{});
  std::mt19937_64 g(8);
  const std::vector<Key> keys = draw_keys(g, 200, 5000);
  std::vector<std::uint64_t> scores(keys.size());
  for (auto& x : scores) x = g() % 1000 + 1;
  upsert(t, keys, nullptr, &scores, 0, 70);
  const std::uint64_t mark = t.mark();
  CHECK(content(t, mark).empty());
  const std::vector<Key> few(keys.begin(), keys.begin() + 20);
  const std::vector<std::uint64_t> their(scores.begin(), scores.begin() + 20);
  const Floats values = draw(g, 60);
  upsert(t, few, &values, &their, 0, 90);
  CHECK(content(t, mark).size() == std::set<Key>(few.begin(), few.end()).size());

  std::vector<Key> k(512);
  Floats v(512 * 3), st(512 * 2);
  std::vector<std::uint64_t> sc(512);
  std::vector<std::uint32_t> ti(512);
  const Export all{k.data(), rows_of(v, 3), rows_of(st, 2), sc.data(), ti.data()};
  const std::int64_t m = t.export_rows(0, t.slots(), 0, all);
  CHECK(m == t.size());
  for (std::size_t i = 0; i < static_cast<std::size_t>(m); ++i) st[2 * i] = static_cast<float>(i);
  u.import_rows({k.data(), m}, all, false);
  CHECK(content(u) == content(t));
  Floats st2(512 * 2);
  std::vector<Key> k2(512);
  u.export_rows(0, u.slots(), 0, {k2.data(), all.values, rows_of(st2, 2), sc.data(), ti.data()});
  std::map<Key, float> state_of;
  for (std::size_t i = 0; i < static_cast<std::size_t>(m); ++i) state_of[k[i]] = st[2 * i];
  for (std::size_t i = 0; i < static_cast<std::size_t>(m); ++i) {
    CHECK(state_of.at(k2[i]) == st2[2 * i] && st2[2 * i + 1] == 2.5f);
  }

  const std::uint64_t before = u.mark();
  const std::int64_t expired = u.expire(90);
  CHECK(expired == m - static_cast<std::int64_t>(std::set<Key>(few.begin(), few.end()).size()));
  CHECK(expired > 0 && u.size() == m - expired);
  for (const auto& [key, row] : content(u)) CHECK(row.time == 90);
  CHECK(static_cast<std::int64_t>(u.erased_since(before).size()) == expired && u.erased_since(u.mark()).empty());
  std::vector<std::uint8_t> found(few.size());
  u.erase_host(view(few), found.data());
  CHECK(u.size() == 0 && std::count(found.begin(), found.end(), 1) == m - expired);
  upsert(u, few, nullptr, &their);
  CHECK(static_cast<std::int64_t>(u.erased_since(before).size()) == expired);  // who came back is not erased
}

TEST_MAIN
