// SPDX-License-Identifier: Apache-2.0
// The CUDA router without a GPU: kernels/moe/route*.cuh and dispatch.cuh on an emulated one, against the CPU loops.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "check.hpp"
#include "emulated_gpu.hpp"
#include "kernels/core/segments.cuh"
#include "kernels/moe/dispatch.cuh"
#include "kernels/moe/route.cuh"
#include "kernels/moe/route_backward.cuh"
#include "moe/route.hpp"

using namespace hotloop;
using namespace hotloop::moe;

namespace {

using Random = std::mt19937_64;
using Ids = std::vector<std::int64_t>;
std::int64_t up_to(Random& g, std::int64_t most) { return std::uniform_int_distribution<std::int64_t>(0, most)(g); }
std::size_t size_of(std::int64_t n) { return static_cast<std::size_t>(n); }

struct Emulated {
  Random& random;
  template <class Body>
  void operator()(const Body& body) const {
    test::run_blocks(body, random, 1 + static_cast<int>(up_to(random, 2)));
  }
};
struct EmulatedSort {
  Random& random;
  void operator()(const segments::CudaSortCall& call) const {
    segments::gpu::sort(call, [&](const auto& body) {
      test::run_warps<std::uint64_t>(body, random, 4, std::decay_t<decltype(body)>::kScratch, 0xA5A5A5A5A5A5A5A5u);
    });
  }
};

template <class R>
struct Found {
  Ids ids, counts, num_tokens, slot_of_row, row_of_slot, expert_offsets;
  std::vector<R> weights, prob_sums, logsumexp;

  explicit Found(RouteCall& call)
      : ids(size_of(call.logits.tokens * call.selection.top_k), -7),
        counts(size_of(call.logits.sequences * call.logits.experts), -7),
        num_tokens(size_of(call.logits.sequences), -7),
        slot_of_row(ids.size(), -7),
        row_of_slot(ids.size(), -7),
        expert_offsets(size_of(call.logits.experts + 1), -7),
        weights(ids.size(), R(-7)),
        prob_sums(counts.size(), R(-7)),
        logsumexp(size_of(call.logits.tokens), R(-7)) {
    call.ids = ids.data();
    call.weights = weights.data();
    call.counts = counts.data();
    call.prob_sums = prob_sums.data();
    call.logsumexp = logsumexp.data();
    call.num_tokens = num_tokens.data();
    call.slot_of_row = slot_of_row.data();
    call.row_of_slot = row_of_slot.data();
    call.expert_offsets = expert_offsets.data();
  }
  bool operator==(const Found&) const = default;
};

template <class R>
void check_close(const std::vector<R>& found, const std::vector<R>& expected, double scale) {
  const double close = scale * (sizeof(R) == 8 ? 1e-13 : 4e-6);
  for (std::size_t i = 0; i < found.size(); ++i) CHECK_CLOSE(found[i], expected[i], close, close);
}

// Random options that are allowed.
Selection selection_of(Random& g, std::int64_t experts) {
  Selection s;
  std::vector<std::int64_t> divisors;
  for (std::int64_t d = 1; d <= experts; ++d) {
    if (experts % d == 0) divisors.push_back(d);
  }
  if (up_to(g, 2) == 0) {
    s.groups = divisors[size_of(up_to(g, static_cast<std::int64_t>(divisors.size()) - 1))];
    s.open_groups = 1 + up_to(g, s.groups - 1);
    s.group_max = up_to(g, 1) == 0;
  }
  const std::int64_t most = std::min(kMostChoices, experts / s.groups * s.open_groups);
  s.top_k = 1 + up_to(g, std::min<std::int64_t>(most, up_to(g, 7) == 0 ? kMostChoices : 8) - 1);
  s.sigmoid = up_to(g, 2) == 0;
  s.late = !s.sigmoid && up_to(g, 2) == 0;
  s.renormalize = s.late || up_to(g, 2) != 0;
  s.scale = up_to(g, 1) == 0 ? 1.0 : 2.5;
  s.biased = up_to(g, 2) == 0;
  return s;
}

template <class Storage>
void one_case(Random& g, std::int64_t tokens, std::int64_t experts) {
  using R = typename Accumulate<Storage>::type;
  const std::int64_t gap = up_to(g, 2) == 0 ? up_to(g, 9) : 0, stride = experts + gap;
  const bool coarse = up_to(g, 1) == 0;  // many are equal
  std::normal_distribution<double> normal(0.0, 2.0);
  std::vector<Storage> logits(size_of(tokens * stride + 8));
  for (Storage& x : logits) {
    const double at = up_to(g, 60) == 0 ? -std::numeric_limits<double>::infinity() : normal(g);
    put(x, static_cast<R>(coarse ? std::round(at) / 2 : at));
  }
  Storage* const first = logits.data() + up_to(g, 1);
  for (std::int64_t t = 0; t < tokens; ++t) put(first[t * stride + up_to(g, experts - 1)], R(1));  // one is finite
  std::vector<std::uint8_t> mask(size_of(tokens));
  for (auto& m : mask) m = up_to(g, 3) != 0;
  std::vector<R> bias(size_of(experts));
  for (R& b : bias) b = static_cast<R>(up_to(g, 8) - 4) / R(16);

  RouteCall call;
  call.selection = selection_of(g, experts);
  call.logits = {first, DtypeOf<Storage>::value, tokens, experts, stride, nullptr, 1, nullptr};
  if (up_to(g, 1) == 0) {
    call.logits.mask = mask.data();
    for (std::int64_t t = 0; t < tokens; ++t) {  // what is left out is not read
      if (mask[size_of(t)] == 0) put(first[t * stride], std::numeric_limits<R>::quiet_NaN());
    }
  }
  if (call.selection.biased) call.bias = bias.data();
  Ids offsets{0};
  if (up_to(g, 2) == 0) {
    for (std::int64_t s = up_to(g, 4); s > 0; --s) offsets.push_back(up_to(g, tokens));
    offsets.push_back(tokens);
    std::sort(offsets.begin(), offsets.end());
    call.logits.sequences = static_cast<std::int64_t>(offsets.size()) - 1;
    call.logits.offsets = offsets.data();
  }
  call.ordered = call.logits.sequences == 1;

  RouteCall cpu = call;
  const Found<R> expected(cpu);
  CHECK(moe::route(cpu) == -1);
  gpu::Arrays sizes(nullptr);
  static_cast<void>(gpu::parts_of(call, sizes));
  std::vector<double> workspace(size_of(sizes.bytes() / 8 + 2), 7e77);
  void* const aligned = workspace.data() + (reinterpret_cast<std::uintptr_t>(workspace.data()) % 16 == 0 ? 0 : 1);
  const Found<R> found(call);
  gpu::route(call, aligned, Emulated{g});
  CHECK(found.ids == expected.ids);
  CHECK(found.counts == expected.counts);
  CHECK(found.num_tokens == expected.num_tokens);
  CHECK(found.slot_of_row == expected.slot_of_row);
  CHECK(found.row_of_slot == expected.row_of_slot);
  CHECK(found.expert_offsets == expected.expert_offsets);
  check_close(found.weights, expected.weights, call.selection.scale);
  check_close(found.prob_sums, expected.prob_sums, 1.0);
  check_close(found.logsumexp, expected.logsumexp, 1.0);
  if (up_to(g, 3) == 0) {
    RouteCall twice = call;
    const Found<R> again(twice);
    gpu::route(twice, aligned, Emulated{g});
    CHECK(again == found);
  }

  std::vector<R> d_weights(found.ids.size()), d_prob_sums(found.counts.size()), d_logsumexp(size_of(tokens));
  for (auto* of : {&d_weights, &d_prob_sums, &d_logsumexp}) {
    for (R& x : *of) x = static_cast<R>(normal(g));
  }
  std::vector<Storage> slope(size_of(tokens * experts)), expected_slope(slope.size());
  RouteBackwardCall back;
  back.selection = call.selection;
  back.logits = call.logits;
  back.ids = found.ids.data();
  back.logsumexp = found.logsumexp.data();
  if (up_to(g, 3) != 0) back.d_weights = d_weights.data();
  if (up_to(g, 1) == 0) back.d_prob_sums = d_prob_sums.data();
  if (up_to(g, 1) == 0) back.d_logsumexp = d_logsumexp.data();
  back.result = expected_slope.data();
  moe::route_backward(back);
  back.result = slope.data();
  gpu::route_backward(back, Emulated{g});
  const double near = sizeof(Storage) == 2 ? 1e-2 : sizeof(R) == 8 ? 1e-12 : 2e-5;
  for (std::size_t i = 0; i < slope.size(); ++i) {
    CHECK_CLOSE(to_float(slope[i]), to_float(expected_slope[i]), near, near);
  }
}

template <class Id, class Weight>
void dispatch_case(Random& g, std::int64_t slots, std::int64_t experts, bool by_weight) {
  std::vector<Id> ids(size_of(slots));
  const std::int64_t some = up_to(g, 2) == 0 ? std::min<std::int64_t>(experts, 3) : experts;
  for (Id& id : ids) id = static_cast<Id>(up_to(g, some) - 1);
  std::vector<Weight> weights(size_of(slots));
  for (Weight& w : weights) put(w, static_cast<typename Accumulate<Weight>::type>(up_to(g, 9) - 4) / 4);
  DispatchCall call;
  call.ids = ids.data();
  call.ids_dtype = DtypeOf<Id>::value;
  call.slots = slots;
  call.experts = experts;
  call.align = up_to(g, 1) == 0 ? 1 : 16;
  call.capacity = by_weight ? up_to(g, 40) : up_to(g, 40) - 1;
  if (by_weight) call.weights = weights.data();
  call.weights_dtype = DtypeOf<Weight>::value;
  call.rows = (slots + experts * (call.align - 1) + call.align - 1) / call.align * call.align;
  const auto made = [&](DispatchCall c, auto&& with) {
    std::vector<Ids> found{Ids(size_of(c.rows), -7), Ids(size_of(slots), -7), Ids(size_of(experts + 1), -7),
                           Ids(size_of(experts), -7)};
    c.slot_of_row = found[0].data();
    c.row_of_slot = found[1].data();
    c.expert_offsets = found[2].data();
    c.expert_counts = found[3].data();
    with(c);
    return found;
  };
  const auto expected = made(call, [](const DispatchCall& c) { CHECK(moe::dispatch(c)); });
  const auto found = made(call, [&](const DispatchCall& c) {
    gpu::Arrays sizes(nullptr);
    static_cast<void>(gpu::DispatchArrays(c, sizes));
    std::vector<double> workspace(size_of(sizes.bytes() / 8 + 2), 7e77);
    void* const aligned = workspace.data() + (reinterpret_cast<std::uintptr_t>(workspace.data()) % 16 == 0 ? 0 : 1);
    gpu::dispatch(c, aligned, Emulated{g}, EmulatedSort{g});
  });
  CHECK(found == expected);
}

}  // namespace

TEST(the_router_is_that_of_the_cpu) {
  Random g(1);
  const std::int64_t experts[] = {1, 2, 7, 60, 128, 130, 160, 256, 300, 384, 512, 513, 1000};
  for (int i = 0; i < 3; ++i) {
    for (const std::int64_t e : experts) {
      const std::int64_t tokens = up_to(g, e > 300 ? 12 : 30);
      one_case<float>(g, tokens, e);
      one_case<BFloat16>(g, tokens, e);
      if (e > 300) continue;
      one_case<Float16>(g, tokens, e);
      one_case<double>(g, tokens, e);
    }
  }
  one_case<float>(g, 3, 4096);
  one_case<float>(g, 600, 4);
}

TEST(the_order_is_that_of_the_cpu) {
  Random g(2);
  for (const std::int64_t experts : {1, 3, 255, 256, 700}) {
    for (const std::int64_t slots : {0, 1, 33, 1500}) {
      dispatch_case<std::int64_t, float>(g, slots, experts, false);
      dispatch_case<std::int32_t, float>(g, slots, experts, true);
    }
    dispatch_case<std::int64_t, BFloat16>(g, 200, experts, true);
    dispatch_case<std::int64_t, Float16>(g, 200, experts, true);
    dispatch_case<std::int32_t, double>(g, 200, experts, true);
  }
}

// Without a look at them, logits that are NaN lead to experts that exist.
TEST(numbers_that_are_none_stay_inside) {
  Random g(3);
  for (const std::int64_t experts : {6, 600}) {
    std::vector<float> logits(size_of(9 * experts), std::numeric_limits<float>::quiet_NaN());
    std::vector<float> bias(size_of(experts), std::numeric_limits<float>::quiet_NaN());
    for (const std::int64_t groups : {1, 3}) {
      RouteCall call;
      call.selection.top_k = 4;
      call.selection.groups = groups;
      call.selection.open_groups = groups == 3 ? 2 : 1;
      call.selection.biased = true;
      call.bias = bias.data();
      call.logits = {logits.data(), Dtype::kFloat32, 9, experts, experts, nullptr, 1, nullptr};
      call.ordered = true;
      const Found<float> found(call);
      gpu::Arrays sizes(nullptr);
      static_cast<void>(gpu::parts_of(call, sizes));
      std::vector<double> workspace(size_of(sizes.bytes() / 8 + 2));
      gpu::route(call, workspace.data(), Emulated{g});
      for (std::int64_t t = 0; t < 9; ++t) {
        Ids of(found.ids.begin() + t * 4, found.ids.begin() + t * 4 + 4);
        std::sort(of.begin(), of.end());
        CHECK(of.front() >= 0 && of.back() < experts && std::unique(of.begin(), of.end()) == of.end());
        CHECK(std::isnan(found.weights[size_of(4 * t)]) && std::isnan(found.logsumexp[size_of(t)]));
      }
      CHECK(std::accumulate(found.counts.begin(), found.counts.end(), std::int64_t{0}) == 36);
    }
  }
}

TEST_MAIN
