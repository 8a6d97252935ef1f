// SPDX-License-Identifier: Apache-2.0
// One row under its law, as a CPU thread reads it.
//
// `open` finds the largest logit of every chunk of 512 tokens and then the mass of the chunks. Probabilities without
// truncation are taken as given: nothing of them is read before a token is looked up or drawn. A draw walks the masses
// of the chunks to the one that holds its unit, and reads that chunk again. Truncation looks for a threshold first: for
// top-k the k-th largest chunk maximum bounds it from below, for top-p a histogram of 1024 steps finds the step it lies
// in. If few tokens remain the law becomes sparse: their ids and weights are kept, and no later question reads the row.
// A residual, what a rejection leaves, is summed chunk by chunk in the same way; tokens that were taken out or spared
// are a short list of edits beside it.
#include "decode/cpu_rows.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

namespace hotloop::decode {

namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();

template <class Storage>
double point_logit(const RowSource& row, std::int64_t id) {
  using R = typename Accumulate<Storage>::type;
  R z = static_cast<R>(to_float(static_cast<const Storage*>(row.data)[id]));
  if (!row.logits) {
    if (!is_probability(z)) refuse(row);
    return static_cast<double>(given_probability(z));
  }
  if (row.reference != nullptr) {
    const R second = static_cast<R>(to_float(static_cast<const Storage*>(row.reference)[id]));
    z = static_cast<R>(1.0 - row.mixture) * z + static_cast<R>(row.mixture) * second;
  }
  const std::int64_t* end = row.bias_ids + row.biases;
  for (const std::int64_t* at = std::lower_bound(row.bias_ids, end, id); at != end && *at == id; ++at) {
    z = z + static_cast<R>(row.bias[at - row.bias_ids]);
  }
  return static_cast<double>(z * static_cast<R>(row.scale));
}

double weight_of(const RowLaw& law, double z) {
  if (!law.source.logits) return to_weight_grid(z);
  if (law.source.dtype == Dtype::kFloat64) return logit_weight(z, law.max);
  return logit_weight(static_cast<float>(z), static_cast<float>(law.max));
}

// The place at which the running sum of `parts` reaches `wanted`; `wanted` becomes what is wanted inside it.
std::size_t reach(const std::vector<std::uint64_t>& parts, std::size_t count, std::uint64_t* wanted) {
  std::size_t i = 0;
  for (; i + 1 < count && parts[i] < *wanted; ++i) *wanted -= parts[i];
  return i;
}

// The token of a chunk of values (multiples of a unit) at which their running sum reaches `wanted` units.
std::int64_t reach_token(const double* values, std::int64_t count, std::uint64_t wanted,
                         std::uint64_t (*units)(double)) {
  std::int64_t last = -1;
  for (std::int64_t j = 0; j < count; ++j) {
    const std::uint64_t here = units(values[j]);
    if (here == 0) continue;
    last = j;
    if (here >= wanted) break;
    wanted -= here;
  }
  return last;
}

}  // namespace

double point_value(const RowSource& row, std::int64_t id) {
  return with_float(row.dtype, [&](auto storage) { return point_logit<decltype(storage)>(row, id); });
}

double point_weight(const RowLaw& law, std::int64_t id) {
  if (id < 0 || id >= law.source.vocabulary) return 0.0;
  if (law.greedy) return id == law.best ? 1.0 : 0.0;
  const double z = point_value(law.source, id);
  const double w = z >= law.threshold ? weight_of(law, z) : 0.0;
  return w >= law.min_weight ? w : 0.0;
}

double point_prob(const RowLaw& law, std::int64_t id) {
  if (id < 0 || id >= law.source.vocabulary) return 0.0;
  if (law.as_given) return point_value(law.source, id);
  return law.greedy ? point_weight(law, id) : point_weight(law, id) * law.inverse;
}

void OpenRow::bias_of(const LawTable& table, std::int64_t b) {
  law.source.biases = 0;
  if (table.biases == 0) return;
  std::vector<std::int64_t> order;
  for (std::int64_t i = 0; i < table.biases; ++i) {
    const std::int64_t id = table.bias_ids[b * table.biases + i];
    if (id >= 0 && id < table.vocabulary) order.push_back(b * table.biases + i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t i, std::int64_t j) { return table.bias_ids[i] < table.bias_ids[j]; });
  bias_ids_.clear();
  bias_.clear();
  for (const std::int64_t i : order) {
    bias_ids_.push_back(table.bias_ids[i]);
    bias_.push_back(table.bias[i]);
  }
  law.source.bias_ids = bias_ids_.data();
  law.source.bias = bias_.data();
  law.source.biases = static_cast<std::int64_t>(order.size());
}

bool OpenRow::open(const LawTable& table, std::int64_t b, std::int64_t r, bool softened) {
  law = RowLaw{};
  sparse_ = measured_ = false;
  law.source = table.source(b, r);
  bias_of(table, b);
  const bool greedy = table.greedy(b), truncated = table.truncates(b);
  law.threshold = kNone;
  if (!table.logits && !truncated) {
    law.as_given = true;
    return true;
  }
  chunk_max_.resize(static_cast<std::size_t>(chunk_count(table.vocabulary)));
  law.max = row_max(law.source, chunk_max_.data());
  if (!std::isfinite(law.max) || (!table.logits && !(law.max > 0.0))) return false;
  if (greedy && !softened) {
    law.greedy = true;
    law.best = best();
    law.mass = weight_units(1.0);
    law.inverse = 1.0;
    return true;
  }
  if (table.logits && !greedy) rescale(table.temperature.at(b));
  if (truncated) {
    truncate(table.top_k.at(b), table.top_p.at(b), table.min_p.at(b), table.joint);
  } else {
    measure();
  }
  law.inverse = 1.0 / (static_cast<double>(law.mass) * kWeightUnit);
  return law.mass > 0;
}

// From here on the passes see logits divided by the temperature; what was found of the row so far is brought along.
void OpenRow::rescale(double temperature) {
  const auto by = [this](auto scale) {
    using R = decltype(scale);
    if (scale == R(1)) return;
    law.source.scale = static_cast<double>(scale);
    const auto scaled = [scale](double z) { return static_cast<double>(static_cast<R>(z) * scale); };
    law.max = scaled(law.max);  // rounding keeps order: the largest product is that of the largest
    for (double& z : chunk_max_) z = scaled(z);
  };
  law.source.dtype == Dtype::kFloat64 ? by(scale_of<double>(temperature, law.max))
                                      : by(scale_of<float>(temperature, static_cast<float>(law.max)));
}

void OpenRow::measure() {
  chunk_mass_.resize(static_cast<std::size_t>(chunk_count(law.source.vocabulary)));
  law.mass = row_mass(law, law.as_given ? nullptr : chunk_max_.data(), chunk_mass_.data());
  measured_ = true;
}

// Tokens whose logit reaches `least`, by ascending id: their ids and logits. Chunks without one are not read.
void OpenRow::collect(double least) {
  ids_.clear();
  z_.clear();
  double z[kChunk];
  for (std::int64_t c = 0; c < chunk_count(law.source.vocabulary); ++c) {
    if (chunk_max_[static_cast<std::size_t>(c)] < least) continue;
    const std::int64_t first = c * kChunk, count = std::min(kChunk, law.source.vocabulary - first);
    row_logits(law.source, first, count, z);
    const std::size_t before = ids_.size();
    ids_.resize(before + static_cast<std::size_t>(count));
    z_.resize(before + static_cast<std::size_t>(count));
    std::size_t n = before;
    for (std::int64_t j = 0; j < count; ++j) {
      ids_[n] = static_cast<std::int32_t>(first + j);
      z_[n] = z[j];
      n += z[j] >= least ? 1 : 0;
    }
    ids_.resize(n);
    z_.resize(n);
  }
}

// The z at which the tokens down to it reach `wanted` in number, or, with weights, in mass; `values` in any order. By
// halving: the larger half of what is left either holds enough, or counts in full.
double OpenRow::reach_down(std::vector<double>& values, std::uint64_t above, double wanted, bool by_mass) const {
  const auto at = [&](std::size_t i) { return values.begin() + static_cast<std::ptrdiff_t>(i); };
  std::size_t low = 0, high = values.size();
  while (high - low > 1) {
    const std::size_t middle = low + (high - low) / 2;
    std::nth_element(at(low), at(middle), at(high), std::greater<>());
    std::uint64_t half = middle - low;
    if (by_mass) {
      half = 0;
      for (std::size_t i = low; i < middle; ++i) half += weight_units(weight_of(law, values[i]));
    }
    if (static_cast<double>(above + half) >= wanted) {
      high = middle;
    } else {
      above += half;
      low = middle;
    }
  }
  return values[low];
}

// The same over the row: a histogram of 1024 steps of z finds the step, and only what lies in it is looked at again.
// The last step takes all below `width`. Chunks under `least` are left out: nothing there is needed.
double OpenRow::reach_down_row(double width, double least, double wanted, bool by_mass) {
  constexpr int kSteps = 1024;
  std::uint64_t held[kSteps] = {};
  double z[kChunk], w[kChunk];
  std::int32_t step[kChunk];
  const double top = law.max, inverse = (kSteps - 1) / width;
  const auto for_chunks = [&](auto&& f) {
    for (std::int64_t c = 0; c < chunk_count(law.source.vocabulary); ++c) {
      if (chunk_max_[static_cast<std::size_t>(c)] < least) continue;
      const std::int64_t count = std::min(kChunk, law.source.vocabulary - c * kChunk);
      row_logits(law.source, c * kChunk, count, z);
      for (std::int64_t j = 0; j < count; ++j) {
        const double down = (top - z[j]) * inverse;
        step[j] = static_cast<std::int32_t>(down < kSteps - 1 ? down : kSteps - 1);  // NaN: the last
      }
      f(c * kChunk, count);
    }
  };
  RowLaw whole = law;
  whole.threshold = kNone;
  for_chunks([&](std::int64_t first, std::int64_t count) {
    if (!by_mass) {
      for (std::int64_t j = 0; j < count; ++j) ++held[step[j]];
      return;
    }
    row_weights(whole, first, count, w);
    for (std::int64_t j = 0; j < count; ++j) held[step[j]] += weight_units(w[j]);
  });
  std::uint64_t above = 0;
  std::int32_t here = 0;
  for (; here < kSteps - 1 && static_cast<double>(above + held[here]) < wanted; ++here) above += held[here];
  order_.clear();
  for_chunks([&](std::int64_t, std::int64_t count) {
    for (std::int64_t j = 0; j < count; ++j) {
      if (step[j] == here && z[j] == z[j]) order_.push_back(z[j]);
    }
  });
  return order_.empty() ? kNone : reach_down(order_, above, wanted, by_mass);
}

// The k-th largest logit, -inf if there are fewer. The k-th largest chunk maximum lies below it, and few tokens above
// that: they are what is collected.
double OpenRow::kth_largest(std::int64_t k) {
  const auto chunks = static_cast<std::int64_t>(chunk_max_.size());
  double least = std::numeric_limits<double>::lowest();
  if (k <= chunks) {
    order_ = chunk_max_;
    std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(), std::greater<>());
    least = std::max(least, order_[static_cast<std::size_t>(k - 1)]);
  } else if (law.source.vocabulary > kChunk) {
    const double lowest = *std::min_element(chunk_max_.begin(), chunk_max_.end());
    // Chunk maxima spread over a few standard deviations; eight times their spread holds all but outliers.
    const double spread = std::isfinite(lowest) ? law.max - lowest : 1.0;
    least = std::max(least, reach_down_row(8.0 * spread + 1e-6, kNone, static_cast<double>(k), false));
  }
  collect(least);
  if (static_cast<std::int64_t>(z_.size()) < k) return kNone;
  order_ = z_;
  std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(), std::greater<>());
  return order_[static_cast<std::size_t>(k - 1)];
}

void OpenRow::truncate(std::int64_t top_k, double top_p, double min_p, bool joint) {
  const bool by_count = top_k > 0 && top_k < law.source.vocabulary;
  const bool by_mass = top_p < 1.0;
  if (by_count) law.threshold = kth_largest(top_k);
  if (by_mass && by_count && !joint) {
    std::uint64_t mass = 0;
    order_.clear();
    for (const double z : z_) {
      if (!(z >= law.threshold)) continue;
      order_.push_back(z);
      mass += weight_units(weight_of(law, z));
    }
    law.threshold = std::max(law.threshold, reach_down(order_, 0, top_p * static_cast<double>(mass), true));
  } else if (by_mass) {
    RowLaw whole = law;
    whole.threshold = kNone;
    chunk_mass_.resize(chunk_max_.size());
    const std::uint64_t mass = row_mass(whole, chunk_max_.data(), chunk_mass_.data());
    double least = std::numeric_limits<double>::min(), width = law.max;
    if (law.source.logits) {
      // Tokens lighter than (1 - top_p) / V of the mass do not hold 1 - top_p of it together: none is needed.
      const double total = static_cast<double>(mass) * kWeightUnit;
      width = 1e-3 - std::log((1.0 - top_p) * total / static_cast<double>(law.source.vocabulary));
      least = law.max - width;
    }
    const double wanted = top_p * static_cast<double>(mass);
    if (keeps_many(least)) {
      law.threshold = std::max(law.threshold, reach_down_row(width, least, wanted, true));
    } else {
      collect(least);
      order_ = z_;
      law.threshold = std::max(law.threshold, reach_down(order_, 0, wanted, true));
    }
  }
  if (min_p > 0.0) law.min_weight = min_p * weight_of(law, law.max);
  if (!by_count) {
    double least = law.threshold;
    if (min_p > 0.0) {
      const double lightest = law.source.logits ? law.max + std::log(min_p) - 1e-3 : std::numeric_limits<double>::min();
      least = std::max(least, lightest);
    }
    // A law of few tokens is kept as a list, one of many is read chunk by chunk like a whole one.
    if (keeps_many(least)) return measure();
    collect(least);
  }
  units_.clear();
  law.mass = 0;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < ids_.size(); ++i) {
    if (!(z_[i] >= law.threshold)) continue;
    const double w = weight_of(law, z_[i]);
    if (!(w >= law.min_weight) || !(w > 0.0)) continue;
    ids_[kept++] = ids_[i];
    units_.push_back(weight_units(w));
    law.mass += units_.back();
  }
  ids_.resize(kept);
  sparse_ = true;
}

// Whether more than one token in sixteen of a few chunks reaches `least`.
bool OpenRow::keeps_many(double least) const {
  const std::int64_t chunks = chunk_count(law.source.vocabulary);
  double z[kChunk];
  std::int64_t seen = 0, kept = 0;
  for (std::int64_t c = 0; c < chunks; c += 1 + chunks / 4) {
    const std::int64_t count = std::min(kChunk, law.source.vocabulary - c * kChunk);
    seen += count;
    if (chunk_max_[static_cast<std::size_t>(c)] < least) continue;
    row_logits(law.source, c * kChunk, count, z);
    for (std::int64_t j = 0; j < count; ++j) kept += z[j] >= least ? 1 : 0;
  }
  return 16 * kept > seen && law.source.vocabulary > kChunk;
}

double OpenRow::logp(std::int64_t id) const {
  if (law.greedy) return id == law.best ? 0.0 : kNone;
  const double p = probability(id);
  if (!(p > 0.0)) return kNone;
  if (!law.source.logits) return std::log(p);
  return point_value(law.source, id) - law.max - std::log(static_cast<double>(law.mass) * kWeightUnit);
}

std::int64_t OpenRow::best() {
  if (law.best >= 0) return law.best;
  if (law.as_given) {
    chunk_max_.resize(static_cast<std::size_t>(chunk_count(law.source.vocabulary)));
    law.max = row_max(law.source, chunk_max_.data());
  }
  const auto chunk = std::find(chunk_max_.begin(), chunk_max_.end(), law.max) - chunk_max_.begin();
  const std::int64_t first = chunk * kChunk;
  double z[kChunk];
  const std::int64_t count = std::min(kChunk, law.source.vocabulary - first);
  row_logits(law.source, first, count, z);
  law.best = first + (std::find(z, z + count, law.max) - z);
  return law.best;
}

std::int64_t OpenRow::pick(double u) {
  if (law.greedy) return law.best;
  if (sparse_) {
    if (law.mass == 0) return -1;
    std::uint64_t wanted = target_units(u, law.mass);
    return ids_[reach(units_, units_.size(), &wanted)];
  }
  if (!measured_) measure();
  if (law.mass == 0) return -1;
  std::uint64_t wanted = target_units(u, law.mass);
  const auto chunk = static_cast<std::int64_t>(reach(chunk_mass_, chunk_mass_.size(), &wanted));
  double w[kChunk];
  const std::int64_t count = std::min(kChunk, law.source.vocabulary - chunk * kChunk);
  row_weights(law, chunk * kChunk, count, w);
  return chunk * kChunk + reach_token(w, count, wanted, weight_units);
}

double OpenRow::entropy(double inside) {
  if (law.greedy && !(inside > 0.0)) return 0.0;
  if (law.source.logits && !law.greedy && !(inside > 0.0)) {
    RowLaw whole = law;
    whole.threshold = kNone;
    whole.min_weight = 0.0;
    std::uint64_t mass = law.mass;
    if (law.threshold > kNone || law.min_weight > 0.0) {
      std::vector<std::uint64_t> parts(chunk_max_.size());
      mass = row_mass(whole, chunk_max_.data(), parts.data());
    }
    const double moment = static_cast<double>(row_entropy(whole, chunk_max_.data())) / static_cast<double>(mass);
    return std::log(static_cast<double>(mass) * kWeightUnit) + moment;
  }
  double total = 0.0;
  double p[kChunk];
  for (std::int64_t first = 0; first < law.source.vocabulary; first += kChunk) {
    const std::int64_t count = std::min(kChunk, law.source.vocabulary - first);
    row_probs(law, first, count, p);
    for (std::int64_t j = 0; j < count; ++j) total -= p[j] > 0.0 ? p[j] * std::log(p[j] + inside) : 0.0;
  }
  return total;
}

std::vector<std::int64_t> OpenRow::top(std::int64_t k) {
  if (law.greedy) return {law.best};
  if (law.as_given) best();  // finds the chunk maxima
  const std::int64_t wanted = std::min(k, law.source.vocabulary);
  std::vector<std::int64_t> found;
  if (wanted <= 0) return found;
  double least = wanted < law.source.vocabulary ? kth_largest(wanted) : kNone;
  if (!(least > kNone)) {
    least = kNone;
    collect(std::numeric_limits<double>::lowest());
  }
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < z_.size(); ++i) {
    if (z_[i] >= least && point_prob(law, ids_[i]) > 0.0) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](std::size_t i, std::size_t j) { return z_[i] > z_[j]; });
  for (std::size_t i = 0; i < order.size() && static_cast<std::int64_t>(i) < wanted; ++i)
    found.push_back(ids_[order[i]]);
  return found;
}

void CpuRows::edit(std::int64_t id, bool spared) {
  if (!is_token(id)) return;
  const auto at =
      std::lower_bound(edits_.begin(), edits_.end(), id, [](const Edit& e, std::int64_t i) { return e.id < i; });
  if (at != edits_.end() && at->id == id) {
    at->spared = spared;
  } else {
    edits_.insert(at, {id, spared});
  }
}

double CpuRows::residual(double a, double b) {
  const bool with_draft = draft_ != nullptr && q_open_ && b > 0.0;
  call_ = {&p_.law,       with_draft ? &q_.law : nullptr,          a, with_draft ? b : 0.0,
           edits_.data(), static_cast<std::int64_t>(edits_.size())};
  if (!p_.sparse()) {
    left_parts_.resize(static_cast<std::size_t>(chunk_count(target_.vocabulary)));
    left_ = row_residual(call_, left_parts_.data());
    return static_cast<double>(left_) * kResidualUnit;
  }
  left_parts_.resize(p_.support().size());
  left_ = 0;
  std::size_t e = 0;
  for (std::size_t i = 0; i < left_parts_.size(); ++i) {
    const std::int64_t id = p_.support()[i];
    while (e < edits_.size() && edits_[e].id < id) ++e;
    const double p = static_cast<double>(p_.support_units()[i]) * kWeightUnit * p_.law.inverse;
    double left;
    if (e < edits_.size() && edits_[e].id == id) {
      left = edits_[e].spared ? decode::residual(a, p, 0.0, 0.0) : 0.0;
    } else {
      left = with_draft ? decode::residual(a, p, b, q_.probability(id)) : decode::residual(a, p, 0.0, 0.0);
    }
    left_ += left_parts_[i] = residual_units(left);
  }
  return static_cast<double>(left_) * kResidualUnit;
}

std::int64_t CpuRows::pick_residual(double u) {
  if (left_ == 0) return -1;
  std::uint64_t wanted = target_units(u, left_);
  const std::size_t part = reach(left_parts_, left_parts_.size(), &wanted);
  if (p_.sparse()) return p_.support()[part];
  const std::int64_t first = static_cast<std::int64_t>(part) * kChunk;
  const std::int64_t count = std::min(kChunk, target_.vocabulary - first);
  double left[kChunk];
  residual_chunk(call_, first, count, left);
  return first + reach_token(left, count, wanted, residual_units);
}

}  // namespace hotloop::decode
