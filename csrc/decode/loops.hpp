// SPDX-License-Identifier: Apache-2.0
// The CPU loops of the room: requests in parallel, each a walk (walks.hpp) over its rows (cpu_rows.hpp).
#pragma once

#include <cstdint>

#include "decode/cpu_rows.hpp"
#include "decode/walks.hpp"

namespace hotloop::decode {

// Token ids of either width.
struct Ids {
  const void* data = nullptr;
  Dtype dtype = Dtype::kInt64;
  std::int64_t row_stride = 0;
};
struct Seeds {
  PerRequest<std::int64_t> seed, offset;
  bool counted = true;  // one seed for all: the request's number tells their draws apart
  HOTLOOP_INLINE Draws at(std::int64_t b) const {
    return {static_cast<std::uint64_t>(seed.at(b)), counted ? static_cast<std::uint64_t>(b) : 0, offset.at(b)};
  }
};

// Outputs are contiguous; those that the caller does not want are nullptr.
struct VerifyCall {
  std::int64_t batch = 0, width = 0;  // draft tokens per request, at most
  LawTable target;
  LawTable draft;
  bool has_draft = false;
  Ids ids;                           // (B, width)
  PerRequest<std::int64_t> lengths;  // how many of them count
  Seeds seeds;
  void* output = nullptr;             // (B, width + 1), dtype of ids
  std::int64_t* accepted = nullptr;   // (B,)
  float* logps = nullptr;             // (B, width + 1)
  std::int64_t* rows_read = nullptr;  // (B,)

  // Of request b.
  HOTLOOP_INLINE std::int64_t length(std::int64_t b) const {
    const std::int64_t n = lengths.at(b);
    return n < 0 ? 0 : n < width ? n : width;
  }
  template <class Id>
  HOTLOOP_INLINE const Id* tokens(std::int64_t b) const {
    return static_cast<const Id*>(ids.data) + b * ids.row_stride;
  }
  template <class Id>
  HOTLOOP_INLINE Emitted<Id> emitted(std::int64_t b, std::int64_t out_width) const {
    return {static_cast<Id*>(output) + b * out_width, logps == nullptr ? nullptr : logps + b * out_width, accepted + b,
            rows_read + b, out_width};
  }
};

struct TreeCall : VerifyCall {
  const std::int64_t* parents = nullptr;  // (B, width)
  std::int64_t depth = 0;                 // outputs are (B, depth + 1)
  bool replacement = false;
  std::int64_t* nodes = nullptr;  // (B, depth)

  template <class Id>
  HOTLOOP_INLINE Tree<Id> tree(std::int64_t b) const {
    return {tokens<Id>(b), parents + b * width, length(b), depth, replacement};
  }
};

struct LanternCall : VerifyCall {
  const std::int32_t* neighbors = nullptr;  // (V, columns)
  std::int64_t columns = 0, neighbor_stride = 0;
  std::int64_t k = 0;
  double delta = 0.0;
  float* moved = nullptr;  // (B, width)
};

// Candidate paths: ids (B, paths, width + 1) with the token before the draft first; row i of a path follows token i.
struct PathsCall {
  std::int64_t batch = 0, paths = 0, width = 0;
  LawTable target;
  const std::int64_t* ids = nullptr;  // contiguous
  PerRequest<std::int64_t> lengths;
  Seeds seeds;
  bool typical = false;  // else greedy
  double epsilon = 0.0, alpha = 0.0, entropy_eps = 0.0;
  std::int64_t* output = nullptr;  // (B, width + 1)
  std::int64_t* best = nullptr;
  std::int64_t* accepted = nullptr;
  std::int64_t* rows_read = nullptr;
};

// Rows (B, rows) under their laws.
struct RowsCall {
  std::int64_t batch = 0, rows = 0;
  LawTable law;
};

// A token of each.
struct SampleCall : RowsCall {
  Seeds seeds;
  std::int64_t* output = nullptr;
  float* logps = nullptr;
};

// Probabilities of each row's law, float32 or float64.
struct ProbsCall : RowsCall {
  void* output = nullptr;  // (B, rows, V)
  Dtype dtype = Dtype::kFloat32;
  bool log = false;     // the log-probabilities instead, before rounding to the grid
  bool logits = false;  // the logits instead, as the passes see them: bias added, temperature divided out
};

struct TopCall : RowsCall {
  std::int64_t k = 0;
  std::int64_t* output = nullptr;  // (B, rows, k)
  float* logps = nullptr;
};

// Branch j of position tau whose root is the token emitted there. Token ids are int32 or int64, all arrays contiguous.
struct ReuseCall {
  std::int64_t batch = 0, width = 0, kappa = 0, following = 0;
  Dtype dtype = Dtype::kInt64;
  const void* emitted = nullptr;           // (B, width)
  const std::int64_t* accepted = nullptr;  // (B,)
  const void* roots = nullptr;             // (B, width, kappa)
  const void* branches = nullptr;          // (B, width, kappa, following)
  std::uint8_t* reused = nullptr;          // (B,)
  std::int64_t* branch = nullptr;          // (B,)
  void* window = nullptr;                  // (B, following)
};

struct TemperatureCall : RowsCall {
  double median = 0.0, std = 1.0, maximum = 1.0, minimum = -1.0, temperature = 1.0, tau = 0.0;
  float* output = nullptr;  // (B, rows)
};

void chain(const VerifyCall& call);
void block(const VerifyCall& call);
void tree(const TreeCall& call);
void lantern(const LanternCall& call);
void paths(const PathsCall& call);
void sample(const SampleCall& call);
void probs(const ProbsCall& call);
void top(const TopCall& call);
void branch_reuse(const ReuseCall& call);
void temperatures(const TemperatureCall& call);

}  // namespace hotloop::decode
