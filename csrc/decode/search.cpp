#include "decode/search.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "core/parallel.hpp"
#include "decode/rows.hpp"

namespace hotloop::decode {

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

template <class S>
HOTLOOP_INLINE double widened(S x) {
  return static_cast<double>(to_float(x));
}

// log sum exp of a row, NaN where it has no law (nothing but -inf, or +inf somewhere), and the largest logit of each
// chunk, in `chunk_max`. Weights of floats are those of a draw: rounded to 2^-42 of the largest.
class LogSum {
 public:
  explicit LogSum(std::int64_t vocabulary)
      : chunk_max(static_cast<std::size_t>(chunk_count(vocabulary))), mass_(chunk_max.size()) {}

  template <class S>
  double of(const S* row, std::int64_t vocabulary) {
    RowLaw law;
    law.source.data = row;
    law.source.dtype = DtypeOf<S>::value;
    law.source.vocabulary = vocabulary;
    law.threshold = -kInf;
    law.max = row_max(law.source, chunk_max.data());
    if (!std::isfinite(law.max)) return std::nan("");
    if constexpr (std::is_same_v<S, double>) {
      double sum = 0.0;
      for (std::int64_t i = 0; i < vocabulary; ++i) sum += row[i] == row[i] ? std::exp(row[i] - law.max) : 0.0;
      return law.max + std::log(sum);
    } else {
      const std::uint64_t mass = row_mass(law, chunk_max.data(), mass_.data());
      return law.max + std::log(static_cast<double>(mass) * kWeightUnit);
    }
  }
  std::vector<double> chunk_max;

 private:
  std::vector<std::uint64_t> mass_;
};

// The largest keys seen, largest first; among equals the first that came. Holds `size` of at most `most`.
struct Kept {
  double* keys;
  std::int64_t* ids;
  std::int64_t most, size = 0;

  double threshold() const { return size < most ? -kInf : keys[size - 1]; }
  void offer(double key, std::int64_t id) {
    if (!(key > threshold())) return;
    std::int64_t at = size < most ? size++ : size - 1;
    for (; at > 0 && keys[at - 1] < key; --at) {
      keys[at] = keys[at - 1];
      ids[at] = ids[at - 1];
    }
    keys[at] = key;
    ids[at] = id;
  }
};

// A token is ranked inside its row by its key: its logit, or that less the reference's. Score: parent + key - shift.
struct ScannedRow {
  Kept kept;
  double shift;
};

// Reads rows of one vocabulary; scratch is kept from row to row.
class Scanner {
 public:
  explicit Scanner(std::int64_t vocabulary) : vocabulary_(vocabulary), law_(vocabulary), ref_law_(vocabulary) {}

  template <class S>
  void scan(const S* row, const S* ref, ScannedRow& out) {
    out.shift = law_.of(row, vocabulary_);
    if (ref != nullptr) {
      out.shift -= ref_law_.of(ref, vocabulary_);
      return scan_differences(row, ref, out.kept);
    }
    // The `most`-th largest of the chunks' maxima bounds the `most`-th largest logit from below: chunks under it hold
    // none of those wanted.
    maxima_ = law_.chunk_max;
    const auto most = std::min(static_cast<std::size_t>(out.kept.most), maxima_.size());
    const auto bound = maxima_.begin() + static_cast<std::ptrdiff_t>(most - 1);
    std::nth_element(maxima_.begin(), bound, maxima_.end(), [](double x, double y) { return x > y; });
    for (std::size_t c = 0; c < maxima_.size(); ++c) {
      if (law_.chunk_max[c] < *bound || !(law_.chunk_max[c] > out.kept.threshold())) continue;
      const std::int64_t begin = static_cast<std::int64_t>(c) * kChunk, end = std::min(begin + kChunk, vocabulary_);
      for (std::int64_t i = begin; i < end; ++i) out.kept.offer(widened(row[i]), i);
    }
  }

 private:
  template <class S>
  void scan_differences(const S* row, const S* ref, Kept& kept) const {
    for (std::int64_t begin = 0; begin < vocabulary_; begin += kChunk) {
      const std::int64_t count = std::min(kChunk, vocabulary_ - begin);
      std::array<double, kChunk> key;
      std::array<double, 8> lanes;
      lanes.fill(-kInf);
      key.fill(-kInf);
      for (std::int64_t i = 0; i < count; ++i) {
        key[static_cast<std::size_t>(i)] = widened(row[begin + i]) - widened(ref[begin + i]);
      }
      for (std::size_t i = 0; i < key.size(); i += lanes.size()) {
        for (std::size_t l = 0; l < lanes.size(); ++l) lanes[l] = key[i + l] > lanes[l] ? key[i + l] : lanes[l];
      }
      if (!(*std::max_element(lanes.begin(), lanes.end()) > kept.threshold())) continue;
      for (std::int64_t i = 0; i < count; ++i) {
        const double k = key[static_cast<std::size_t>(i)];
        if (k < kInf) kept.offer(k, begin + i);
      }
    }
  }

  std::int64_t vocabulary_;
  LogSum law_, ref_law_;
  std::vector<double> maxima_;
};

template <class S>
double key_of(const S* row, const S* ref, std::int64_t id) {
  double key = widened(row[id]);
  if (ref != nullptr) key -= widened(ref[id]);
  return key < kInf ? key : -kInf;  // NaN too
}

struct Candidate {
  double score, key;
  std::int64_t row, id;
  // Larger score first; ties to the lower beam, then to the larger logit, then to the lower id.
  bool operator<(const Candidate& o) const {
    return std::tie(o.score, row, o.key, id) < std::tie(score, o.row, key, o.id);
  }
};

struct Finished {
  double score;
  std::int64_t from, id, length;  // from: a finished slot (id < 0), or the live beam it ends
};

class BeamMerge {
 public:
  explicit BeamMerge(const BeamCall& call) : c_(call) {}

  // rows: what `scan` found for each row of logits of request b.
  template <class S>
  void request(std::int64_t b, const ScannedRow* rows, const S* logits, const S* ref) {
    if (c_.before.done[b] != 0) return carry_over(b);
    candidates_.clear();
    endings_.clear();
    for (std::int64_t r = 0; r < c_.logits.shape[1]; ++r) {
      const double score = c_.before.scores[b * c_.width + r];
      if (!(score > -kInf) || std::isnan(rows[r].shift)) continue;
      const Kept& kept = rows[r].kept;
      for (std::int64_t i = 0; i < kept.size; ++i) {
        if (!ends(kept.ids[i])) add(candidates_, score, kept.keys[i], rows[r].shift, r, kept.ids[i]);
      }
      const S* row = logits + r * c_.logits.stride[1];
      const S* row_ref = ref == nullptr ? nullptr : ref + r * c_.ref_logits.stride[1];
      for (const std::int64_t id : c_.eos) add(endings_, score, key_of(row, row_ref, id), rows[r].shift, r, id);
    }
    std::sort(candidates_.begin(), candidates_.end());
    std::sort(endings_.begin(), endings_.end());
    finish(b);
    advance(b);
    const double best = c_.after.scores[b * c_.width];
    const std::int64_t last = (b + 1) * c_.width - 1;
    const bool full = c_.after.finished_lengths[last] >= 0;
    // With a reference scores may rise again, so only the end of all beams ends the search.
    c_.after.done[b] = best == -kInf || (ref == nullptr && full && !(best > c_.after.finished_scores[last])) ? 1 : 0;
  }

 private:
  bool ends(std::int64_t id) const { return std::find(c_.eos.begin(), c_.eos.end(), id) != c_.eos.end(); }
  static void add(std::vector<Candidate>& to, double score, double key, double shift, std::int64_t row,
                  std::int64_t id) {
    const double total = score + (key - shift);
    if (total > -kInf) to.push_back({total, key, row, id});
  }
  static void copy(std::int64_t* to, const std::int64_t* from, std::int64_t count) {
    if (count > 0) std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(std::int64_t));
  }
  const std::int64_t* live_before(std::int64_t b, std::int64_t r) const {
    return c_.before.token_ids + (b * c_.width + r) * c_.length;
  }

  // Beams that end now are those whose end is among the `width` best of all children.
  void finish(std::int64_t b) {
    pool_.clear();
    for (std::int64_t i = 0; i < c_.width; ++i) {
      const std::int64_t slot = b * c_.width + i;
      if (c_.before.finished_lengths[slot] < 0) continue;
      pool_.push_back({c_.before.finished_scores[slot], slot, -1, c_.before.finished_lengths[slot]});
    }
    std::size_t better = 0;
    for (std::size_t e = 0; e < endings_.size(); ++e) {
      while (better < candidates_.size() && candidates_[better] < endings_[e]) ++better;
      if (better + e >= static_cast<std::size_t>(c_.width)) break;
      pool_.push_back({endings_[e].score, endings_[e].row, endings_[e].id, c_.length + 1});
    }
    const auto better_first = [](const Finished& x, const Finished& y) { return x.score > y.score; };
    std::stable_sort(pool_.begin(), pool_.end(), better_first);
    for (std::int64_t i = 0; i < c_.width; ++i) {
      const std::int64_t slot = b * c_.width + i;
      std::int64_t* ids = c_.after.finished_ids + slot * (c_.length + 1);
      std::fill(ids, ids + c_.length + 1, std::int64_t{-1});
      const bool used = static_cast<std::size_t>(i) < pool_.size();
      c_.after.finished_scores[slot] = used ? pool_[static_cast<std::size_t>(i)].score : -kInf;
      c_.after.finished_lengths[slot] = used ? pool_[static_cast<std::size_t>(i)].length : -1;
      if (!used) continue;
      const Finished& f = pool_[static_cast<std::size_t>(i)];
      copy(ids, f.id < 0 ? c_.before.finished_ids + f.from * c_.length : live_before(b, f.from), c_.length);
      if (f.id >= 0) ids[c_.length] = f.id;
    }
  }

  void advance(std::int64_t b) {
    for (std::int64_t i = 0; i < c_.width; ++i) {
      const std::int64_t slot = b * c_.width + i;
      std::int64_t* ids = c_.after.token_ids + slot * (c_.length + 1);
      const bool used = static_cast<std::size_t>(i) < candidates_.size();
      const Candidate next = used ? candidates_[static_cast<std::size_t>(i)] : Candidate{-kInf, 0.0, 0, 0};
      c_.after.scores[slot] = next.score;
      c_.beam_indices[slot] = next.row;
      c_.next_ids[slot] = next.id;
      if (used) {
        copy(ids, live_before(b, next.row), c_.length);
        ids[c_.length] = next.id;
      } else {
        std::fill(ids, ids + c_.length + 1, std::int64_t{-1});
      }
    }
  }

  void carry_over(std::int64_t b) {
    for (std::int64_t slot = b * c_.width; slot < (b + 1) * c_.width; ++slot) {
      c_.after.scores[slot] = c_.before.scores[slot];
      c_.after.finished_scores[slot] = c_.before.finished_scores[slot];
      c_.after.finished_lengths[slot] = c_.before.finished_lengths[slot];
      c_.beam_indices[slot] = slot - b * c_.width;
      c_.next_ids[slot] = 0;
      const std::pair<const std::int64_t*, std::int64_t*> moves[] = {{c_.before.token_ids, c_.after.token_ids},
                                                                     {c_.before.finished_ids, c_.after.finished_ids}};
      for (const auto& [from, to] : moves) {
        copy(to + slot * (c_.length + 1), from + slot * c_.length, c_.length);
        to[slot * (c_.length + 1) + c_.length] = -1;
      }
    }
    c_.after.done[b] = 1;
  }

  const BeamCall& c_;
  std::vector<Candidate> candidates_, endings_;
  std::vector<Finished> pool_;
};

template <class S>
void beam_step_of(const BeamCall& call) {
  const std::int64_t rows = call.logits.shape[1], vocabulary = call.logits.shape[2];
  // Ids that end a beam are kept with the others and left out later: what remains is still `width` of them.
  const std::int64_t most = call.width + static_cast<std::int64_t>(call.eos.size());
  std::vector<double> keys(static_cast<std::size_t>(call.batch * rows * most));
  std::vector<std::int64_t> ids(keys.size());
  std::vector<ScannedRow> found(static_cast<std::size_t>(call.batch * rows));
  const auto* logits = static_cast<const S*>(call.logits.data);
  const auto* ref = static_cast<const S*>(call.ref_logits.data);
  parallel_for(call.batch * rows, 1 + 32768 / (vocabulary + 1), [&](std::int64_t begin, std::int64_t end) {
    Scanner scanner(vocabulary);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t b = i / rows, r = i % rows;
      ScannedRow& row = found[static_cast<std::size_t>(i)];
      row = {{keys.data() + i * most, ids.data() + i * most, most}, std::nan("")};
      if (call.before.done[b] != 0 || !(call.before.scores[b * call.width + r] > -kInf)) continue;
      const S* z = logits + b * call.logits.stride[0] + r * call.logits.stride[1];
      const S* z_ref = nullptr;
      if (ref != nullptr) z_ref = ref + b * call.ref_logits.stride[0] + r * call.ref_logits.stride[1];
      scanner.scan(z, z_ref, row);
    }
  });
  BeamMerge merge(call);
  for (std::int64_t b = 0; b < call.batch; ++b) {
    merge.request(b, found.data() + b * rows, logits + b * call.logits.stride[0],
                  ref == nullptr ? nullptr : ref + b * call.ref_logits.stride[0]);
  }
}

// Draws for ties come from a domain of their own, beside those of sampling and verification.
constexpr auto kTies = static_cast<Domain>(2);

}  // namespace

void beam_step(const BeamCall& call) {
  dispatch_float(call.logits.dtype, "likelihood_beam_search", "logits",
                 [&](auto s) { beam_step_of<decltype(s)>(call); });
}

void star_step(const StarCall& call) {
  const RealGrid values(call.values);
  const IntGrid visits(call.visits);
  const auto visit = [&](std::int64_t b, std::int64_t i) { visits.set(b, i, visits.get(b, i) + 1); };
  // The mean of the children, weighted by their visits; as it was where none was visited.
  const auto average = [&](std::int64_t b, const Children& children, std::int64_t node) {
    double weighted = 0.0, total = 0.0;
    for (std::int64_t c = children.first(node); c >= 0; c = children.next(c)) {
      const auto n = static_cast<double>(visits.get(b, c));
      weighted += values.get(b, c) * n;
      total += n;
    }
    if (total > 0.0) values.set(b, node, weighted / total);
  };
  const auto backup = [&](std::int64_t b, const Children& children, std::int64_t leaf, std::int64_t root) {
    const double rollout = call.rollouts == nullptr ? std::nan("") : call.rollouts[b];
    visit(b, leaf);
    if (rollout == rollout) {
      values.set(b, leaf, values.get(b, leaf) * (1.0 - call.alpha) + rollout * call.alpha);
    } else {
      average(b, children, leaf);
    }
    for (std::int64_t i = leaf; i != root && children.parent(i) >= 0;) {
      i = children.parent(i);
      visit(b, i);
      average(b, children, i);
    }
  };
  const auto best = [&](std::int64_t b, const Children& children, std::int64_t node, std::int64_t depth) {
    const double log_parent = 2.0 * std::log(std::max(static_cast<double>(visits.get(b, node)), 1.0));
    const auto rank = [&](std::int64_t c) {
      const auto n = static_cast<double>(visits.get(b, c));
      const double v = values.get(b, c);
      if (n > 0.0) return Rank{0, or_lowest(v + call.c * std::sqrt(log_parent / n))};
      if (call.unvisited_bonus == kInf) return Rank{1, or_lowest(v)};
      return Rank{0, or_lowest(v + call.unvisited_bonus)};
    };
    std::int64_t chosen = children.first(node), ties = 1;
    Rank top = rank(chosen);
    for (std::int64_t c = children.next(chosen); c >= 0; c = children.next(c)) {
      const Rank r = rank(c);
      if (top < r) {
        top = r;
        chosen = c;
        ties = 1;
      } else if (top == r) {
        ++ties;
      }
    }
    if (!call.random || ties == 1) return chosen;
    const auto tree = static_cast<std::uint64_t>(b), level = static_cast<std::uint64_t>(depth);
    const double u = draw(call.seed, tree, call.offset, level, kTies).pick;
    std::int64_t skip = std::min(static_cast<std::int64_t>(u * static_cast<double>(ties)), ties - 1);
    for (; skip > 0; --skip) {
      do chosen = children.next(chosen);
      while (!(rank(chosen) == top));
    }
    return chosen;
  };
  walk(call.walk, backup, best);
  for (std::int64_t b = 0; b < call.walk.parents.shape[0]; ++b) {
    const std::int64_t node = call.walk.found[b];
    call.ended[b] = node >= 0 && values.get(b, node) >= call.end_gate ? 1 : 0;
  }
}

void puct_step(const PuctCall& call) {
  const RealGrid q(call.q), v(call.v), values(call.values), logps(call.logps);
  const IntGrid visits(call.visits), lengths(call.lengths);
  const auto settle = [&](std::int64_t b, const Children& children, std::int64_t node) {
    const std::int64_t parent = children.parent(node);
    const double reward = parent < 0 ? values.get(b, node) : values.get(b, node) - values.get(b, parent);
    q.set(b, node, reward + call.gamma * v.get(b, node));
  };
  const auto visit = [&](std::int64_t b, std::int64_t i) { visits.set(b, i, visits.get(b, i) + 1); };
  const auto backup = [&](std::int64_t b, const Children& children, std::int64_t leaf, std::int64_t root) {
    settle(b, children, leaf);
    visit(b, leaf);
    for (std::int64_t i = leaf; i != root && children.parent(i) >= 0;) {
      i = children.parent(i);
      double weighted = 0.0, total = 0.0;
      for (std::int64_t c = children.first(i); c >= 0; c = children.next(c)) {
        const auto n = static_cast<double>(std::max<std::int64_t>(visits.get(b, c), 1));
        weighted += n * q.get(b, c);
        total += n;
      }
      v.set(b, i, weighted / total);
      visit(b, i);
      if (i != 0) settle(b, children, i);
    }
  };
  const auto best = [&](std::int64_t b, const Children& children, std::int64_t node, std::int64_t) {
    const double parent_visits = std::sqrt(static_cast<double>(visits.get(b, node)));
    std::int64_t chosen = -1;
    double top = -kInf;
    for (std::int64_t c = children.first(node); c >= 0; c = children.next(c)) {
      const double length = std::pow(static_cast<double>(lengths.get(b, c)), call.length_penalty);
      const double p = std::exp(logps.get(b, c) / length);
      const double explore = call.c_puct * p * parent_visits / (1.0 + static_cast<double>(visits.get(b, c)));
      const double score = or_lowest(q.get(b, c) + explore);
      if (chosen < 0 || score > top) {
        top = score;
        chosen = c;
      }
    }
    return chosen;
  };
  walk(call.walk, backup, best);
}

void backtrack(const BacktrackCall& call) {
  for (std::int64_t b = 0; b < call.batch; ++b) {
    std::int64_t local = call.before.local_attempts[b], total = call.before.total_attempts[b];
    bool correcting = call.before.correcting[b] != 0, done = call.before.done[b] != 0;
    double temperature = correcting ? call.before.temperatures[b] : call.temperature;
    std::int64_t action = kNone, kept = call.prefix_lengths[b], flagged = -1;
    if (!done) {
      ++total;
      const double* p = call.p_unconfident + b * call.phrases;
      const std::int64_t* ends = call.span_ends + b * call.phrases;
      // While a phrase is being corrected, only that phrase is looked at.
      const std::int64_t considered = correcting ? std::min<std::int64_t>(call.phrases, 1) : call.phrases;
      for (std::int64_t i = 0; i < considered && ends[i] >= 0 && flagged < 0; ++i) {
        if (p[i] > call.tau) flagged = i;
      }
      if (flagged < 0 && !correcting) {
        action = kAccept;
        kept += call.chunk_lengths[b];
        done = true;
      } else if (flagged < 0) {
        action = kContinue;
        kept += call.phrases > 0 && ends[0] >= 0 ? ends[0] + 1 : call.chunk_lengths[b];
        correcting = false;
        local = 0;
        temperature = call.temperature;
      } else {
        correcting = true;
        temperature = std::min(temperature + call.temperature_step, call.temperature + call.temperature_rise);
        if (++local >= call.max_local_attempts) {
          action = kCut;
          kept = call.sentence_lengths[b];
          local = 0;
        } else {
          action = kResample;
          kept += flagged == 0 ? 0 : ends[flagged - 1] + 1;
        }
      }
      if (action != kAccept && total >= call.max_total_attempts) {
        action = kStop;
        done = true;
      }
    }
    call.after.local_attempts[b] = local;
    call.after.total_attempts[b] = total;
    call.after.temperatures[b] = temperature;
    call.after.correcting[b] = correcting ? 1 : 0;
    call.after.done[b] = done ? 1 : 0;
    call.actions[b] = action;
    call.kept_lengths[b] = kept;
    call.flagged[b] = flagged;
  }
}

namespace {

struct Neighbor {
  double distance;
  std::int32_t id;
  bool operator<(const Neighbor& o) const { return std::tie(distance, id) < std::tie(o.distance, o.id); }
};

// The nearest codes of one code. Scratch is kept from row to row.
class Nearest {
 public:
  explicit Nearest(const NeighborCall& call)
      : c_(call),
        largest_(*std::max_element(call.squares, call.squares + call.codes)),
        near_(static_cast<std::size_t>(call.codes) + 1),
        sorted_(near_.size()) {}

  void row(std::int64_t i) {
    self_ = c_.first + i;
    products_ = static_cast<const double*>(c_.products.data) + i * c_.products.stride[0];
    own_ = c_.squares[self_];
    // Two codes further apart than this are in the right order; the others are measured again.
    const double unsure = 4.0 * (c_.product_error * std::sqrt(own_) * std::sqrt(largest_) + c_.tiny) +
                          8.0 * static_cast<double>(c_.dim + 8) * 0x1p-52 * (own_ + largest_);
    const double bound = guess();
    gather(bound);
    if (count_ < c_.k) gather(kInf);
    sort();
    const double last = sorted_[static_cast<std::size_t>(c_.k - 1)].distance + unsure;
    if (last > bound) {
      gather(last);
      sort();
    }
    const auto end = sorted_.begin() + count_;
    const auto stop = std::find_if(sorted_.begin() + c_.k, end, [&](const Neighbor& n) { return n.distance > last; });
    for (auto from = sorted_.begin(); from < sorted_.begin() + c_.k;) {
      auto to = from + 1;
      while (to < stop && to->distance - (to - 1)->distance <= unsure) ++to;
      if (to - from > 1) {
        for (auto n = from; n < to; ++n) n->distance = measured(n->id);
        std::sort(from, to);
      }
      from = to;
    }
    for (std::int64_t n = 0; n < c_.k; ++n) c_.out[i * c_.out_stride + n] = sorted_[static_cast<std::size_t>(n)].id;
  }

 private:
  double distance(std::int64_t j) const { return (own_ + c_.squares[j]) - 2.0 * products_[j]; }

  // A distance that a little more than k codes are expected to lie within, from a sample of them.
  double guess() {
    constexpr std::int64_t kSample = 512;
    if (4 * c_.k >= c_.codes || c_.codes < 4 * kSample) return kInf;
    std::array<double, kSample> sample;
    for (std::int64_t s = 0; s < kSample; ++s) {
      const std::int64_t j = s * c_.codes / kSample;
      sample[static_cast<std::size_t>(s)] = j == self_ ? kInf : distance(j);
    }
    const double expected = static_cast<double>(c_.k) * kSample / static_cast<double>(c_.codes);
    const auto rank = static_cast<std::ptrdiff_t>(expected + 4.0 * std::sqrt(expected) + 4.0);
    std::nth_element(sample.begin(), sample.begin() + rank, sample.end());
    return sample[static_cast<std::size_t>(rank)];
  }
  void gather(double bound) {
    count_ = 0;
    for (std::int64_t j = 0; j < c_.codes; ++j) {
      const double d = distance(j);
      near_[static_cast<std::size_t>(count_)] = {d, static_cast<std::int32_t>(j)};
      count_ += static_cast<std::int64_t>(d <= bound) & static_cast<std::int64_t>(j != self_);
    }
  }
  // Into buckets of equal width, which leaves about one element in each to be sorted: 4 times as fast as std::sort on
  // 1200 of them.
  void sort() {
    constexpr std::size_t kBuckets = 2048;
    const auto end = near_.begin() + count_;
    const auto [low, high] = std::minmax_element(near_.begin(), end);
    const double least = low->distance, scale = (kBuckets - 1) / (high->distance - least);
    if (!std::isfinite(scale)) {
      std::sort(near_.begin(), end);
      std::copy(near_.begin(), end, sorted_.begin());
      return;
    }
    std::array<std::int32_t, kBuckets + 1> starts{};
    const auto bucket = [&](const Neighbor& n) { return static_cast<std::size_t>((n.distance - least) * scale); };
    for (auto n = near_.begin(); n < end; ++n) ++starts[bucket(*n) + 1];
    for (std::size_t i = 0; i < kBuckets; ++i) starts[i + 1] += starts[i];
    for (auto n = near_.begin(); n < end; ++n) sorted_[static_cast<std::size_t>(starts[bucket(*n)]++)] = *n;
    auto from = sorted_.begin();
    for (std::size_t i = 0; i < kBuckets; ++i) {
      const auto to = sorted_.begin() + starts[i];
      if (to - from > 1) std::sort(from, to);
      from = to;
    }
  }
  double measured(std::int64_t j) const {
    const double *x = c_.codebook + self_ * c_.dim, *y = c_.codebook + j * c_.dim;
    double sum = 0.0;
    for (std::int64_t d = 0; d < c_.dim; ++d) sum += (x[d] - y[d]) * (x[d] - y[d]);
    return sum;
  }

  const NeighborCall& c_;
  double largest_, own_ = 0.0;
  const double* products_ = nullptr;
  std::int64_t self_ = 0, count_ = 0;
  std::vector<Neighbor> near_, sorted_;
};

}  // namespace

void nearest_codes(const NeighborCall& call) {
  parallel_for(call.rows, 1 + 32768 / (call.codes + 1), [&](std::int64_t begin, std::int64_t end) {
    Nearest nearest(call);
    for (std::int64_t i = begin; i < end; ++i) nearest.row(i);
  });
}

}  // namespace hotloop::decode
