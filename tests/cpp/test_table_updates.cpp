// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "check.hpp"
#include "table/rows/merge.hpp"
#include "table/rows/quantize.hpp"
#include "table/rows/row_rules.hpp"
#include "table/store/floats.hpp"

using namespace hotloop;
using namespace hotloop::table;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

RuleParameters parameters(Rule rule) {
  RuleParameters p;
  p.rule = rule;
  p.lr = 0.1;
  p.eps = 1e-8;
  p.beta1 = 0.9;
  p.beta2 = 0.999;
  p.weight_decay = rule == Rule::kFtrl ? 0.0 : 0.3;
  p.beta = 1.0;
  p.l1 = 0.1;
  p.l2 = 0.2;
  p.initial_accumulator_value = 0.1;
  return p;
}

std::vector<RuleSpec> every_rule() {
  std::vector<RuleSpec> all;
  for (Rule rule : {Rule::kSgd, Rule::kRowwiseAdagrad, Rule::kAdagrad, Rule::kAdam, Rule::kFtrl, Rule::kGroupAdagrad}) {
    RuleParameters p = parameters(rule);
    all.push_back(resolve(p));
    p.decoupled = p.nesterov = p.uncorrected_eps = p.rowwise = p.group = p.stochastic_rounding = true;
    all.push_back(resolve(p));
  }
  return all;
}

float gradient(std::int64_t i, std::int64_t j) { return 0.01f * static_cast<float>((i * 7 + j * 13) % 101 - 50); }

// Bytes between guards, so that a write beside a row shows.
class Guarded {
 public:
  Guarded(std::int64_t bytes, std::int64_t shift)
      : memory_(static_cast<std::size_t>(bytes + shift) + 2 * kGuard, kFill),
        begin_(kGuard + static_cast<std::size_t>(shift)),
        end_(begin_ + static_cast<std::size_t>(bytes)) {}
  unsigned char* data() { return memory_.data() + begin_; }
  bool untouched_beside() const {
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      if ((i < begin_ || i >= end_) && memory_[i] != kFill) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t kGuard = 128;
  static constexpr unsigned char kFill = 0xa5;
  std::vector<unsigned char> memory_;
  std::size_t begin_, end_;
};

}  // namespace

TEST(state_layout) {
  const RuleSpec adam = resolve(parameters(Rule::kAdam));
  CHECK(state_floats(adam, 7) == 15);
  RuleParameters p = parameters(Rule::kAdam);
  p.rowwise = true;
  CHECK(state_floats(resolve(p), 7) == 9);
  CHECK(state_floats(resolve(parameters(Rule::kSgd)), 7) == 0);
  CHECK(state_floats(resolve(parameters(Rule::kRowwiseAdagrad)), 7) == 1);
  CHECK(state_floats(resolve(parameters(Rule::kAdagrad)), 7) == 7);
  const RuleSpec ftrl = resolve(parameters(Rule::kFtrl));
  CHECK(state_floats(ftrl, 2) == 4);
  float state[5] = {kNan, kNan, kNan, kNan, kNan};
  init_state(ftrl, 2, state);
  CHECK(state[0] == 0.0f && state[1] == 0.0f && state[2] == 0.1f && state[3] == 0.1f && std::isnan(state[4]));
  init_state(adam, 2, state);
  CHECK(state[0] == 0.0f && state[2] == 0.0f && state[4] == 0.0f);
}

// A packed row of a table at any address, and rows of arrays, are the same update; nothing beside a row is written.
TEST(packed_rows_and_arrays_agree) {
  for (const RuleSpec& spec : every_rule()) {
    for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
      // One; a prime; a cache line of floats and one more; a chunk of half rows and one more.
      for (std::int64_t dim : {1, 13, 16, 17, 256, 257}) {
        const std::int64_t item = item_size(dtype), floats = state_floats(spec, dim), scalars = state_scalars(spec);
        Guarded packed(dim * item, item), arrays(dim * item, 0);
        std::vector<float> state(static_cast<std::size_t>(floats) + 2, kNan);
        float* const own = state.data() + 1;
        init_state(spec, dim, own);
        std::vector<float> columns(own, own + floats);
        std::vector<float> grad(static_cast<std::size_t>(dim));
        for (std::int64_t j = 0; j < dim; ++j) grad[static_cast<std::size_t>(j)] = 1.0f - gradient(3, j);
        for (Guarded* first : {&packed, &arrays}) store_floats(dtype, grad.data(), first->data(), dim);
        const UpdateRow update = update_row(spec, dtype);
        for (std::int64_t step = 0; step < 3; ++step) {
          for (std::int64_t j = 0; j < dim; ++j) grad[static_cast<std::size_t>(j)] = gradient(step, j);
          update(spec, dim, grad.data(), packed.data(), own, rounding_key(static_cast<std::uint64_t>(step), 0));
          UpdateCall call;
          call.spec = spec;
          call.n = 1;
          call.dim = dim;
          call.grad = grad.data();
          call.values = arrays.data();
          call.dtype = dtype;
          call.seed = static_cast<std::uint64_t>(step);
          for (std::int64_t k = 0; k < scalars; ++k) call.scalars[k] = {columns.data() + k, 1};
          for (std::int64_t k = 0; k < state_vectors(spec); ++k)
            call.vectors[k] = {columns.data() + scalars + k * dim, dim};
          update_rows(call);
        }
        CHECK(std::memcmp(packed.data(), arrays.data(), static_cast<std::size_t>(dim * item)) == 0);
        CHECK(floats == 0 || std::memcmp(own, columns.data(), static_cast<std::size_t>(floats) * sizeof(float)) == 0);
        CHECK(packed.untouched_beside() && arrays.untouched_beside());
        CHECK(std::isnan(state.front()) && std::isnan(state.back()));
      }
    }
  }
}

TEST(no_columns) {
  for (const RuleSpec& spec : every_rule()) {
    float state[2] = {0.5f, 0.5f};
    update_row(spec, Dtype::kFloat32)(spec, 0, nullptr, nullptr, state, 0);
    CHECK(state[0] == 0.5f && state[1] == 0.5f);
  }
}

TEST(other_types_are_refused) {
  CHECK(test::error_of([] { update_row(resolve(parameters(Rule::kSgd)), Dtype::kUInt8); }) ==
        "[table] values: expected float32, float16 or bfloat16, got uint8.");
}

TEST(int8_rows) {
  float x[] = {0.0f, 0.5f, -0.5f, 0.49999997f, 1.5f, -1.5f, 127.4f, 127.5f, 200.0f, -128.4f, -200.0f, kNan};
  const std::int8_t wanted[] = {0, 1, -1, 0, 2, -2, 127, 127, 127, -128, -128, 0};
  std::int8_t q[13];
  q[12] = 77;
  quantize_rows({.n = 1, .dim = 12, .range = 128.0f, .values = x, .codes = q}, true);
  for (int j = 0; j < 12; ++j) CHECK(q[j] == wanted[j]);
  CHECK(q[12] == 77);
  float back[13];
  back[12] = kNan;
  quantize_rows({.n = 1, .dim = 12, .range = 0.5f, .values = back, .codes = q}, false);
  for (int j = 0; j < 12; ++j) CHECK(back[j] == static_cast<float>(wanted[j]) / 256.0f);
  CHECK(std::isnan(back[12]));
}

TEST(merged_gradients) {
  for (std::int64_t n : {0, 1, 2, 1000}) {
    std::vector<std::int64_t> ids, inverse(static_cast<std::size_t>(n)), unique(inverse), counts(inverse);
    for (std::int64_t i = 0; i < n; ++i) ids.push_back((i * i) % 37 - 5);
    const std::int64_t found = number_ids(ids.data(), n, inverse.data(), unique.data(), counts.data());
    for (std::int64_t dim : {1, 17}) {
      std::vector<float> grads(static_cast<std::size_t>(n * dim), 1.0f),
          out(static_cast<std::size_t>(found * dim) + 1, kNan);
      MergeCall call;
      call.n = n;
      call.dim = call.grad_stride = dim;
      call.unique = found;
      call.inverse = inverse.data();
      call.grads = grads.data();
      call.out = out.data();
      merge_rows(call);
      for (std::int64_t u = 0; u < found; ++u) {
        for (std::int64_t j = 0; j < dim; ++j) {
          CHECK(out[static_cast<std::size_t>(u * dim + j)] == static_cast<float>(counts[static_cast<std::size_t>(u)]));
        }
      }
      CHECK(std::isnan(out.back()));
    }
    for (std::size_t i = 0; i < ids.size(); ++i) CHECK(unique[static_cast<std::size_t>(inverse[i])] == ids[i]);
  }
}

TEST_MAIN
