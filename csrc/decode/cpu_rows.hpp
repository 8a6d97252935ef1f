// SPDX-License-Identifier: Apache-2.0
// Rows as a CPU thread reads them: the law of an open row, its truncation, draws from it and from what a rejection
// leaves. One object per thread, reused from request to request, so that its buffers are allocated once.
#pragma once

#include <cstdint>
#include <vector>

#include "decode/rows.hpp"

namespace hotloop::decode {

// Rows of a batch as they lie in memory: row r of request b is at b * batch_stride + (r / inner) * outer_stride +
// (r % inner) * inner_stride elements (two levels for candidate paths, else outer_stride is 0).
struct RowTable {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  std::int64_t batch_stride = 0, outer_stride = 0, inner_stride = 0;
  std::int64_t inner = 1;
  HOTLOOP_INLINE const void* at(std::int64_t b, std::int64_t r) const {
    const std::int64_t element = b * batch_stride + r / inner * outer_stride + r % inner * inner_stride;
    return static_cast<const char*>(data) + element * item_size(dtype);
  }
};

// A parameter of each request: an array, or one number for all.
template <class T>
struct PerRequest {
  const T* data = nullptr;
  T value{};
  HOTLOOP_INLINE T at(std::int64_t b) const { return data == nullptr ? value : data[b]; }
};

// What Python's Logits and Probs say.
struct LawTable {
  RowTable rows;
  RowTable reference;  // data is nullptr without a second model
  std::int64_t vocabulary = 0;
  bool logits = true;
  double mixture = 0.0;
  PerRequest<double> temperature{nullptr, 1.0};
  PerRequest<std::int64_t> top_k;
  PerRequest<double> top_p{nullptr, 1.0};
  PerRequest<double> min_p;
  bool joint = false;
  const std::int64_t* bias_ids = nullptr;  // (B, biases)
  const float* bias = nullptr;
  std::int64_t biases = 0;
  std::uint8_t* refused = nullptr;  // see RowSource

  HOTLOOP_INLINE bool greedy(std::int64_t b) const { return logits && !(temperature.at(b) > 0.0); }
  HOTLOOP_INLINE bool truncates(std::int64_t b) const {
    const std::int64_t k = top_k.at(b);
    return !greedy(b) && ((k > 0 && k < vocabulary) || top_p.at(b) < 1.0 || min_p.at(b) > 0.0);
  }
  // Row r of request b, but for its bias, which is sorted first.
  HOTLOOP_INLINE RowSource source(std::int64_t b, std::int64_t r) const {
    RowSource row;
    row.data = rows.at(b, r);
    row.reference = reference.data == nullptr ? nullptr : reference.at(b, r);
    row.dtype = rows.dtype;
    row.vocabulary = vocabulary;
    row.logits = logits;
    row.mixture = mixture;
    row.refused = refused;
    return row;
  }
};

// A row's law and what its passes left behind.
class OpenRow {
 public:
  RowLaw law;

  // The law of row r of request b. False if the row has none: no finite logit, or one that is +inf. Probabilities
  // without truncation are not read: a row without mass then shows in `pick`.
  bool open(const LawTable& table, std::int64_t b, std::int64_t r, bool softened);
  double probability(std::int64_t id) const { return point_prob(law, id); }
  double logp(std::int64_t id) const;
  std::int64_t best();
  std::int64_t pick(double u);
  // Entropy of the law before truncation, nats. With `inside` > 0: -sum p log(p + inside).
  double entropy(double inside);
  // Tokens of a truncated law and their weights, in units of 2^-42, by ascending id; nothing for a whole one.
  bool sparse() const { return sparse_; }
  const std::vector<std::int32_t>& support() const { return ids_; }
  const std::vector<std::uint64_t>& support_units() const { return units_; }
  // The k most likely tokens, largest first, lowest id among equals.
  std::vector<std::int64_t> top(std::int64_t k);

 private:
  void bias_of(const LawTable& table, std::int64_t b);
  void truncate(std::int64_t top_k, double top_p, double min_p, bool joint);
  void collect(double least);
  void rescale(double temperature);
  void measure();
  double kth_largest(std::int64_t k);
  double reach_down(std::vector<double>& values, std::uint64_t above, double wanted, bool by_mass) const;
  double reach_down_row(double width, double least, double wanted, bool by_mass);
  bool keeps_many(double least) const;

  bool sparse_ = false;
  bool measured_ = false;
  std::vector<double> chunk_max_, z_, order_;
  std::vector<std::uint64_t> chunk_mass_, units_;
  std::vector<std::int32_t> ids_;
  std::vector<std::int64_t> bias_ids_;
  std::vector<float> bias_;
};

class CpuRows {
 public:
  CpuRows(const LawTable& target, const LawTable* draft) : target_(target), draft_(draft) {}
  void request(std::int64_t b) { b_ = b; }

  bool open(std::int64_t row) { return p_.open(target_, b_, row, false); }
  bool open_softened(std::int64_t row) { return p_.open(target_, b_, row, true); }
  bool has_draft() const { return draft_ != nullptr; }
  void open_draft(std::int64_t row) { q_open_ = q_.open(*draft_, b_, row, false); }
  bool is_token(std::int64_t id) const { return id >= 0 && id < target_.vocabulary; }
  double p(std::int64_t id) const { return p_.probability(id); }
  double q(std::int64_t id) const { return q_open_ ? q_.probability(id) : 0.0; }
  std::int64_t best() { return p_.best(); }
  void clear_edits() { edits_.clear(); }
  void take(std::int64_t id) { edit(id, false); }
  void spare(std::int64_t id) { edit(id, true); }
  double residual(double a, double b);
  std::int64_t pick(double u) { return p_.pick(u); }
  std::int64_t pick_residual(double u);
  double logp(std::int64_t id) const { return p_.logp(id); }
  bool leader() const { return true; }
  void sync() const {}
  OpenRow& target() { return p_; }

 private:
  void edit(std::int64_t id, bool spared);

  const LawTable& target_;
  const LawTable* draft_;
  std::int64_t b_ = 0;
  bool q_open_ = false;
  OpenRow p_, q_;
  std::vector<Edit> edits_;
  ResidualCall call_;
  std::uint64_t left_ = 0;                 // mass of the last residual, in units of 2^-51
  std::vector<std::uint64_t> left_parts_;  // by chunk, or by token of a truncated law
};

}  // namespace hotloop::decode
