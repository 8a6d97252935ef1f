// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "check.hpp"
#include "core/parallel.hpp"
#include "decode/cpu_rows.hpp"
#include "decode/loops.hpp"

using namespace hotloop;
using namespace hotloop::decode;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> logits(std::mt19937& g, std::size_t n, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> z(n);
  for (float& x : z) x = normal(g);
  return z;
}

LawTable table_over(const std::vector<float>& z, std::int64_t vocabulary, std::int64_t rows) {
  LawTable table;
  table.rows = {z.data(), Dtype::kFloat32, rows * vocabulary, 0, vocabulary, rows};
  table.vocabulary = vocabulary;
  return table;
}

// Which tokens a truncated law keeps, by sorting everything.
std::vector<bool> kept_by_sorting(const std::vector<float>& z, std::int64_t top_k, double top_p, double min_p,
                                  bool joint) {
  const float max = *std::max_element(z.begin(), z.end());
  std::vector<float> sorted = z;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const auto n = static_cast<std::int64_t>(z.size());
  const float by_count = top_k > 0 && top_k < n ? sorted[static_cast<std::size_t>(top_k - 1)] : -kInf;
  std::uint64_t mass = 0, reached = 0;
  for (const float x : z) mass += joint || x >= by_count ? weight_units(logit_weight(x, max)) : 0;
  float by_mass = -kInf;
  for (const float x : sorted) {
    if (!(top_p < 1.0)) break;
    reached += weight_units(logit_weight(x, max));
    if (static_cast<double>(reached) >= top_p * static_cast<double>(mass)) {
      by_mass = x;
      break;
    }
  }
  std::vector<bool> kept;
  for (const float x : z) {
    const double w = logit_weight(x, max);
    kept.push_back(x >= by_count && x >= by_mass && w >= min_p && w > 0.0);
  }
  return kept;
}

}  // namespace

TEST(weights_are_whole_units_and_close_to_exp) {
  CHECK(weight_units(logit_weight(0.0f, 0.0f)) == std::uint64_t{1} << 42);
  CHECK(logit_weight(-kInf, 0.0f) == 0.0);
  CHECK(logit_weight(std::nanf(""), 0.0f) == 0.0);
  CHECK(logit_weight(-30.01f, 0.0f) == 0.0);
  for (float x = 0.0f; x > -30.0f; x -= 0.0117f) {
    const double w = logit_weight(x, 0.0f);
    CHECK_CLOSE(w, std::exp(static_cast<double>(x)), 2e-7, 1.2e-13);
    CHECK(w / kWeightUnit == std::floor(w / kWeightUnit));
  }
}

TEST(target_units_stay_inside) {
  for (const std::uint64_t mass :
       {std::uint64_t{1}, std::uint64_t{7}, std::uint64_t{1} << 42, (std::uint64_t{1} << 60) + 1}) {
    CHECK(target_units(0x1p-53, mass) >= 1);
    CHECK(target_units(1.0, mass) <= mass);
    CHECK(target_units(1.0, mass) >= mass - (mass >> 52));
  }
  CHECK(target_units(0.5, 10) == 5);
  CHECK(target_units(0.51, 10) == 6);
}

TEST(acceptance_at_the_ends) {
  CHECK(accepts(1.0, 0.25, 0.25));
  CHECK(!accepts(0x1p-53, 0.0, 1.0));
  CHECK(!accepts(0x1p-53, 0.0, 0.0));
}

TEST(truncation_equals_sorting) {
  std::mt19937 g(1);
  OpenRow row;
  for (int i = 0; i < 4000; ++i) {
    const std::int64_t sizes[] = {1, 2, 7, 511, 513, 2100};
    const std::int64_t n = i % 40 == 0 ? sizes[g() % 6] : 1 + static_cast<std::int64_t>(g() % 9);
    const float scales[] = {0.05f, 1.0f, 6.0f};
    std::vector<float> z = logits(g, static_cast<std::size_t>(n), scales[g() % 3]);
    if (g() % 4 == 0) z[g() % z.size()] = -kInf;
    if (g() % 4 == 0) z[g() % z.size()] = z[0];
    LawTable table = table_over(z, n, 1);
    std::uniform_real_distribution<double> unit(0.0, 1.0);
    table.top_k.value = g() % 2 == 0 ? static_cast<std::int64_t>(g() % static_cast<unsigned>(n + 2)) : 0;
    table.top_p.value = g() % 2 == 0 ? 0.02 + 0.98 * unit(g) : 1.0;
    table.min_p.value = g() % 3 == 0 ? unit(g) : 0.0;
    table.joint = g() % 2 == 0;
    if (!row.open(table, 0, 0, false)) continue;
    const std::vector<bool> kept =
        kept_by_sorting(z, table.top_k.value, table.top_p.value, table.min_p.value, table.joint);
    std::uint64_t mass = 0;
    for (std::int64_t v = 0; v < n; ++v) {
      CHECK(kept[static_cast<std::size_t>(v)] == (row.probability(v) > 0.0));
      mass += weight_units(point_weight(row.law, v));
    }
    CHECK(mass == row.law.mass);
    const std::int64_t token = row.pick(unit(g));
    CHECK(token >= 0 && kept[static_cast<std::size_t>(token)]);
  }
}

TEST(every_level_and_split_finds_the_same) {
  std::mt19937 g(2);
  const std::int64_t n = 70000;
  const std::vector<float> z = logits(g, static_cast<std::size_t>(2 * n), 3.0f);
  const LawTable table = table_over(z, n, 2);
  std::vector<std::uint64_t> masses, residuals;
  std::vector<std::int64_t> tokens;
  test::at_every_level([&] {
    for (const int threads : {1, 2}) {
      omp_set_num_threads(threads);
      OpenRow p, q;
      CHECK(p.open(table, 0, 0, false) && q.open(table, 0, 1, false));
      masses.push_back(p.law.mass);
      std::vector<std::uint64_t> parts(static_cast<std::size_t>(chunk_count(n)));
      const ResidualCall call{&p.law, &q.law, 1.0, 1.0, nullptr, 0};
      residuals.push_back(row_residual(call, parts.data()));
      tokens.push_back(p.pick(0.731));
    }
  });
  omp_set_num_threads(2);
  CHECK(std::all_of(masses.begin(), masses.end(), [&](auto x) { return x == masses[0]; }));
  CHECK(std::all_of(residuals.begin(), residuals.end(), [&](auto x) { return x == residuals[0]; }));
  CHECK(std::all_of(tokens.begin(), tokens.end(), [&](auto x) { return x == tokens[0]; }));
}

TEST(a_repeated_rejection_is_one_residual_with_a_factor) {
  // max(max(p - q, 0) / z - q, 0) is max(p - (1 + z) q, 0) / z: what tree verification relies on.
  std::mt19937 g(3);
  for (int i = 0; i < 100; ++i) {
    const std::vector<float> z = logits(g, 12, 1.0f);
    const LawTable table = table_over(z, 6, 2);
    OpenRow p, q;
    CHECK(p.open(table, 0, 0, false) && q.open(table, 0, 1, false));
    double once[6], left = 0.0;
    for (std::int64_t v = 0; v < 6; ++v) left += once[v] = std::max(p.probability(v) - q.probability(v), 0.0);
    std::vector<std::uint64_t> parts(1);
    const ResidualCall twice{&p.law, &q.law, 1.0, 1.0 + left, nullptr, 0};
    double total = 0.0;
    for (std::int64_t v = 0; v < 6; ++v) total += std::max(once[v] / left - q.probability(v), 0.0);
    CHECK_CLOSE(static_cast<double>(row_residual(twice, parts.data())) * kResidualUnit, total * left, 1e-9, 1e-14);
  }
}

// Ids, parents and neighbours that are none, lengths beyond the arrays, NaN and infinite rows: under the sanitizers
// nothing is read outside, and every token emitted is one of a row that has a law.
TEST(garbage_reads_nothing_outside) {
  std::mt19937 g(4);
  const float odd[] = {0.0f, 1.0f, -kInf, kInf, std::nanf(""), 1e30f};
  for (int i = 0; i < 500; ++i) {
    const std::int64_t batch = 2, width = 3, n = 1 + static_cast<std::int64_t>(g() % 600);
    std::vector<float> z(static_cast<std::size_t>(batch * (width + 1) * n)), d = z;
    for (float& x : z) x = odd[g() % 6];
    for (float& x : d) x = odd[g() % 6];
    std::vector<std::int64_t> ids(6), parents(6), output(8), accepted(2), read(2), nodes(6);
    const std::int64_t wild[] = {-1, 0, n - 1, n, std::int64_t{1} << 40, -(std::int64_t{1} << 40)};
    for (auto& x : ids) x = wild[g() % 6];
    for (auto& x : parents) x = wild[g() % 6];
    std::vector<std::int32_t> neighbors(static_cast<std::size_t>(n * 2));
    for (auto& x : neighbors) x = static_cast<std::int32_t>(g());
    std::vector<float> logps(8), moved(6);
    LanternCall call;
    call.batch = batch;
    call.width = width;
    call.target = table_over(z, n, width + 1);
    call.target.logits = g() % 2 == 0;
    call.target.top_k.value = static_cast<std::int64_t>(g() % 4);
    call.target.top_p.value = g() % 2 == 0 ? 0.5 : 1.0;
    call.draft = table_over(d, n, width + 1);
    call.draft.logits = g() % 2 == 0;
    call.has_draft = g() % 2 == 0;
    call.ids = {ids.data(), Dtype::kInt64, width};
    call.lengths.value = wild[g() % 6];
    call.output = output.data();
    call.accepted = accepted.data();
    call.logps = logps.data();
    call.rows_read = read.data();
    call.neighbors = neighbors.data();
    call.columns = 2;
    call.neighbor_stride = 2;
    call.k = 2;
    call.delta = 0.5;
    call.moved = moved.data();
    TreeCall nodes_call;
    static_cast<VerifyCall&>(nodes_call) = call;
    nodes_call.parents = parents.data();
    nodes_call.depth = width;
    nodes_call.replacement = g() % 2 == 0;
    nodes_call.nodes = nodes.data();
    const auto all_tokens = [&] {
      return std::all_of(output.begin(), output.end(), [&](std::int64_t x) { return x >= -1 && x < n; });
    };
    chain(call);
    CHECK(all_tokens());
    block(call);
    CHECK(all_tokens());
    lantern(call);
    CHECK(all_tokens());
    tree(nodes_call);
    CHECK(all_tokens());
  }
}

TEST_MAIN
