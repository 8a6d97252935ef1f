// SPDX-License-Identifier: Apache-2.0
// One step of a beam search: the log sum exp of every live beam's logits, its best tokens, and the best k of all k V
// children.
//
// LogSum reads a row in chunks and keeps the largest logit of each. Inside its row a token is ranked by its key, its
// logit or that less the reference's: the normaliser is the same for all. A chunk whose largest logit lies below the
// m-th largest of the chunks' maxima holds none of the m tokens wanted and is not read a second time. Rows are scanned
// in parallel, then each request merges its rows: a child that ends a beam goes to the finished ones, the others live
// on. Scores are float64.
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
#include "decode/search/calls.hpp"

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

}  // namespace

void beam_step(const BeamCall& call) {
  dispatch_float(call.logits.dtype, "likelihood_beam_search", "logits",
                 [&](auto s) { beam_step_of<decltype(s)>(call); });
}

}  // namespace hotloop::decode
