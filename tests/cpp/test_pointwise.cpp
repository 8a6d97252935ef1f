// SPDX-License-Identifier: Apache-2.0
#include "core/pointwise.hpp"

#include <omp.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "check.hpp"

using namespace hotloop;
using namespace hotloop::pointwise;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Every head compiled in.
std::vector<const Entry*> all_heads() {
  std::vector<const Entry*> found;
  int first = 0;
  for (const RoomInfo& room : rooms()) {
    for (std::size_t k = 0; k < room.heads.size(); ++k) found.push_back(&entry(first + static_cast<int>(k)));
    first += kRoomStride;
  }
  return found;
}

const Entry& head_named(const char* name) {
  for (const Entry* head : all_heads()) {
    if (std::strcmp(head->info.name, name) == 0) return *head;
  }
  throw std::runtime_error(name);
}

// A column whose rows lie `stride` apart in memory that is NaN everywhere else, before and behind included.
struct Column {
  Column(std::size_t n, std::size_t stride, float start) : step(stride), memory(n * stride + 2 * kGuard, kNan) {
    for (std::size_t i = 0; i < n; ++i) (*this)[i] = start + 0.01f * static_cast<float>(i % 97);
  }
  float& operator[](std::size_t i) { return memory[kGuard + i * step]; }
  float* data() { return memory.data() + kGuard; }
  bool others_untouched(std::size_t n) {
    std::size_t numbers = 0;
    for (float x : memory) numbers += std::isnan(x) ? 0 : 1;
    return numbers == n;
  }
  static constexpr std::size_t kGuard = 64;
  std::size_t step;
  std::vector<float> memory;
};

double dpo(double pc, double pr, double rc, double rr, double beta) {
  return std::log1p(std::exp(-beta * ((pc - rc) - (pr - rr))));
}

void dpo_of(std::size_t n, std::size_t stride) {
  const double beta = 0.3;
  Column pc(n, stride, -3.0f), pr(n, stride, -2.5f), rc(n, stride, -2.0f);
  Column loss(n, stride, kNan), grad_chosen(n, stride, kNan), grad_rejected(n, stride, kNan);
  const double reference = -2.25;
  double total = -1.0;
  Call call;
  call.n = static_cast<std::int64_t>(n);
  const auto s = static_cast<std::int64_t>(stride);
  call.inputs[0] = {pc.data(), Dtype::kFloat32, s};
  call.inputs[1] = {pr.data(), Dtype::kFloat32, s};
  call.inputs[2] = {rc.data(), Dtype::kFloat32, s};
  call.inputs[3] = {&reference, Dtype::kFloat64, 0};
  call.params[0] = beta;
  call.grads[0] = {grad_chosen.data(), Dtype::kFloat32, s};
  call.grads[1] = {grad_rejected.data(), Dtype::kFloat32, s};
  call.loss = {loss.data(), Dtype::kFloat32, s};
  call.total = &total;
  call.grad_scale = 2.0;
  loop(head_named("dpo"), call);
  double sum = 0.0;
  for (std::size_t i = 0; i < n; ++i) {
    const double h = 1e-5;
    const auto at = [&](double da, double db) { return dpo(pc[i] + da, pr[i] + db, rc[i], reference, beta); };
    CHECK_CLOSE(loss[i], at(0, 0), 2e-6, 0.0);
    CHECK_CLOSE(grad_chosen[i], 2 * (at(h, 0) - at(-h, 0)) / (2 * h), 1e-5, 1e-7);
    CHECK_CLOSE(grad_rejected[i], 2 * (at(0, h) - at(0, -h)) / (2 * h), 1e-5, 1e-7);
    sum += at(0, 0);
  }
  CHECK_CLOSE(total, sum, 1e-6, 0.0);
  for (Column* c : {&loss, &grad_chosen, &grad_rejected}) CHECK(c->others_untouched(n));
}

}  // namespace

TEST(dpo_in_poisoned_memory) {
  test::at_every_level([] {
    // None; one; a block less one, whole, plus one; several blocks and a tail; enough for two threads.
    for (std::size_t n : {0u, 1u, 255u, 256u, 257u, 1000u, 10000u}) {
      for (std::size_t stride : {1u, 3u}) dpo_of(n, stride);
    }
  });
}

TEST(every_head_on_a_tail_of_one_row) {
  // The rest of the block is padding: it must neither be read from the caller nor written to it.
  for (const Entry* head : all_heads()) {
    for (bool wide : {false, true}) {
      Call call;
      call.n = 257;
      call.double_precision = wide;
      std::vector<Column> inputs, grads;
      for (int k = 0; k < head->info.grads + head->info.rows; ++k) inputs.emplace_back(257, 1, 0.4f);
      for (int k = 0; k < head->info.grads; ++k) grads.emplace_back(257, 1, kNan);
      Column per_group(1, 1, 0.4f);
      for (int k = 0; k < head->info.groups; ++k) {
        call.inputs[inputs.size() + static_cast<std::size_t>(k)] = {per_group.data(), Dtype::kFloat32, 1};
      }
      call.groups.rows = 257;
      for (std::size_t k = 0; k < inputs.size(); ++k) call.inputs[k] = {inputs[k].data(), Dtype::kFloat32, 1};
      for (std::size_t k = 0; k < grads.size(); ++k) call.grads[k] = {grads[k].data(), Dtype::kFloat32, 1};
      for (double& p : call.params) p = 0.4;
      double total = 0.0;
      call.total = &total;
      loop(*head, call);
      for (Column& g : grads) {
        for (std::size_t i = 257; i < 257 + Column::kGuard; ++i) CHECK(std::isnan(g[i]));
      }
      for (std::size_t i = 0; i < Column::kGuard; ++i) {
        for (Column& g : grads) CHECK(std::isnan(g.memory[i]));
      }
    }
  }
}

TEST(the_sum_does_not_depend_on_the_number_of_threads) {
  const std::size_t n = 20011;
  Column pc(n, 1, -3.0f), pr(n, 1, -2.5f);
  const double zero = 0.0;
  std::vector<double> totals;
  const int before = omp_get_max_threads();
  for (int threads : {1, 2, 3}) {
    omp_set_num_threads(threads);
    Call call;
    call.n = static_cast<std::int64_t>(n);
    call.inputs[0] = {pc.data(), Dtype::kFloat32, 1};
    call.inputs[1] = {pr.data(), Dtype::kFloat32, 1};
    call.inputs[2] = call.inputs[3] = {&zero, Dtype::kFloat64, 0};
    call.params[0] = 0.1;
    double total = 0.0;
    call.total = &total;
    loop(head_named("dpo"), call);
    totals.push_back(total);
  }
  omp_set_num_threads(before);
  CHECK(totals[0] == totals[1] && totals[0] == totals[2]);
}

TEST(groups_weights_and_extra_values_at_the_edges_of_blocks) {
  // Groups of 0, 1, 255, 300 and 0 rows: a group ends inside, at and behind the end of a block.
  const std::int32_t offsets[] = {0, 0, 1, 256, 556, 556};
  const std::size_t n = 556;
  Column logp(n, 1, -1.0f), old(n, 3, -1.1f), advantage(5, 1, -0.02f), weight(n, 1, 0.5f);
  weight[0] = weight[300] = 0.0f;
  logp[300] = kNan;
  Column loss(n, 1, kNan), grad(n, 1, kNan);
  Call call;
  call.n = static_cast<std::int64_t>(n);
  call.inputs[0] = {logp.data(), Dtype::kFloat32, 1};
  call.inputs[1] = {old.data(), Dtype::kFloat32, 3};
  call.inputs[2] = {advantage.data(), Dtype::kFloat32, 1};
  call.groups = {1, offsets, false, 5};
  call.weight = {weight.data(), Dtype::kFloat32, 1};
  call.params[0] = call.params[1] = 0.2;
  call.loss = {loss.data(), Dtype::kFloat32, 1};
  call.grads[0] = {grad.data(), Dtype::kFloat32, 1};
  double total = 0.0, counted = 0.0, expected = 0.0;
  std::array<OutTotal, kMaxOuts> outs{};
  call.total = &total;
  call.counted = &counted;
  call.outs = outs.data();
  loop(head_named("clipped_surrogate"), call);
  for (std::size_t i = 0; i < n; ++i) {
    const std::size_t group = i < 1 ? 1 : i < 256 ? 2 : 3;
    const double ratio = std::exp(static_cast<double>(logp[i]) - static_cast<double>(old[i]));
    const double a = advantage[group], w = weight[i];
    const double plain = -ratio * a, bounded = -std::fmin(std::fmax(ratio, 0.8), 1.2) * a;
    const double row = w == 0.0 ? 0.0 : w * std::fmax(plain, bounded);
    CHECK_CLOSE(loss[i], row, 1e-5, 1e-6);
    expected += row;
  }
  CHECK_CLOSE(total, expected, 1e-5, 1e-5);
  CHECK(counted == static_cast<double>(n - 2));
  CHECK(outs[0].least <= outs[0].largest);
  for (Column* c : {&loss, &grad}) CHECK(c->others_untouched(n));
}

TEST_MAIN
