// SPDX-License-Identifier: Apache-2.0
// `Rows` (decode/walks.hpp) as a team of thread blocks reads them. Every thread of every block of the team takes the
// same steps of a walk. A question about one token is answered by each thread for itself, a question about a whole row
// by all threads together.
//
// The packs of a row are dealt out to the blocks, and inside a block to its warps, in neighbouring stretches. A draw
// finds the stretch whose mass contains the wanted unit: first the block, then the warp, then the token.
//
// Opening a row costs two exchanges of the team: the largest logit, then the mass under it (for a greedy request, the
// first token that has it). Rows that the walk will probably open next take part in the same two exchanges: the draft's
// row, and, where the team is large and a row is small, the next rows too (the window). Truncation adds three exchanges
// for each of top-k and top-p (six in float64), each a histogram of counts or masses over 11 bits of the
// order-preserving key.
#pragma once

#include <cstdint>

#include "decode/cpu_rows.hpp"
#include "decode/heads.hpp"
#include "kernels/core/team.cuh"
#include "kernels/decode/passes.cuh"

namespace hotloop::decode::gpu {

inline constexpr int kMostWindow = 8;
inline constexpr int kLanes = 2 * kMostWindow;  // a target row and a draft row for each row of a window
inline constexpr int kDigitBits = 11;
inline constexpr int kBins = 1 << kDigitBits;
// Two of them are in use at a time, the third is being cleared.
inline constexpr int kBinSets = 3;

struct BiasList {
  std::int64_t* ids;
  float* values;
};

// Where a team's block finds its part of the workspace.
struct Places {
  std::uint64_t* bins;     // the team's, (kBinSets, kBins)
  std::int64_t* taken;     // the block's, one for each draft token
  BiasList target, draft;  // the block's: the request's bias by ascending id
};

// Every step that reads shared memory ends with a block-wide barrier, so the next step may overwrite it.
template <class Team>
class GpuRows {
 public:
  static constexpr int kWarps = Team::kWarps;
  static_assert(Team::kLanes >= kLanes && kBins % Team::kThreads == 0);
  static_assert(kWarps > 1);  // or `find` would not narrow a stretch

  struct Law : RowLaw {
    bool valid;
    bool read;  // whether its numbers need the row to be read
    bool truncated;
    bool measured;
    std::uint64_t before, own;  // mass of the blocks before this one, and of this one
    std::uint64_t parts[kWarps];
  };
  struct Memory {
    Law laws[kLanes];
    std::uint64_t left[kWarps];
    std::uint64_t parts[kWarps];
    std::uint32_t low[kBins], high[kBins];
    int reading[kLanes];  // lanes whose rows are being read
    int count;
    int bin;
    std::uint64_t above, inside;
    std::int64_t found;
  };

  // `window`: rows that are opened together, 1 to kMostWindow.
  HOTLOOP_BOTH GpuRows(Team& team, Memory& memory, const LawTable& target, const LawTable* draft, const Places& places,
                       std::int64_t window)
      : team_(team), memory_(memory), target_(target), draft_(draft), places_(places), most_(window) {
    // Parts that keep 32 packs, a full warp, where the row has them.
    const std::int64_t warps = target.vocabulary / (kPack * kWarp * team.blocks());
    parts_ = static_cast<int>(warps < 1 ? 1 : warps < kWarps ? warps : kWarps);
    clear_bins(0);
  }

  // `rows`: of the target, that the walk of request b may open; `draft_rows`: of the draft.
  HOTLOOP_BOTH void request(std::int64_t b, std::int64_t rows, std::int64_t draft_rows) {
    b_ = b;
    rows_ = rows;
    draft_rows_ = draft_rows;
    first_ = count_ = taken_ = 0;
    window_ = target_.truncates(b_) || (draft_ != nullptr && draft_->truncates(b_)) ? 1 : most_;
    team_.block_sync();
    sort_bias(target_, places_.target);
    if (draft_ != nullptr) sort_bias(*draft_, places_.draft);  // `prepare` waits before it is read
  }

  HOTLOOP_BOTH bool open(std::int64_t row) {
    if (row < first_ || row >= first_ + count_) prepare(row);
    at_ = static_cast<int>(row - first_);
    return memory_.laws[at_].valid;
  }
  HOTLOOP_BOTH bool has_draft() const { return draft_ != nullptr; }
  // The walks open the draft's row beside the target's of the same number.
  HOTLOOP_BOTH void open_draft(std::int64_t row) {
    draft_open_ = row < draft_rows_ && memory_.laws[kMostWindow + at_].valid;
  }
  HOTLOOP_BOTH bool is_token(std::int64_t id) const { return id >= 0 && id < target_.vocabulary; }
  HOTLOOP_BOTH double p(std::int64_t id) const { return probability_at(memory_.laws[at_], id); }
  HOTLOOP_BOTH double q(std::int64_t id) const {
    return draft_open_ ? probability_at(memory_.laws[kMostWindow + at_], id) : 0.0;
  }
  HOTLOOP_BOTH void clear_edits() { taken_ = 0; }
  // The walks take a token at most once, and only where there is no draft.
  HOTLOOP_BOTH void take(std::int64_t id) {
    if (!is_token(id)) return;
    if (team_.thread() == 0) places_.taken[taken_] = id;
    ++taken_;
  }

  HOTLOOP_OUTLINE double residual(double a, double b) {
    const bool with_draft = draft_open_ && draft_ != nullptr && b > 0.0;
    left_ = {&memory_.laws[at_],
             with_draft ? &memory_.laws[kMostWindow + at_] : nullptr,
             a,
             with_draft ? b : 0.0,
             places_.taken,
             taken_};
    team_.block_sync();
    const int warp = team_.warp();
    if (warp < parts_) {
      const Packs stretch = piece_of(share(left_.p->source), parts_, warp);
      team_.put(0, warp, left_units(left_, stretch, team_.in_warp()), true);
    }
    team_.reduce(1, parts_, 1u);
    left_mass_ = team_.total(0);
    left_before_ = team_.before(0);
    left_own_ = team_.own(0);
    if (team_.thread() < parts_) memory_.left[team_.thread()] = team_.part(0, team_.thread());
    team_.block_sync();
    return static_cast<double>(left_mass_) * kResidualUnit;
  }

  HOTLOOP_OUTLINE std::int64_t pick(double u) {
    Law& law = memory_.laws[at_];
    if (law.greedy) return law.best;
    if (!law.measured) measure(law);
    if (law.mass == 0) return -1;
    return pick_among(
        law.source, law.parts, target_units(u, law.mass), law.before, law.own,
        [&](Packs stretch) { return mass_units(law, stretch, team_.in_warp()); },
        [&](std::int64_t pack, std::uint64_t (&units)[kPack]) { pack_weights(law, pack, units); });
  }
  HOTLOOP_OUTLINE std::int64_t pick_residual(double u) {
    if (left_mass_ == 0) return -1;
    return pick_among(
        left_.p->source, memory_.left, target_units(u, left_mass_), left_before_, left_own_,
        [&](Packs stretch) { return left_units(left_, stretch, team_.in_warp()); },
        [&](std::int64_t pack, std::uint64_t (&units)[kPack]) { pack_left(left_, pack, units); });
  }

  HOTLOOP_BOTH double logp(std::int64_t id) const {
    const Law& law = memory_.laws[at_];
    if (law.greedy) return id == law.best ? 0.0 : none<double>();
    const double p = probability_at(law, id);
    if (!(p > 0.0)) return none<double>();
    if (!law.source.logits) return vlog(p);
    return value_at(law.source, id) - law.max - vlog(static_cast<double>(law.mass) * kWeightUnit);
  }
  HOTLOOP_BOTH bool leader() const { return team_.rank() == 0 && team_.thread() == 0; }
  HOTLOOP_BOTH void sync() { team_.sync(); }

 private:
  // This block's packs of a row.
  HOTLOOP_BOTH Packs share(const RowSource& row) const { return piece_of(packs_of(row), team_.blocks(), team_.rank()); }
  HOTLOOP_BOTH const LawTable& table_of(int lane) const { return lane < kMostWindow ? target_ : *draft_; }

  // By ascending id and, among equals, as they come; ids that are no token go.
  HOTLOOP_BOTH void sort_bias(const LawTable& table, const BiasList& sorted) {
    const std::int64_t* ids = table.bias_ids + b_ * table.biases;
    for (std::int64_t i = team_.thread(); i < table.biases; i += Team::kThreads) {
      std::int64_t place = 0;
      for (std::int64_t j = 0; j < table.biases; ++j) place += ids[j] < ids[i] || (ids[j] == ids[i] && j < i) ? 1 : 0;
      sorted.ids[place] = ids[i];
      sorted.values[place] = table.bias[b_ * table.biases + i];
    }
  }

  HOTLOOP_BOTH void describe(Law& law, int lane, std::int64_t row) const {
    const LawTable& table = table_of(lane);
    const BiasList& bias = lane < kMostWindow ? places_.target : places_.draft;
    law = Law{};
    RowSource& source = law.source;
    source = table.source(b_, row);
    source.bias_ids = bias.ids;
    source.bias = bias.values;
    source.biases = table.biases;
    law.threshold = none<double>();
    law.truncated = table.truncates(b_);
    law.as_given = !table.logits && !law.truncated;
    law.read = !law.as_given;
    law.valid = true;
  }

  // Opens the rows of a window: from `row` on, or, as a block's walk goes back, up to it.
  HOTLOOP_OUTLINE void prepare(std::int64_t row) {
    const bool back = count_ > 0 && row < first_;
    first_ = !back ? row : row - window_ + 1 > 0 ? row - window_ + 1 : 0;
    count_ = back ? row - first_ + 1 : rows_ - row < window_ ? rows_ - row : window_;
    if (count_ < 1) count_ = 1;
    const int thread = team_.thread();
    team_.block_sync();  // all have done with the rows that were open
    if (thread < kLanes) {
      const std::int64_t i = thread % kMostWindow;
      const bool drafted = thread >= kMostWindow;
      if (i < count_ && (!drafted || (draft_ != nullptr && first_ + i < draft_rows_))) {
        describe(memory_.laws[thread], thread, first_ + i);
      } else {
        memory_.laws[thread].valid = memory_.laws[thread].read = false;
      }
    }
    team_.block_sync();
    if (thread == 0) {
      int count = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (memory_.laws[lane].read) memory_.reading[count++] = lane;
      }
      memory_.count = count;
    }
    team_.block_sync();
    const int reading = memory_.count;
    if (reading == 0) return;

    over_parts(reading, [&](int i, int part, Law& law, Packs stretch) {
      team_.put(i, part, largest_key(law.source, stretch, team_.in_warp()), false);
    });
    // Fenced for what clear_bins wrote, if bins are going to be used.
    team_.reduce(reading, parts_, 0u, window_ == 1);
    if (thread < reading) {
      const int lane = memory_.reading[thread];
      Law& law = memory_.laws[lane];
      law.max = of_order_key(team_.total(thread));
      const bool finite = law.max > none<double>() && law.max < -none<double>();
      law.valid = finite && (law.source.logits || law.max > 0.0);
      law.greedy = law.valid && table_of(lane).greedy(b_);
      if (law.valid && law.source.logits && !law.greedy) {
        rescale(law, table_of(lane).temperature.at(b_));
      }
    }
    team_.block_sync();
    for (int i = 0; i < reading; ++i) {
      const int lane = memory_.reading[i];
      Law& law = memory_.laws[lane];
      if (law.valid && law.truncated) truncate(law, table_of(lane));
    }

    std::uint32_t sums = 0;
    for (int i = 0; i < reading; ++i) {
      if (!memory_.laws[memory_.reading[i]].greedy) sums |= 1u << i;
    }
    over_parts(reading, [&](int i, int part, Law& law, Packs stretch) {
      std::uint64_t x = 0;
      if (law.valid && law.greedy) {
        x = first_best(law, stretch, team_.in_warp());
      } else if (law.valid) {
        x = mass_units(law, stretch, team_.in_warp());
      }
      team_.put(i, part, x, !law.greedy);
    });
    team_.reduce(reading, parts_, sums);
    for (int i = 0; i < reading; ++i) keep_mass(memory_.laws[memory_.reading[i]], i);
    team_.block_sync();
  }

  // From here on the passes see logits divided by the temperature.
  HOTLOOP_BOTH static void rescale(Law& law, double temperature) {
    if (law.source.dtype == Dtype::kFloat64) {
      law.source.scale = scale_of<double>(temperature, law.max);
      law.max = law.max * law.source.scale;
      return;
    }
    const float max = static_cast<float>(law.max), scale = scale_of<float>(temperature, max);
    law.source.scale = static_cast<double>(scale);
    law.max = static_cast<double>(max * scale);
  }

  // f(i, part, law, stretch) for each part of each row that is being read, a warp for each.
  template <class F>
  HOTLOOP_BOTH void over_parts(int reading, F&& f) {
    for (int task = team_.warp(); task < reading * parts_; task += kWarps) {
      const int i = task / parts_, part = task % parts_;
      Law& law = memory_.laws[memory_.reading[i]];
      f(i, part, law, piece_of(share(law.source), parts_, part));
    }
  }

  // What the last reduction says of the mass of a law, or of its best token.
  HOTLOOP_BOTH void keep_mass(Law& law, int i) {
    const int thread = team_.thread();
    if (thread < parts_) law.parts[thread] = team_.part(i, thread);
    if (thread != 0 || !law.valid) return;
    if (law.greedy) {
      law.best = law.source.vocabulary - static_cast<std::int64_t>(team_.total(i));
      law.mass = weight_units(1.0);
      law.inverse = 1.0;
      return;
    }
    law.mass = team_.total(i);
    law.before = team_.before(i);
    law.own = team_.own(i);
    law.measured = true;
    if (law.as_given) return;
    law.inverse = 1.0 / (static_cast<double>(law.mass) * kWeightUnit);
    law.valid = law.mass > 0;
  }

  // The mass of one row.
  HOTLOOP_BOTH void measure(Law& law) {
    const int warp = team_.warp();
    if (warp < parts_) {
      const Packs stretch = piece_of(share(law.source), parts_, warp);
      team_.put(0, warp, mass_units(law, stretch, team_.in_warp()), true);
    }
    team_.reduce(1, parts_, 1u);
    keep_mass(law, 0);
    team_.block_sync();
  }

  HOTLOOP_BOTH void set_threshold(Law& law, double threshold, double min_weight) {
    if (team_.thread() == 0) {
      law.threshold = threshold;
      law.min_weight = min_weight;
    }
    team_.block_sync();
  }

  HOTLOOP_OUTLINE void truncate(Law& law, const LawTable& table) {
    const std::int64_t top_k = table.top_k.at(b_);
    const double top_p = table.top_p.at(b_), min_p = table.min_p.at(b_);
    double threshold = none<double>();
    const bool by_count = top_k > 0 && top_k < table.vocabulary;
    if (by_count) threshold = select(law, false, static_cast<double>(top_k), none<double>());
    if (top_p < 1.0) {
      const bool of_kept = by_count && !table.joint;
      if (of_kept) set_threshold(law, threshold, 0.0);
      measure(law);
      const double mass = static_cast<double>(law.mass), wanted = top_p * mass;
      double least = of_kept ? threshold : none<double>();
      if (table.logits) {
        // Tokens lighter than (1 - top_p) / V of the mass do not hold 1 - top_p of it together:
        // none is needed.
        const double lightest = (1.0 - top_p) * (mass * kWeightUnit) / static_cast<double>(table.vocabulary);
        const double cut = law.max + vlog(lightest) - 1e-3;
        least = cut > least ? cut : least;
      }
      const double nucleus = wanted > 0.0 ? select(law, true, wanted, least) : law.max;
      threshold = nucleus > threshold ? nucleus : threshold;
    }
    const double largest = law.source.logits ? 1.0 : to_weight_grid(law.max);
    set_threshold(law, threshold, min_p > 0.0 ? min_p * largest : 0.0);
  }

  // The largest threshold at which the tokens that reach it, of those that reach `least`, are
  // `wanted` or more, or weigh that many units; -inf if all of them do not. From the highest digit
  // of the key down.
  HOTLOOP_OUTLINE double select(const Law& law, bool by_mass, double wanted, double least) {
    const bool wide = law.source.dtype == Dtype::kFloat64;
    int shift = wide ? 64 : 32;
    std::uint64_t prefix = 0, above = 0;
    while (shift > 0) {
      const int width = shift < kDigitBits ? shift : kDigitBits;
      shift -= width;
      for (int i = team_.thread(); i < kBins; i += Team::kThreads) memory_.low[i] = memory_.high[i] = 0;
      if (team_.thread() == 0) memory_.bin = -1;
      team_.block_sync();
      if (team_.warp() < parts_) {
        const Packs stretch = piece_of(share(law.source), parts_, team_.warp());
        fill_bins(law, stretch, team_.in_warp(), {prefix, shift, width}, by_mass, least, memory_.low, memory_.high);
      }
      team_.block_sync();
      const std::uint64_t* bins = add_bins();
      find_bin(bins, above, wanted);
      team_.block_sync();
      if (memory_.bin < 0) return none<double>();
      prefix = (prefix << width) | static_cast<std::uint64_t>(memory_.bin);
      above = memory_.above;
      const bool exact = !by_mass && static_cast<double>(above + memory_.inside) == wanted;
      team_.block_sync();
      if (exact) break;  // the whole bin is wanted: its lower edge parts the same tokens as their smallest
    }
    const std::uint64_t key = prefix << shift;
    if (!wide) return of_order_key(static_cast<std::uint32_t>(key));
    return key > order_key(none<double>()) ? of_order_key(key) : none<double>();  // below lie the NaNs
  }

  HOTLOOP_BOTH void clear_bins(int set) {
    if (team_.blocks() == 1) return;
    const int step = team_.blocks() * Team::kThreads;
    for (int i = team_.rank() * Team::kThreads + team_.thread(); i < kBins; i += step) {
      places_.bins[set * kBins + i] = 0;
    }
  }
  // The blocks' bins, added up over the team; nullptr where a block is alone and its own are all.
  HOTLOOP_BOTH const std::uint64_t* add_bins() {
    if (team_.blocks() == 1) return nullptr;
    std::uint64_t* bins = places_.bins + bin_set_ * kBins;
    for (int i = team_.thread(); i < kBins; i += Team::kThreads) {
      const std::uint64_t x = own_bin(i);
      if (x != 0) cuda::add_global(&bins[i], x);
    }
    bin_set_ = (bin_set_ + 1) % kBinSets;
    clear_bins(bin_set_);
    team_.sync();
    return bins;
  }
  HOTLOOP_BOTH std::uint64_t own_bin(int i) const {
    return static_cast<std::uint64_t>(memory_.high[i]) << 32 | memory_.low[i];
  }
  // From the highest bin down, the one in which the running sum reaches `wanted`.
  HOTLOOP_BOTH void find_bin(const std::uint64_t* bins, std::uint64_t above, double wanted) {
    constexpr int kEach = kBins / Team::kThreads;
    const int top = kBins - 1 - team_.thread() * kEach;
    const auto bin = [&](int i) { return bins == nullptr ? own_bin(top - i) : bins[top - i]; };
    std::uint64_t sum = 0;
    for (int i = 0; i < kEach; ++i) sum += bin(i);
    std::uint64_t reached = above + team_.scan(sum);
    for (int i = 0; i < kEach; ++i) {
      const std::uint64_t here = bin(i);
      if (static_cast<double>(reached) < wanted && static_cast<double>(reached + here) >= wanted) {
        memory_.bin = top - i;
        memory_.above = reached;
        memory_.inside = here;
      }
      reached += here;
    }
  }

  // The token at which the running sum of units reaches `wanted`, told to all by the block that
  // holds it.
  template <class Units, class PackUnits>
  HOTLOOP_BOTH std::int64_t pick_among(const RowSource& row, const std::uint64_t* parts, std::uint64_t wanted,
                                       std::uint64_t before, std::uint64_t own, Units&& units, PackUnits&& pack_units) {
    const bool here = before < wanted && wanted <= before + own;
    const std::int64_t token = here ? find(row, parts, wanted - before, units, pack_units) : -1;
    if (team_.blocks() == 1) return token;
    if (team_.warp() == 0) {
      team_.put(0, 0, here && team_.thread() == 0 ? static_cast<std::uint64_t>(token + 1) : 0, false);
    }
    team_.reduce(1, 1, 0u);
    return static_cast<std::int64_t>(team_.total(0)) - 1;
  }
  // Inside this block: from stretch to stretch, each the wanted one of the last one's parts, until
  // it has a pack for each thread at most.
  template <class Units, class PackUnits>
  HOTLOOP_BOTH std::int64_t find(const RowSource& row, const std::uint64_t* parts, std::uint64_t wanted, Units&& units,
                                 PackUnits&& pack_units) {
    Packs stretch = share(row);
    int count = parts_;
    for (;;) {
      int at = 0;
      for (; at + 1 < count && parts[at] < wanted; ++at) wanted -= parts[at];
      stretch = piece_of(stretch, count, at);
      if (stretch.end - stretch.begin <= Team::kThreads) break;
      team_.block_sync();  // all have read the parts
      count = kWarps;
      const std::uint64_t x = Team::over_warp(units(piece_of(stretch, kWarps, team_.warp())), true);
      if (team_.in_warp() == 0) memory_.parts[team_.warp()] = x;
      team_.block_sync();
      parts = memory_.parts;
    }
    const std::int64_t pack = stretch.begin + team_.thread();
    std::uint64_t each[kPack] = {};
    if (pack < stretch.end) pack_units(pack, each);
    std::uint64_t sum = 0;
    for (int i = 0; i < kPack; ++i) sum += each[i];
    std::uint64_t reached = team_.scan(sum);
    if (reached < wanted && wanted <= reached + sum) {
      int i = 0;
      for (; i + 1 < kPack && reached + each[i] < wanted; ++i) reached += each[i];
      memory_.found = first_of(row, pack) + i;
    }
    team_.block_sync();
    return memory_.found;
  }

  Team& team_;
  Memory& memory_;
  const LawTable& target_;
  const LawTable* draft_;
  Places places_;
  std::int64_t most_, window_ = 1;
  std::int64_t b_ = 0, rows_ = 0, draft_rows_ = 0;
  std::int64_t first_ = 0, count_ = 0;  // the open window
  std::int64_t taken_ = 0;
  int at_ = 0;
  int parts_ = 1;
  int bin_set_ = 0;
  bool draft_open_ = false;
  Left left_;
  std::uint64_t left_mass_ = 0, left_before_ = 0, left_own_ = 0;
};

}  // namespace hotloop::decode::gpu
