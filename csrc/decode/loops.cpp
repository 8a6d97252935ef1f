// SPDX-License-Identifier: Apache-2.0
// The loops that Python calls. Each splits the batch over threads and runs one walk per request, or answers one
// question per logits row; arguments were checked by the binding.
//
// A thread owns one `CpuRows` and reuses it, so a batch allocates its buffers once per thread. Requests share nothing,
// so the number of threads changes no output. A number outside [0, 1] among the probabilities sets a flag of the law,
// which the binding returns; the loop itself goes on, and Python looks for the number and raises.
#include "decode/loops.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/parallel.hpp"

namespace hotloop::decode {

namespace {

// A request is worth a thread from 32768 tokens on; below, requests go together.
std::int64_t grain(std::int64_t vocabulary, std::int64_t rows) { return 1 + 32768 / (vocabulary * rows + 1); }

// f(rows, b, id) for every request, `id` of the type of its token ids.
template <class F>
void over_requests(const VerifyCall& call, F&& f) {
  with_integer(call.ids.dtype, [&](auto id) {
    parallel_for(call.batch, grain(call.target.vocabulary, call.width + 1), [&](std::int64_t begin, std::int64_t end) {
      CpuRows rows(call.target, call.has_draft ? &call.draft : nullptr);
      for (std::int64_t b = begin; b < end; ++b) {
        rows.request(b);
        f(rows, b, id);
      }
    });
  });
}

// f(row, has_law, i) for every row of every request, i its number among all.
template <class F>
void over_rows(const RowsCall& call, F&& f) {
  parallel_for(call.batch * call.rows, grain(call.law.vocabulary, 1), [&](std::int64_t begin, std::int64_t end) {
    OpenRow row;
    for (std::int64_t i = begin; i < end; ++i) f(row, row.open(call.law, i / call.rows, i % call.rows, false), i);
  });
}

}  // namespace

void chain(const VerifyCall& call) {
  over_requests(call, [&](CpuRows& rows, std::int64_t b, auto id) {
    using Id = decltype(id);
    walk_chain(rows, call.tokens<Id>(b), call.length(b), call.seeds.at(b), call.emitted<Id>(b, call.width + 1));
  });
}

void block(const VerifyCall& call) {
  over_requests(call, [&](CpuRows& rows, std::int64_t b, auto id) {
    using Id = decltype(id);
    std::vector<double> reach(static_cast<std::size_t>(call.length(b) + 1));
    walk_block(rows, call.tokens<Id>(b), call.length(b), call.seeds.at(b), reach.data(),
               call.emitted<Id>(b, call.width + 1));
  });
}

void tree(const TreeCall& call) {
  over_requests(call, [&](CpuRows& rows, std::int64_t b, auto id) {
    using Id = decltype(id);
    walk_tree(rows, call.tree<Id>(b), call.seeds.at(b), call.nodes + b * call.depth,
              call.emitted<Id>(b, call.depth + 1));
  });
}

void lantern(const LanternCall& call) {
  const Relaxation<std::int32_t> relaxation{call.neighbors, call.columns, call.neighbor_stride, call.k, call.delta};
  over_requests(call, [&](CpuRows& rows, std::int64_t b, auto id) {
    using Id = decltype(id);
    walk_lantern(rows, call.tokens<Id>(b), call.length(b), relaxation, call.target.greedy(b), call.seeds.at(b),
                 call.moved + b * call.width, call.emitted<Id>(b, call.width + 1));
  });
}

void paths(const PathsCall& call) {
  LawTable whole = call.target;  // a token is typical, or not, under the law before truncation
  whole.top_k = {};
  whole.top_p = {nullptr, 1.0};
  whole.min_p = {};
  const std::int64_t tokens = call.width + 1;
  parallel_for(call.batch, grain(whole.vocabulary, call.paths * tokens), [&](std::int64_t begin, std::int64_t end) {
    OpenRow row;
    for (std::int64_t b = begin; b < end; ++b) {
      std::int64_t* out = call.output + b * tokens;
      std::fill(out, out + tokens, -1);
      const std::int64_t n = std::clamp<std::int64_t>(call.lengths.at(b), 0, call.width);
      std::int64_t best = 0, longest = -1, read = 0;
      double best_score = -std::numeric_limits<double>::infinity();
      for (std::int64_t path = 0; path < call.paths; ++path) {
        const std::int64_t* ids = call.ids + (b * call.paths + path) * tokens;
        std::int64_t accepted = 0;
        double score = 0.0;
        for (; accepted < n; ++accepted) {
          ++read;
          if (!row.open(whole, b, path * tokens + accepted, false)) break;
          const std::int64_t token = ids[accepted + 1];
          if (call.typical) {
            const double p = row.probability(token);
            if (!(p > typical_threshold(row.entropy(call.entropy_eps), call.epsilon, call.alpha))) break;
            score += std::log(p);
          } else if (token != row.best()) {
            break;
          }
        }
        if (accepted > longest || (accepted == longest && accepted > 0 && score > best_score)) {
          longest = accepted;
          best_score = score;
          best = path;
        }
      }
      call.best[b] = best;
      call.accepted[b] = std::max<std::int64_t>(longest, 0);
      if (call.paths > 0) {
        const std::int64_t* ids = call.ids + (b * call.paths + best) * tokens;
        std::copy(ids + 1, ids + 1 + longest, out);
        ++read;
        if (row.open(call.target, b, best * tokens + longest, false)) {
          out[longest] = call.typical ? row.pick(call.seeds.at(b).at(longest).pick) : row.best();
        }
      }
      call.rows_read[b] = read;
    }
  });
}

void sample(const SampleCall& call) {
  over_rows(call, [&](OpenRow& row, bool has_law, std::int64_t i) {
    const Draws draws = call.seeds.at(i / call.rows);
    const std::int64_t token = has_law ? row.pick(draws.at(i % call.rows, 0, kSampling).pick) : -1;
    call.output[i] = token;
    call.logps[i] = token >= 0 ? static_cast<float>(row.logp(token)) : 0.0f;
  });
}

namespace {

template <class Out>
void write_probs(const ProbsCall& call, OpenRow& row, bool has_law, Out* out) {
  const std::int64_t vocabulary = call.law.vocabulary;
  constexpr Out kNever = -std::numeric_limits<Out>::infinity();
  if (!has_law && !call.logits) {
    std::fill(out, out + vocabulary, call.log ? kNever : static_cast<Out>(0));
    return;
  }
  double values[kChunk];
  const double log_mass = std::log(static_cast<double>(row.law.mass) * kWeightUnit);
  for (std::int64_t first = 0; first < vocabulary; first += kChunk) {
    const std::int64_t count = std::min(kChunk, vocabulary - first);
    if (call.log || call.logits) {
      row_logits(row.law.source, first, count, values);
    } else {
      row_probs(row.law, first, count, values);
    }
    for (std::int64_t j = 0; call.log && j < count; ++j) {
      const double logp = values[j] - row.law.max - log_mass;
      values[j] = std::isnan(logp) ? static_cast<double>(kNever) : logp;
    }
    for (std::int64_t j = 0; j < count; ++j) out[first + j] = static_cast<Out>(values[j]);
  }
}

}  // namespace

void probs(const ProbsCall& call) {
  over_rows(call, [&](OpenRow& row, bool has_law, std::int64_t i) {
    if (call.dtype == Dtype::kFloat64) {
      write_probs(call, row, has_law, static_cast<double*>(call.output) + i * call.law.vocabulary);
    } else {
      write_probs(call, row, has_law, static_cast<float*>(call.output) + i * call.law.vocabulary);
    }
  });
}

void top(const TopCall& call) {
  over_rows(call, [&](OpenRow& row, bool has_law, std::int64_t i) {
    std::int64_t* ids = call.output + i * call.k;
    float* logps = call.logps + i * call.k;
    std::fill(ids, ids + call.k, -1);
    std::fill(logps, logps + call.k, -std::numeric_limits<float>::infinity());
    if (!has_law) return;
    const std::vector<std::int64_t> found = row.top(call.k);
    for (std::size_t j = 0; j < found.size(); ++j) {
      ids[j] = found[j];
      logps[j] = static_cast<float>(row.logp(found[j]));
    }
  });
}

void branch_reuse(const ReuseCall& call) {
  with_integer(call.dtype, [&](auto id) {
    using Id = decltype(id);
    const Id* emitted = static_cast<const Id*>(call.emitted);
    const Id* roots = static_cast<const Id*>(call.roots);
    const Id* branches = static_cast<const Id*>(call.branches);
    for (std::int64_t b = 0; b < call.batch; ++b) {
      const std::int64_t at = call.accepted[b];
      const bool inside = at >= 0 && at < call.width;
      const Id token = inside ? emitted[b * call.width + at] : static_cast<Id>(-1);
      const std::int64_t first = (b * call.width + (inside ? at : 0)) * call.kappa;
      std::int64_t j = 0;
      while (j < call.kappa && roots[first + j] != token) ++j;
      const bool found = token >= 0 && j < call.kappa;
      call.reused[b] = found ? 1 : 0;
      call.branch[b] = found ? j : -1;
      Id* window = static_cast<Id*>(call.window) + b * call.following;
      for (std::int64_t i = 0; i < call.following; ++i) {
        window[i] = found ? branches[(first + j) * call.following + i] : static_cast<Id>(-1);
      }
    }
  });
}

void temperatures(const TemperatureCall& call) {
  over_rows(call, [&](OpenRow& row, bool has_law, std::int64_t i) {
    call.output[i] = static_cast<float>(call.temperature);
    if (!has_law) return;
    const double h = (std::log(std::max(row.entropy(0.0), 0.0)) - call.median) / call.std;
    const double scaled = h > 0.0 ? h / call.maximum : h / std::abs(call.minimum);
    call.output[i] = static_cast<float>(call.temperature * (1.0 + call.tau * std::clamp(scaled, -1.0, 1.0)));
  });
}

}  // namespace hotloop::decode
