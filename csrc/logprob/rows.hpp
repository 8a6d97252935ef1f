// SPDX-License-Identifier: Apache-2.0
// Row loops over tiles of logits: [rows, columns `first_column`..] of a [rows, vocabulary] matrix that
// need not exist as a whole. Running statistics let tiles come one after another, or from other devices.
#pragma once

#include <cstdint>

#include "core/simd.hpp"
#include "core/view.hpp"

namespace hotloop::logprob {

// Rows of the statistics matrix [kStatistics, n]. kSumZExp is the sum of (z - max) exp(z - max).
enum Statistic : int { kMax, kSumExp, kSumZExp, kSumExp2, kSumZ, kLabelZ, kStatistics };

// Rows of the statistics matrix of two lm_heads [kDivergenceStatistics, n]; `Exp` sums are relative to the max of their
// lm_head.
enum DivergenceStatistic : int {
  kStudentMax,
  kStudentSumExp,
  kStudentSumZExp,
  kTeacherMax,
  kTeacherSumExp,
  kTeacherSumZExp,
  kTeacherGap,  // sum exp(t - max) (t - s)
  kStudentGap,  // sum exp(s - max) (s - t)
  kDivergenceStatistics
};

struct Transform {
  double scale = 1.0;
  double softcap = 0.0;  // 0: none
  double temperature = 1.0;
};

struct TileCall {
  View tile;                      // [n, columns]
  View bias;                      // [columns], float of the tile's accumulation type; data == nullptr: none
  const std::int64_t* labels;     // [n], index into the whole vocabulary; others never match
  std::int64_t first_column = 0;  // of the tile in the vocabulary
  Transform transform;
};

struct StatisticsCall : TileCall {
  bool all = false;      // also kSumZExp, kSumExp2, kSumZ
  void* statistics;      // [kStatistics, n], updated; max starts at -inf, sums at 0, label at NaN
  std::int64_t* argmax;  // [n], updated; nullptr: not wanted
};

// The tile is overwritten by the gradient.
struct GradientCall : TileCall {
  const void* coefficients;  // [6, n]: lse, a, b, c, d, e (see RowGradient)
};

struct TwoTilesCall {
  View student, teacher;  // [n, columns]
  View student_bias, teacher_bias;
  Transform student_transform, teacher_transform;
};

// divergence_gradient overwrites the student's tile.
struct DivergenceCall : TwoTilesCall {
  double beta = 0.5;
  void* statistics;          // [kDivergenceStatistics, n], updated by divergence_statistics
  const void* coefficients;  // [7, n]: lse_student, lse_teacher, forward, reverse, jsd, KL(q||p), KL(q||M)
  void* mixture;             // [2, n], updated by divergence_mixture: KL(p||M), KL(q||M)
};

// Log-cosh of half the logit gap, and its gradient: sum_v log cosh((s - t) / 2) per row.
struct LogCoshCall : TwoTilesCall {
  void* sums;           // [n], added to; nullptr: not wanted
  const void* weights;  // [n]: the student tile is overwritten by weight * tanh((s - t) / 2); nullptr: not wanted
};

}  // namespace hotloop::logprob

HOTLOOP_SIMD_FUNCTION(logprob, void, row_statistics, (const logprob::StatisticsCall& call), (call))
HOTLOOP_SIMD_FUNCTION(logprob, void, row_gradient, (const logprob::GradientCall& call), (call))
HOTLOOP_SIMD_FUNCTION(logprob, void, divergence_statistics, (const logprob::DivergenceCall& call), (call))
HOTLOOP_SIMD_FUNCTION(logprob, void, divergence_mixture, (const logprob::DivergenceCall& call), (call))
HOTLOOP_SIMD_FUNCTION(logprob, void, divergence_gradient, (const logprob::DivergenceCall& call), (call))
HOTLOOP_SIMD_FUNCTION(logprob, void, log_cosh, (const logprob::LogCoshCall& call), (call))
