// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <random>
#include <unordered_map>
#include <vector>

#include "check.hpp"
#include "core/parallel.hpp"
#include "table/filter.hpp"
#include "table/hash.hpp"
#include "table/managed_slots.hpp"
#include "table/multiplex.hpp"

using namespace hotloop;
using namespace hotloop::table;

TEST(hashes_are_frozen) {
  CHECK(mix64(0) == 0);
  CHECK(mix64(1) == 0xB456BCFC34C2CB2Cu);
  CHECK(bucket_of(~std::uint64_t{0}, 10) == 9);
  CHECK(bucket_of(std::uint64_t{1} << 63, 10) == 5);
  const unsigned char text[] = "123456789";
  CHECK(hash_bytes(text, 8) != hash_bytes(text, 9));
  CHECK(hash_bytes(text, 0) == mix64(kBytesFactor));
}

TEST(filters_of_every_size_stay_in_their_memory) {
  std::mt19937_64 g(1);
  for (int splits : {1, 5, 7}) {
    for (std::int64_t capacity : {2 * splits, 100, 5000}) {
      CountFilter filter(capacity, splits);
      for (int i = 0; i < 20000; ++i) {
        const std::uint64_t key = g() % 3000;
        filter.prefetch(key);
        const std::uint32_t known = filter.count(key);
        CHECK(filter.add(key, static_cast<std::uint32_t>(g() % 4)) == known);
      }
      std::vector<std::uint16_t> cells(static_cast<std::size_t>(filter.splits() * filter.cells_per_split()));
      const CountFilter::State state = filter.save(cells.data());
      CountFilter other(capacity, splits);
      other.load(state, cells.data());
      for (std::uint64_t key = 0; key < 3000; ++key) CHECK(other.count(key) == filter.count(key));
      filter.clear();
      CHECK(filter.count(5) == 0);
    }
  }
}

TEST(a_trial_takes_back_what_it_added) {
  std::mt19937_64 g(3);
  for (int splits : {1, 5}) {
    CountFilter filter(200, splits), kept(200, splits);
    const auto cells_of = [](const CountFilter& f) {
      std::vector<std::uint16_t> cells(static_cast<std::size_t>(f.splits() * f.cells_per_split()));
      const CountFilter::State s = f.save(cells.data());
      for (std::int64_t n : {s.head, s.advances, s.failures}) cells.push_back(static_cast<std::uint16_t>(n));
      for (std::int64_t n : s.elements) cells.push_back(static_cast<std::uint16_t>(n));
      return cells;
    };
    for (int round = 0; round < 50; ++round) {
      const auto before = cells_of(filter);
      const std::uint64_t first = g();
      for (bool keep : {false, true}) {
        {
          const std::lock_guard lock(filter.mutex());
          CountFilter::Trial trial(filter);
          // Up to 700 keys: the ring moves on, several times round.
          for (std::uint64_t i = 0; i < 7 * static_cast<std::uint64_t>(round) * 2; ++i)
            filter.add(first % 5000 + i * i % 900, 2);
          if (keep) trial.keep();
        }
        if (!keep) CHECK(cells_of(filter) == before);
      }
      for (std::uint64_t i = 0; i < 7 * static_cast<std::uint64_t>(round) * 2; ++i)
        kept.add(first % 5000 + i * i % 900, 2);
      CHECK(cells_of(filter) == cells_of(kept));
    }
  }
}

TEST(multiplexed_gradient_is_the_transpose_of_the_lookup) {
  std::mt19937_64 g(2);
  std::normal_distribution<double> normal;
  constexpr std::int64_t kBatch = 700, kRows = 50, kTables = 2;
  for (std::int64_t dim : {1, 3, 8}) {
    std::vector<std::int64_t> single(kBatch), dense(3 * kBatch), offsets(kBatch + 1), bags;
    for (auto& v : single) v = static_cast<std::int64_t>(g());
    for (auto& v : dense) v = static_cast<std::int64_t>(g() % 9);
    for (std::size_t b = 0; b < kBatch; ++b) {
      offsets[b] = static_cast<std::int64_t>(bags.size());
      for (std::uint64_t n = g() % 150; n > 0; --n) bags.push_back(static_cast<std::int64_t>(g() % 9));
    }
    offsets[kBatch] = static_cast<std::int64_t>(bags.size());
    const auto size = [](const auto& v) { return static_cast<std::int64_t>(v.size()); };
    for (Combiner combiner : {Combiner::kSum, Combiner::kMean, Combiner::kSqrtn}) {
      MultiplexLayout layout{kBatch, kRows, kTables, 4, {}, combiner, true, 4, 77};
      layout.features = {{single.data(), size(single), nullptr, 1, 2, 0},
                         {bags.data(), size(bags), offsets.data(), 1, 1, 2},
                         {dense.data(), size(dense), nullptr, 3, 1, 3}};
      const auto cells = static_cast<std::size_t>(kRows * dim);
      std::vector<std::vector<double>> tables(kTables, std::vector<double>(cells)), grads = tables;
      MultiplexTables at{dim, Dtype::kFloat64, {}, {dim, dim}}, into = at;
      for (std::size_t t = 0; t < kTables; ++t) {
        for (double& x : tables[t]) x = normal(g);
        at.data.push_back(tables[t].data());
        into.data.push_back(grads[t].data());
      }
      std::vector<double> out(static_cast<std::size_t>(kBatch * 4 * dim)), up(out.size());
      for (double& x : up) x = normal(g);
      multiplexed_lookup(layout, at, out.data());
      const MultiplexHits hits(layout);
      hits.dense(into, up.data());
      double left = 0, right = 0;
      for (std::size_t i = 0; i < out.size(); ++i) left += out[i] * up[i];
      for (std::size_t t = 0; t < kTables; ++t) {
        for (std::size_t i = 0; i < cells; ++i) right += tables[t][i] * grads[t][i];
      }
      CHECK(std::fabs(left - right) < 1e-9 * (1 + std::fabs(left)));
      for (std::int64_t t = 0; t < kTables; ++t) {
        const std::int64_t n = hits.rows(t);
        std::vector<std::int64_t> rows(static_cast<std::size_t>(n));
        std::vector<double> values(static_cast<std::size_t>(n * dim));
        hits.sparse(t, {dim, Dtype::kFloat64, {values.data()}, {dim}}, up.data(), rows.data());
        for (std::int64_t i = 0; i < n * dim; ++i) {
          const auto cell = static_cast<std::size_t>(rows[static_cast<std::size_t>(i / dim)] * dim + i % dim);
          CHECK(values[static_cast<std::size_t>(i)] == grads[static_cast<std::size_t>(t)][cell]);
        }
      }
    }
  }
}

TEST(eviction_keeps_the_largest_counts) {
  constexpr std::int64_t kSlots = 40000;
  std::mt19937_64 g(3);
  std::vector<std::int64_t> ids(kSlots), counts(kSlots), last(kSlots, 0);
  std::vector<std::uint8_t> used(kSlots, 0);
  for (std::int64_t i = 0; i + 1 < kSlots; ++i) {
    ids[static_cast<std::size_t>(i)] = i;
    counts[static_cast<std::size_t>(i)] = static_cast<std::int64_t>(g() % 100) + 1;
    used[static_cast<std::size_t>(i)] = i % 7 != 0;
  }
  std::vector<std::int64_t> fresh, sightings, seen, mapping(20000);
  for (std::int64_t i = 0; i < 20000; ++i) {
    fresh.push_back(2 * i + 30000);
    sightings.push_back(static_cast<std::int64_t>(g() % 120) + 1);
    seen.push_back(1);
  }
  std::unordered_map<std::int64_t, std::int64_t> all;
  for (std::size_t s = 0; s < kSlots; ++s) {
    if (used[s] != 0) all[ids[s]] = counts[s];
  }
  for (std::size_t i = 0; i < fresh.size(); ++i) all[fresh[i]] += sightings[i];
  std::vector<std::int64_t> wanted, got;
  for (const auto& [id, n] : all) wanted.push_back(n);
  std::sort(wanted.rbegin(), wanted.rend());
  wanted.resize(kSlots - 1);
  const MchCall call{kSlots,           ids.data(),  counts.data(), last.data(), used.data(),     20000, fresh.data(),
                     sightings.data(), seen.data(), nullptr,       1,           MchPolicy::kLfu, 1.0,   mapping.data()};
  const MchResult result = mch_evict_batch(call);
  CHECK(result.duplicate == -1);
  for (std::size_t s = 0; s < kSlots; ++s) {
    if (used[s] != 0) got.push_back(counts[s]);
    CHECK(used[s] == 0 || all[ids[s]] == counts[s]);
  }
  std::sort(got.rbegin(), got.rend());
  CHECK(got == wanted);
  for (std::size_t i = 0; i < fresh.size(); ++i) {
    CHECK(mapping[i] == kSlots - 1 || ids[static_cast<std::size_t>(mapping[i])] == fresh[i]);
  }
}

TEST_MAIN
