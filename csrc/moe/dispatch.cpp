// SPDX-License-Identifier: Apache-2.0
// The order of expert rows: a stable counting sort of slots by expert, with a capacity and with aligned runs.
//
// Ranges of slots are counted side by side; the sums over ranges give every slot its rank among those of its expert.
// Without weights the rank decides who stays. With weights the slots of a full expert are listed, its best ones
// selected, and put back into the order of slots.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/parallel.hpp"
#include "moe/route.hpp"

namespace hotloop::moe {

namespace {

constexpr std::int64_t kGrain = 8192;  // slots worth a thread

struct Ranges {
  std::int64_t slots, count;
  std::int64_t begin(std::int64_t r) const { return slots * r / count; }
};

template <class Body>
void each(const Ranges& ranges, Body&& body) {
  parallel_for(ranges.count, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) body(r, ranges.begin(r), ranges.begin(r + 1));
  });
}

// Puts `capacity` of the slots, the best by weight, first, in rising order.
template <class Weight>
void keep_best(const Weight* weights, std::int64_t* slots, std::int64_t count, std::int64_t capacity) {
  const auto better = [&](std::int64_t a, std::int64_t b) {
    const auto x = to_float(weights[a]), y = to_float(weights[b]);
    return x > y || (x == y && a < b);
  };
  if (capacity < count) std::nth_element(slots, slots + capacity, slots + count, better);
  std::sort(slots, slots + capacity);
}

bool any_nan(const DispatchCall& call) {
  std::atomic<bool> found{false};
  with_float(call.weights_dtype, [&](auto weight) {
    const auto* w = static_cast<const decltype(weight)*>(call.weights);
    parallel_for(call.slots, kGrain, [&](std::int64_t first, std::int64_t last) {
      bool bad = false;
      for (std::int64_t i = first; i < last; ++i) bad |= to_float(w[i]) != to_float(w[i]);
      if (bad) found = true;
    });
  });
  return found;
}

template <class Id>
bool run(const DispatchCall& call, const Id* ids) {
  const std::int64_t experts = call.experts;
  const std::int64_t wanted = std::min({call.slots / kGrain, std::int64_t{max_threads()}, call.slots / experts});
  const Ranges ranges{call.slots, std::max<std::int64_t>(1, wanted)};
  // rank[r][e]: of the next slot of expert e in range r.
  std::vector<std::int64_t> rank(static_cast<std::size_t>(ranges.count * experts), 0);
  std::atomic<bool> outside{false};
  each(ranges, [&](std::int64_t r, std::int64_t begin, std::int64_t end) {
    std::int64_t* const mine = &rank[static_cast<std::size_t>(r * experts)];
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t id = ids[i];
      if (id < -1 || id >= experts) {
        outside = true;
        return;
      }
      if (id >= 0) ++mine[id];
    }
  });
  if (outside || (call.weights != nullptr && any_nan(call))) return false;
  const bool limited = call.capacity >= 0;
  std::vector<std::int64_t> listed(static_cast<std::size_t>(experts) + 1, 0);  // where the slots of an expert begin
  call.expert_offsets[0] = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    std::int64_t sum = 0;
    for (std::int64_t r = 0; r < ranges.count; ++r) {
      std::int64_t& count = rank[static_cast<std::size_t>(r * experts + e)];
      const std::int64_t before = sum;
      sum += count;
      count = before;
    }
    const auto at = static_cast<std::size_t>(e);
    listed[at + 1] = listed[at] + sum;
    const std::int64_t kept = limited ? std::min(sum, call.capacity) : sum;
    const std::int64_t rows = (kept + call.align - 1) / call.align * call.align;
    call.expert_counts[e] = kept;
    call.expert_offsets[e + 1] = call.expert_offsets[e] + rows;
    std::fill_n(call.slot_of_row + call.expert_offsets[e] + kept, rows - kept, -1);
  }
  std::fill(call.slot_of_row + call.expert_offsets[experts], call.slot_of_row + call.rows, -1);
  std::unique_ptr<std::int64_t[]> list;
  if (call.weights != nullptr) list.reset(new std::int64_t[static_cast<std::size_t>(call.slots)]);
  each(ranges, [&](std::int64_t r, std::int64_t begin, std::int64_t end) {
    std::int64_t* const mine = &rank[static_cast<std::size_t>(r * experts)];
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t id = ids[i];
      std::int64_t row = -1;
      if (id >= 0) {
        const std::int64_t at = mine[id]++;
        if (list) {
          list[listed[static_cast<std::size_t>(id)] + at] = i;
        } else if (!limited || at < call.capacity) {
          row = call.expert_offsets[id] + at;
          call.slot_of_row[row] = i;
        }
      }
      call.row_of_slot[i] = row;
    }
  });
  if (!list) return true;
  with_float(call.weights_dtype, [&](auto weight) {
    const auto* w = static_cast<const decltype(weight)*>(call.weights);
    parallel_for(experts, std::max<std::int64_t>(1, kGrain * experts / (call.slots + 1)),
                 [&](std::int64_t first, std::int64_t last) {
                   for (std::int64_t e = first; e < last; ++e) {
                     const std::int64_t begin = listed[static_cast<std::size_t>(e)];
                     const std::int64_t count = listed[static_cast<std::size_t>(e) + 1] - begin;
                     const std::int64_t kept = call.expert_counts[e];
                     keep_best(w, &list[begin], count, kept);
                     for (std::int64_t j = 0; j < kept; ++j) {
                       const std::int64_t row = call.expert_offsets[e] + j;
                       call.slot_of_row[row] = list[begin + j];
                       call.row_of_slot[list[begin + j]] = row;
                     }
                   }
                 });
  });
  return true;
}

}  // namespace

bool dispatch(const DispatchCall& call) {
  return with_integer(call.ids_dtype, [&](auto id) { return run(call, static_cast<const decltype(id)*>(call.ids)); });
}

}  // namespace hotloop::moe
