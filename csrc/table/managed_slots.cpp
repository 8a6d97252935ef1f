// SPDX-License-Identifier: Apache-2.0
// One round of managed eviction: known ids are found through a hash table of the incoming ones, the unknown ones are
// ranked.
//
// Unknown ids are sorted, best first; free slots go to the first of them. Of the used slots only those whose score is
// below the best unknown id's can lose: nth_element finds as many of the weakest as there are unknown ids left, and
// only these are sorted. The k-th unknown id then takes the k-th weakest slot if it beats it. Scores of "lfu" and "lru"
// are integers, those of "distance_lfu" float64; ties are broken by ids, not by the order of memory.
#include "table/managed_slots.hpp"

#include <algorithm>
#include <cmath>

#include "core/parallel.hpp"
#include "table/hash.hpp"

namespace hotloop::table {

namespace {

constexpr std::int64_t kAbsent = -1;

// Incoming ids by value: open addressing, at most half full.
class Incoming {
 public:
  Incoming(std::int64_t n, const std::int64_t* ids) : ids_(ids) {
    std::uint64_t size = 16;
    while (size < 2 * static_cast<std::uint64_t>(n)) size *= 2;
    mask_ = size - 1;
    places_.assign(size, kAbsent);
  }
  // Where the id stands, or kAbsent after putting it there.
  std::int64_t insert(std::int64_t i) {
    std::uint64_t at = start(ids_[i]);
    for (; places_[at] != kAbsent; at = (at + 1) & mask_) {
      if (ids_[places_[at]] == ids_[i]) return places_[at];
    }
    places_[at] = i;
    return kAbsent;
  }
  std::int64_t find(std::int64_t id) const {
    for (std::uint64_t at = start(id); places_[at] != kAbsent; at = (at + 1) & mask_) {
      if (ids_[places_[at]] == id) return places_[at];
    }
    return kAbsent;
  }

 private:
  std::uint64_t start(std::int64_t id) const { return mix64(static_cast<std::uint64_t>(id) ^ seed_) & mask_; }
  const std::int64_t* ids_;
  std::uint64_t mask_ = 0, seed_ = process_seed();
  std::vector<std::int64_t> places_;
};

template <class Score>
struct Candidate {
  Score score;
  std::int64_t count, id, at;
};

std::int64_t score_of(std::int64_t count, std::int64_t last, const MchCall& call, std::int64_t) {
  return call.policy == MchPolicy::kLfu ? count : last;  // -(now - last + 1)^p orders like last, for every p > 0
}
double score_of(std::int64_t count, std::int64_t last, const MchCall& call, double) {
  const auto distance = static_cast<double>(call.now - last + 1);
  const double weight = call.decay_exponent == 1.0 ? distance : std::pow(distance, call.decay_exponent);
  return static_cast<double>(count) / weight;
}

template <class Score>
void compete(const MchCall& call, std::vector<std::int64_t>& newcomers, MchResult& result) {
  std::vector<Candidate<Score>> fresh;
  fresh.reserve(newcomers.size());
  for (const std::int64_t i : newcomers) {
    fresh.push_back({score_of(call.counts[i], call.last[i], call, Score{}), call.counts[i], call.ids[i], i});
  }
  std::sort(fresh.begin(), fresh.end(), [](const auto& a, const auto& b) {
    if (a.score != b.score) return a.score > b.score;
    return a.count != b.count ? a.count > b.count : a.id < b.id;
  });
  // Free slots are taken first, the last ones in ascending order; of the others only those below the best newcomer
  // can lose.
  std::vector<std::int64_t> free;
  std::vector<Candidate<Score>> losers;
  for (std::int64_t s = call.slots - 2; s >= 0; --s) {
    if (call.slot_used[s] == 0) {
      if (free.size() < fresh.size()) free.push_back(s);
      continue;
    }
    const Score score = score_of(call.slot_counts[s], call.slot_last[s], call, Score{});
    if (score < fresh.front().score) losers.push_back({score, call.slot_counts[s], call.slot_ids[s], s});
  }
  std::reverse(free.begin(), free.end());
  // Lowest score first; of equal ones the largest id, which is the order in which a stable sort drops them.
  const auto weaker = [](const auto& a, const auto& b) { return a.score != b.score ? a.score < b.score : a.id > b.id; };
  const std::size_t rest = fresh.size() - free.size();
  if (rest < losers.size()) {
    std::nth_element(losers.begin(), losers.begin() + static_cast<std::ptrdiff_t>(rest), losers.end(), weaker);
    losers.resize(rest);
  }
  std::sort(losers.begin(), losers.end(), weaker);
  // After the free slots are given out, the k-th new id needs the k-th weakest slot; on a tie the old id stays.
  std::size_t won = 0;
  while (won < losers.size() && free.size() + won < fresh.size() &&
         losers[won].score < fresh[free.size() + won].score) {
    ++won;
  }
  std::vector<std::int64_t> slots;
  for (std::size_t k = won; k-- > 0;) slots.push_back(losers[k].at);
  // Evicted slots of equal score come by smaller id, as in a stable descending sort: `losers` is its reverse.
  slots.insert(slots.end(), free.begin(), free.end());
  for (std::size_t k = 0; k < slots.size(); ++k) {
    const std::int64_t s = slots[k], i = fresh[k].at;
    result.refilled.push_back(s);
    result.evicted_ids.push_back(call.slot_ids[s]);
    result.was_used.push_back(call.slot_used[s]);
    call.slot_ids[s] = call.ids[i];
    call.slot_counts[s] = call.counts[i];
    call.slot_last[s] = call.last[i];
    call.slot_used[s] = 1;
    call.mapping[i] = s;
  }
}

}  // namespace

MchResult mch_evict_batch(const MchCall& call) {
  MchResult result;
  Incoming incoming(call.incoming, call.ids);
  for (std::int64_t i = 0; i < call.incoming; ++i) {
    if (incoming.insert(i) != kAbsent) {
      result.duplicate = i;
      return result;
    }
  }
  std::fill(call.mapping, call.mapping + call.incoming, call.slots - 1);
  if (call.incoming == 0 || call.slots < 2) return result;
  // An id is in one slot at most, so no two slots write to the same place.
  parallel_for(call.slots - 1, 1 << 14, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t s = begin; s < end; ++s) {
      if (call.slot_used[s] == 0) continue;
      const std::int64_t i = incoming.find(call.slot_ids[s]);
      if (i == kAbsent) continue;
      call.mapping[i] = s;
      if (call.admitted != nullptr && call.admitted[i] == 0) continue;
      call.slot_counts[s] += call.counts[i];
      call.slot_last[s] = call.last[i];
    }
  });
  std::vector<std::int64_t> newcomers;
  for (std::int64_t i = 0; i < call.incoming; ++i) {
    const bool in = call.admitted == nullptr || call.admitted[i] != 0;
    if (in && call.mapping[i] == call.slots - 1) newcomers.push_back(i);
  }
  if (newcomers.empty()) return result;
  // An id that came in and whose slot went to a newcomer has none any more.
  call.policy == MchPolicy::kDistanceLfu ? compete<double>(call, newcomers, result)
                                         : compete<std::int64_t>(call, newcomers, result);
  for (std::size_t k = 0; k < result.refilled.size(); ++k) {
    if (result.was_used[k] == 0) continue;
    const std::int64_t i = incoming.find(result.evicted_ids[k]);
    if (i != kAbsent) call.mapping[i] = call.slots - 1;
  }
  return result;
}

}  // namespace hotloop::table
