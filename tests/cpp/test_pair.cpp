#include "preference/pair.hpp"

#include <omp.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

#include "check.hpp"

using namespace hotloop;
using namespace hotloop::preference;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int head_named(const char* name) {
  const HeadInfo* table = head_table(PairHeads{});
  for (int i = 0; i < PairHeads::kSize; ++i) {
    if (std::strcmp(table[i].name, name) == 0) return i;
  }
  return -1;
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

}  // namespace

TEST(dpo_in_poisoned_memory) {
  const double beta = 0.3;
  // None; one; a block less one, whole, plus one; several blocks and a tail.
  for (std::size_t n : {0u, 1u, 255u, 256u, 257u, 1000u}) {
    for (std::size_t stride : {1u, 3u}) {
      Column pc(n, stride, -3.0f), pr(n, stride, -2.5f), rc(n, stride, -2.0f);
      Column loss(n, stride, kNan), grad_chosen(n, stride, kNan), grad_rejected(n, stride, kNan);
      const double reference = -2.25;
      double total = -1.0;
      PairCall call;
      call.head = head_named("dpo");
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
      pair_loop(call);
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
  }
}

TEST(every_head_on_a_tail_of_one_row) {
  // The rest of the block is padding: it must neither be read from the caller nor written to it.
  const HeadInfo* table = head_table(PairHeads{});
  for (int head = 0; head < PairHeads::kSize; ++head) {
    for (bool wide : {false, true}) {
      PairCall call;
      call.head = head;
      call.n = 257;
      call.double_precision = wide;
      std::vector<Column> inputs, grads;
      for (int k = 0; k < table[head].grads + table[head].constants; ++k) inputs.emplace_back(257, 1, 0.4f);
      for (int k = 0; k < table[head].grads; ++k) grads.emplace_back(257, 1, kNan);
      for (std::size_t k = 0; k < inputs.size(); ++k) call.inputs[k] = {inputs[k].data(), Dtype::kFloat32, 1};
      for (std::size_t k = 0; k < grads.size(); ++k) call.grads[k] = {grads[k].data(), Dtype::kFloat32, 1};
      for (double& p : call.params) p = 0.4;
      double total = 0.0;
      call.total = &total;
      pair_loop(call);
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
    PairCall call;
    call.head = head_named("dpo");
    call.n = static_cast<std::int64_t>(n);
    call.inputs[0] = {pc.data(), Dtype::kFloat32, 1};
    call.inputs[1] = {pr.data(), Dtype::kFloat32, 1};
    call.inputs[2] = call.inputs[3] = {&zero, Dtype::kFloat64, 0};
    call.params[0] = 0.1;
    double total = 0.0;
    call.total = &total;
    pair_loop(call);
    totals.push_back(total);
  }
  omp_set_num_threads(before);
  CHECK(totals[0] == totals[1] && totals[0] == totals[2]);
}

TEST_MAIN
