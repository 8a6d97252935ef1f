// SPDX-License-Identifier: Apache-2.0
// Row updates and pooling of the table in device memory on an emulated GPU, against the formulas of the CPU.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "check.hpp"
#include "emulated_table.hpp"
#include "table/rows/row_rules.hpp"
#include "table/store/floats.hpp"

using namespace hotloop;
using namespace hotloop::table;
using namespace hotloop::table::gpu;
using namespace hotloop::test;

namespace {

RuleSpec plain_sgd() {
  RuleParameters p;
  p.rule = Rule::kSgd;
  p.lr = 1.0;
  return resolve(p);
}

std::vector<RuleParameters> rules() {
  std::vector<RuleParameters> all;
  RuleParameters p;
  p.lr = 0.1;
  p.eps = 1e-3;
  p.beta1 = 0.9;
  p.beta2 = 0.99;
  p.beta = 0.5;
  p.l1 = 0.05;
  p.l2 = 0.2;
  p.initial_accumulator_value = 0.1;
  for (const Rule rule :
       {Rule::kSgd, Rule::kRowwiseAdagrad, Rule::kAdagrad, Rule::kAdam, Rule::kFtrl, Rule::kGroupAdagrad}) {
    for (const bool variant : {false, true}) {
      p.rule = rule;
      p.weight_decay = variant ? 0.01 : 0.0;
      p.rowwise = rule == Rule::kAdam && variant;
      p.group = rule == Rule::kFtrl && variant;
      p.nesterov = variant;
      all.push_back(p);
      p.decoupled = variant && rule != Rule::kFtrl;
      if (variant) all.push_back(p);
      p.decoupled = false;
    }
  }
  return all;
}

Settings settings_of(std::int64_t dim, Dtype dtype, const RuleSpec& spec) {
  Settings s;
  s.dim = dim;
  s.dtype = dtype;
  s.capacity = 50;
  s.initializer = Initializer::kNormal;
  s.second = 1.0f;
  s.seed = 3;
  s.initial_state.resize(static_cast<std::size_t>(state_floats(spec, dim)));
  init_state(spec, dim, s.initial_state.data());
  return s;
}

std::vector<std::uint32_t> rows_of(EmulatedTable& t, const std::vector<Key>& keys) {
  Batch b(keys);
  t.upsert(b.call);
  return b.rows;
}

// Every position a bag of its own.
table::Bags each_of(const std::vector<Key>& keys, const std::vector<std::uint32_t>& rows) {
  const auto n = static_cast<std::int64_t>(keys.size());
  return {.keys = {keys.data(), n}, .count = n, .rows = rows.data()};
}
Update update_by(const RuleSpec& spec, const Floats& grad, std::int64_t dim, std::uint64_t seed = 0) {
  return {.spec = spec, .seed = seed, .grad = grad.data(), .grad_stride = dim};
}

std::vector<char> row_bytes(EmulatedTable& t, std::uint32_t row) {
  const char* at = row_at(t.store(), t.shape(), row);
  const auto& s = t.shape();
  std::vector<char> bytes(at, at + s.value_bytes);
  bytes.insert(bytes.end(), at + s.state, at + s.state + s.states * 4);
  return bytes;
}

// The rows of keys after their summed gradients, by the loops of the CPU.
void apply_on_cpu(std::map<Key, std::vector<char>>& rows, const std::map<Key, Floats>& sums, const RuleSpec& spec,
                  const Settings& s, std::uint64_t tick, std::uint64_t seed) {
  const std::int64_t values = s.dim * item_size(s.dtype);
  for (const auto& [key, sum] : sums) {
    std::vector<char>& row = rows.at(key);
    Floats state(s.initial_state.size());
    if (!state.empty()) std::memcpy(state.data(), row.data() + values, state.size() * 4);
    const std::uint64_t random = mix64(seed + tick * 0x9E3779B97F4A7C15ull) ^ mix64(key);
    hotloop::table::update_row(spec, s.dtype)(spec, s.dim, sum.data(), row.data(), state.data(), random);
    if (!state.empty()) std::memcpy(row.data() + values, state.data(), state.size() * 4);
  }
}

float value_of(const Settings& s, const char* row, std::int64_t j) {
  Floats all(static_cast<std::size_t>(s.dim));
  load_floats(s.dtype, row, all.data(), s.dim);
  return all[static_cast<std::size_t>(j)];
}

}  // namespace

TEST(updates_are_those_of_the_cpu) {
  for (RuleParameters p : rules()) {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
      for (const std::int64_t dim : {1, 16, 37, 131}) {
        for (const bool stochastic : {false, true}) {
          if (stochastic && dtype == Dtype::kFloat32) continue;
          p.stochastic_rounding = stochastic;
          const RuleSpec spec = resolve(p);
          const Settings s = settings_of(dim, dtype, spec);
          EmulatedTable t(s, EmulatedMachine{});
          std::mt19937_64 g(static_cast<std::uint64_t>(dim));
          std::vector<Key> keys;
          for (int i = 0; i < 40; ++i) keys.push_back(g() % 15);
          std::vector<std::uint32_t> rows = rows_of(t, keys);
          rows[7] = kNoRow;  // was not let in
          std::map<Key, std::vector<char>> wanted;
          for (std::size_t i = 0; i < keys.size(); ++i) {
            if (rows[i] != kNoRow) wanted[keys[i]] = row_bytes(t, rows[i]);
          }
          const auto d = static_cast<std::size_t>(dim);
          for (int step = 0; step < 3; ++step) {
            const Floats grad = draw(g, keys.size() * d);
            std::map<Key, Floats> sums;
            for (std::size_t i = 0; i < keys.size(); ++i) {
              if (rows[i] == kNoRow) continue;
              Floats& sum = sums.try_emplace(keys[i], d, 0.0f).first->second;
              for (std::size_t j = 0; j < d; ++j) sum[j] += grad[i * d + j];
            }
            CHECK(t.update(each_of(keys, rows), update_by(spec, grad, dim, 99), true) == 0);
            apply_on_cpu(wanted, sums, spec, s, t.tick(), 99);
          }
          for (std::size_t i = 0; i < keys.size(); ++i) {
            if (rows[i] != kNoRow) CHECK(row_bytes(t, rows[i]) == wanted.at(keys[i]));
          }
        }
      }
    }
  }
}

TEST(long_runs_are_cut_and_added_in_order) {
  const RuleSpec spec = plain_sgd();
  for (const std::int64_t dim : {3, 140, 1030}) {  // 1030: scratch that a block does not hold
    const std::size_t n = dim == 3 ? 1700 : 600;
    std::mt19937_64 g(1);
    std::vector<Key> keys(n);
    for (Key& k : keys) k = g() % 4 != 0 ? 77 : g() % 5;  // 77: over several tiles
    const auto d = static_cast<std::size_t>(dim);
    const Floats grad = draw(g, n * d);
    std::vector<std::vector<char>> results;
    for (int repeat = 0; repeat < 2; ++repeat) {
      Settings s = settings_of(dim, Dtype::kFloat32, spec);
      s.initializer = Initializer::kConstant;
      s.first = 0.0f;
      EmulatedMachine machine;
      machine.state->random.seed(static_cast<std::uint64_t>(repeat));
      EmulatedTable t(s, machine);
      const std::vector<std::uint32_t> rows = rows_of(t, keys);
      CHECK(t.update(each_of(keys, rows), update_by(spec, grad, dim), true) == 0);
      std::map<Key, std::vector<double>> sums;
      for (std::size_t i = 0; i < n; ++i) {
        auto& sum = sums.try_emplace(keys[i], d, 0.0).first->second;
        for (std::size_t j = 0; j < d; ++j) sum[j] += grad[i * d + j];
      }
      std::vector<char> all;
      for (std::size_t i = 0; i < n; ++i) {
        const std::vector<char> row = row_bytes(t, rows[i]);
        if (i < 30) {
          for (std::size_t j = 0; j < d; ++j) {
            CHECK_CLOSE(value_of(s, row.data(), static_cast<std::int64_t>(j)), -sums[keys[i]][j], 1e-5, 2e-4);
          }
        }
        if (i < 30) all.insert(all.end(), row.begin(), row.end());
      }
      results.push_back(all);
    }
    CHECK(results[0] == results[1]);
  }
}

TEST(long_runs_of_uses_and_values) {
  for (const Strategy strategy : {Strategy::kLfu, Strategy::kEpochLfu, Strategy::kCustom, Strategy::kLru}) {
    Settings s;
    s.dim = 2;
    s.strategy = strategy;
    s.max_rows = 200;
    s.capacity = 200;
    EmulatedTable t(s, EmulatedMachine{});
    std::mt19937_64 g(2);
    std::vector<Key> keys(1300);
    std::vector<std::uint64_t> scores(keys.size());
    for (std::size_t i = 0; i < keys.size(); ++i) {
      keys[i] = g() % 3 == 0 ? g() % 6 : 50;
      scores[i] = g() % 1000 + 1;
    }
    const Floats values = draw(g, 2 * keys.size());
    Batch b(keys);
    b.call.values = rows_of(values, 2);
    b.call.stamp.scores = scores.data();
    t.upsert(b.call);  // new
    t.upsert(b.call);  // known
    std::map<Key, std::uint64_t> wanted;
    std::map<Key, std::size_t> last;
    for (int twice = 0; twice < 2; ++twice) {
      for (std::size_t i = 0; i < keys.size(); ++i) {
        const bool sums = strategy == Strategy::kLfu || strategy == Strategy::kEpochLfu;
        wanted[keys[i]] = sums ? wanted[keys[i]] + scores[i] : strategy == Strategy::kCustom ? scores[i] : t.tick();
        last[keys[i]] = i;
      }
    }
    for (std::size_t i = 0; i < keys.size(); ++i) {
      CHECK(t.store().scores[b.rows[i]] == wanted[keys[i]]);
      CHECK(std::memcmp(row_at(t.store(), t.shape(), b.rows[i]), values.data() + 2 * last[keys[i]], 8) == 0);
    }
  }
}

TEST(rows_are_found_again_where_they_moved) {
  const RuleSpec spec = plain_sgd();
  Settings s = settings_of(4, Dtype::kFloat32, spec);
  EmulatedTable t(s, EmulatedMachine{});
  const std::vector<Key> keys = {3, 900, 4, 3};
  const std::vector<std::uint32_t> rows = rows_of(t, keys);
  std::vector<Key> many(700);
  for (std::size_t i = 0; i < many.size(); ++i) many[i] = 1000 + i;
  rows_of(t, many);  // grows: the rows have other slots
  std::uint8_t gone = 0;
  const Key erased = 900;
  t.erase({&erased, 1}, &gone);
  const Floats grad(16, 1.0f);
  std::vector<std::uint32_t> now(4);
  t.locate({keys.data(), 4}, now.data());
  CHECK(now[0] != rows[0] || now[2] != rows[2]);
  const float before = value_of(s, row_at(t.store(), t.shape(), now[0]), 1);
  const table::Bags bags = each_of(keys, rows);
  CHECK(t.update(bags, update_by(spec, grad, 4), true) == 1);
  CHECK_CLOSE(value_of(s, row_at(t.store(), t.shape(), now[0]), 1), before - 2.0f, 1e-6, 1e-6);
  Floats out(16, -1.0f);
  std::vector<std::int64_t> sizes(4);
  t.pool(bags, {rows_of(out, 4), Dtype::kFloat32, sizes.data()});
  CHECK(sizes[0] == 1 && sizes[1] == 0 && out[5] == 0.0f);
  CHECK(out[1] == value_of(s, row_at(t.store(), t.shape(), now[0]), 1));
}

TEST(bags_are_pooled_and_their_gradients_go_back) {
  const RuleSpec spec = plain_sgd();
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
    for (const std::int64_t dim : {1, 20, 64, 270}) {
      for (const auto mode : {table::Pool::kSum, table::Pool::kMean, table::Pool::kMax}) {
        for (const bool given : {false, true}) {
          const Settings s = settings_of(dim, dtype, spec);
          EmulatedTable t(s, EmulatedMachine{});
          std::mt19937_64 g(static_cast<std::uint64_t>(dim) + 17);
          std::vector<Key> stored(60), keys(97);
          for (std::size_t i = 0; i < stored.size(); ++i) stored[i] = i;
          rows_of(t, stored);
          for (Key& k : keys) k = g() % 80;  // a quarter is not there
          const std::vector<std::int64_t> offsets = {0, 0, 1, 5, 5, 70, 96, 97};
          const auto bags = static_cast<std::int64_t>(offsets.size()) - 1;
          std::vector<std::uint32_t> rows(keys.size());
          t.locate({keys.data(), static_cast<std::int64_t>(keys.size())}, rows.data());
          const Floats weights = draw(g, keys.size());
          table::Bags call{.keys = {keys.data(), static_cast<std::int64_t>(keys.size())},
                           .offsets = offsets.data(),
                           .count = bags,
                           .weights = mode == table::Pool::kSum ? weights.data() : nullptr,
                           .pool = mode,
                           .rows = given ? rows.data() : nullptr};
          const auto d = static_cast<std::size_t>(dim), b = static_cast<std::size_t>(bags);
          Floats out(b * d, -9.0f), wanted(b * d, 0.0f);
          std::vector<std::int64_t> sizes(b, -9), wanted_sizes(b, 0), largest(b * d, -9), from(b * d, -1);
          t.pool(call, {rows_of(out, dim), Dtype::kFloat32, sizes.data(),
                        mode == table::Pool::kMax ? largest.data() : nullptr});
          for (std::size_t bag = 0; bag < b; ++bag) {
            for (auto i = static_cast<std::size_t>(offsets[bag]); i < static_cast<std::size_t>(offsets[bag + 1]); ++i) {
              if (rows[i] == kNoRow) continue;
              ++wanted_sizes[bag];
              Floats row(d);
              load_floats(dtype, row_at(t.store(), t.shape(), rows[i]), row.data(), dim);
              for (std::size_t j = 0; j < d; ++j) {
                float& x = wanted[bag * d + j];
                if (mode == table::Pool::kMax) {
                  const bool better = row[j] > x || from[bag * d + j] < 0;
                  if (better) from[bag * d + j] = static_cast<std::int64_t>(i);
                  x = better ? row[j] : x;
                } else {
                  x = x + (mode == table::Pool::kSum ? weights[i] : 1.0f) * row[j];
                }
              }
            }
            if (mode == table::Pool::kMean && wanted_sizes[bag] > 1) {
              for (std::size_t j = 0; j < d; ++j) wanted[bag * d + j] /= static_cast<float>(wanted_sizes[bag]);
            }
          }
          CHECK(out == wanted && sizes == wanted_sizes);
          if (mode == table::Pool::kMax) CHECK(largest == from);

          // Gradients of the weights, then of the rows.
          const Floats grad = draw(g, b * d);
          const auto bag_of = [&](std::size_t i) {
            const auto after = std::upper_bound(offsets.begin(), offsets.end(), static_cast<std::int64_t>(i));
            return static_cast<std::size_t>(after - offsets.begin()) - 1;
          };
          Floats of_weights(keys.size(), -9.0f);
          std::vector<char> kept(keys.size() * static_cast<std::size_t>(t.shape().value_bytes));
          const Values taken{kept.data(), t.shape().value_bytes};
          t.pool(each_of(keys, rows), {taken, dtype});
          t.weight_gradient(call, taken, grad.data(), dim, of_weights.data());
          std::map<Key, Floats> sums;
          for (std::size_t i = 0; i < keys.size(); ++i) {
            if (rows[i] == kNoRow) {
              CHECK(of_weights[i] == 0.0f);
              continue;
            }
            const std::size_t bag = bag_of(i);
            Floats& sum = sums.try_emplace(keys[i], d, 0.0f).first->second;
            Floats row(d);
            load_floats(dtype, row_at(t.store(), t.shape(), rows[i]), row.data(), dim);
            const auto bag_size = static_cast<float>(wanted_sizes[bag]);
            double dot = 0;
            for (std::size_t j = 0; j < d; ++j) {
              const float x = grad[bag * d + j];
              dot += static_cast<double>(row[j]) * x;
              if (mode == table::Pool::kMax)
                sum[j] += from[bag * d + j] == static_cast<std::int64_t>(i) ? x : 0.0f;
              else
                sum[j] = sum[j] + (mode == table::Pool::kSum ? weights[i] : 1.0f / bag_size) * x;
            }
            CHECK_CLOSE(of_weights[i], dot, 1e-5, 1e-4);
          }
          std::map<Key, std::vector<char>> after;
          for (const auto& [key, sum] : sums) {
            std::uint32_t row = 0;
            t.locate({&key, 1}, &row);
            after[key] = row_bytes(t, row);
          }
          Update update = update_by(spec, grad, dim);
          update.sizes = sizes.data();
          update.largest = largest.data();
          call.rows = rows.data();
          CHECK(t.update(call, update, true) == 0);
          apply_on_cpu(after, sums, spec, s, t.tick(), 0);
          for (const auto& [key, wanted_row] : after) {
            std::uint32_t row = 0;
            t.locate({&key, 1}, &row);
            CHECK(row_bytes(t, row) == wanted_row);
          }
        }
      }
    }
  }
}

TEST_MAIN
