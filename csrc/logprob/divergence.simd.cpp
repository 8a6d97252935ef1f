// SPDX-License-Identifier: Apache-2.0
// CPU row loops of two lm_heads: the student's tile and the teacher's tile of the same columns side by side.
//
// A row is taken in chunks that fit L1. Both chunks are converted to z once; the eight running sums, the two mixture
// terms or the student's gradient follow from the copies, so each tile is read once and, for the gradient, the
// student's is written once. Running maxima rescale the sums as in rows.simd.cpp. log cosh needs no maximum and has
// loops of its own.
#include <atomic>
#include <cstdint>
#include <limits>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "logprob/heads.hpp"
#include "logprob/row_chunks.hpp"
#include "logprob/rows.hpp"

#include "core/simd_begin.hpp"

namespace {

using namespace hotloop::logprob;

// The chunks of both lm_heads as z, through one interface for the loops below.
template <class Storage, bool kCap>
struct TwoLmHeads {
  using R = typename Accumulate<Storage>::type;
  Matrix<const Storage> student, teacher;
  const R* student_bias;
  const R* teacher_bias;
  LogitMap<R> student_map, teacher_map;

  explicit TwoLmHeads(const TwoTilesCall& call)
      : student(as_matrix<const Storage>(call.student, "divergence", "student", false)),
        teacher(as_matrix<const Storage>(call.teacher, "divergence", "teacher", false)),
        student_bias(static_cast<const R*>(call.student_bias.data)),
        teacher_bias(static_cast<const R*>(call.teacher_bias.data)),
        student_map(logit_map<R>(call.student_transform)),
        teacher_map(logit_map<R>(call.teacher_transform)) {
    if (student.rows != teacher.rows || student.cols != teacher.cols) {
      throw_shape_mismatch(call.student, call.teacher, "divergence", "teacher");
    }
  }
  HOTLOOP_INLINE R load_student(std::int64_t i, std::int64_t first, std::int64_t count, R* z) const {
    return load_logits<kCap>(student.row(i) + first, student_bias == nullptr ? nullptr : student_bias + first, count,
                             student_map, z);
  }
  HOTLOOP_INLINE R load_teacher(std::int64_t i, std::int64_t first, std::int64_t count, R* z) const {
    return load_logits<kCap>(teacher.row(i) + first, teacher_bias == nullptr ? nullptr : teacher_bias + first, count,
                             teacher_map, z);
  }
};

template <class R>
HOTLOOP_INLINE R finite_shift(R maximum) {  // exp(z - shift) of a row of -inf is 0, not NaN
  return maximum == -std::numeric_limits<R>::infinity() ? R(0) : maximum;
}

template <class R>
HOTLOOP_INLINE R floor_log(R x) {
  return x < R(-1e30) ? R(-1e30) : x;
}

template <class Storage, bool kCap>
void statistics_rows(const DivergenceCall& call) {
  const TwoLmHeads<Storage, kCap> heads(call);
  using R = typename Accumulate<Storage>::type;
  const std::int64_t n = heads.student.rows, cols = heads.student.cols;
  R* statistics = static_cast<R*>(call.statistics);
  parallel_for(n, grain_rows(cols), [&](std::int64_t begin, std::int64_t end) {
    alignas(64) R s[kChunk];
    alignas(64) R t[kChunk];
    for (std::int64_t i = begin; i < end; ++i) {
      R row[kDivergenceStatistics];
      for (int k = 0; k < kDivergenceStatistics; ++k) row[k] = statistics[k * n + i];
      for (std::int64_t first = 0; first < cols; first += kChunk) {
        const std::int64_t count = cols - first < kChunk ? cols - first : kChunk;
        const R student_max = heads.load_student(i, first, count, s);
        const R teacher_max = heads.load_teacher(i, first, count, t);
        if (student_max > row[kStudentMax]) {
          const R rescale = vexp_weight(row[kStudentMax] - student_max);
          row[kStudentMax] = student_max;
          row[kStudentSumExp] *= rescale;
          row[kStudentSumZExp] *= rescale;
          row[kStudentGap] *= rescale;
        }
        if (teacher_max > row[kTeacherMax]) {
          const R rescale = vexp_weight(row[kTeacherMax] - teacher_max);
          row[kTeacherMax] = teacher_max;
          row[kTeacherSumExp] *= rescale;
          row[kTeacherSumZExp] *= rescale;
          row[kTeacherGap] *= rescale;
        }
        const R student_shift = finite_shift(row[kStudentMax]), teacher_shift = finite_shift(row[kTeacherMax]);
        R ss = 0, ssz = 0, ts = 0, tsz = 0, tg = 0, sg = 0;
#pragma omp simd reduction(+ : ss, ssz, ts, tsz, tg, sg)
        for (std::int64_t j = 0; j < count; ++j) {
          const R q = vexp_weight(s[j] - student_shift);
          const R p = vexp_weight(t[j] - teacher_shift);
          const R gap = t[j] - s[j];
          ss += q;
          ts += p;
          // A weight of 0 silences the logit, even one of -inf.
          ssz += q == R(0) ? R(0) : q * s[j];
          tsz += p == R(0) ? R(0) : p * t[j];
          tg += p == R(0) ? R(0) : p * gap;
          sg -= q == R(0) ? R(0) : q * gap;
        }
        row[kStudentSumExp] += ss;
        row[kStudentSumZExp] += ssz;
        row[kTeacherSumExp] += ts;
        row[kTeacherSumZExp] += tsz;
        row[kTeacherGap] += tg;
        row[kStudentGap] += sg;
      }
      for (int k = 0; k < kDivergenceStatistics; ++k) statistics[k * n + i] = row[k];
    }
  });
}

template <class Storage, bool kCap>
void mixture_rows(const DivergenceCall& call) {
  const TwoLmHeads<Storage, kCap> heads(call);
  using R = typename Accumulate<Storage>::type;
  const std::int64_t n = heads.student.rows, cols = heads.student.cols;
  const R* coefficients = static_cast<const R*>(call.coefficients);
  R* mixture = static_cast<R*>(call.mixture);
  parallel_for(n, grain_rows(cols), [&](std::int64_t begin, std::int64_t end) {
    // A local: read through the closure, GCC 12 takes it for a gather and vectorises nothing.
    const R beta = static_cast<R>(call.beta);
    alignas(64) R s[kChunk];
    alignas(64) R t[kChunk];
    for (std::int64_t i = begin; i < end; ++i) {
      const R lse_student = coefficients[i], lse_teacher = coefficients[n + i];
      R teacher_total = mixture[i], student_total = mixture[n + i];
      for (std::int64_t first = 0; first < cols; first += kChunk) {
        const std::int64_t count = cols - first < kChunk ? cols - first : kChunk;
        heads.load_student(i, first, count, s);
        heads.load_teacher(i, first, count, t);
        R teacher_kl = 0, student_kl = 0;
#pragma omp simd reduction(+ : teacher_kl, student_kl)
        for (std::int64_t j = 0; j < count; ++j) {
          // -inf becomes a large finite number, so that a weight of 0 gives 0 without a select on the sum,
          // which GCC 12 would not vectorise. NaN stays NaN.
          const R log_q = floor_log(s[j] - lse_student), log_p = floor_log(t[j] - lse_teacher);
          const R q = vexp_weight(log_q), p = vexp_weight(log_p);
          const R log_m = log_mixture(beta * p + (R(1) - beta) * q + R(1e-37));
          teacher_kl += p * (log_p - log_m);
          student_kl += q * (log_q - log_m);
        }
        teacher_total += teacher_kl;
        student_total += student_kl;
      }
      mixture[i] = teacher_total;
      mixture[n + i] = student_total;
    }
  });
}

template <class Storage, bool kCap, bool kJsd>
void gradient_rows(const DivergenceCall& call) {
  const TwoLmHeads<Storage, kCap> heads(call);
  using R = typename Accumulate<Storage>::type;
  const auto out = as_matrix<Storage>(call.student, "divergence_gradient", "student", true);
  const std::int64_t n = out.rows, cols = out.cols;
  const R* coefficients = static_cast<const R*>(call.coefficients);
  parallel_for(n, grain_rows(cols), [&](std::int64_t begin, std::int64_t end) {
    alignas(64) R s[kChunk];
    alignas(64) R t[kChunk];
    for (std::int64_t i = begin; i < end; ++i) {
      const DivergenceGradient<R> g{coefficients[i],         coefficients[n + i],      coefficients[2 * n + i],
                                    coefficients[3 * n + i], coefficients[4 * n + i],  coefficients[5 * n + i],
                                    coefficients[6 * n + i], static_cast<R>(call.beta)};
      for (std::int64_t first = 0; first < cols; first += kChunk) {
        const std::int64_t count = cols - first < kChunk ? cols - first : kChunk;
        heads.load_student(i, first, count, s);
        heads.load_teacher(i, first, count, t);
        Storage* row = out.row(i) + first;
#pragma omp simd
        for (std::int64_t j = 0; j < count; ++j) {
          s[j] = g.template at<kJsd>(s[j], t[j]) * heads.student_map.template slope<kCap>(s[j]);
        }
        store_chunk(s, count, row);
      }
    }
  });
}

template <class Storage, bool kCap>
void log_cosh_rows(const LogCoshCall& call) {
  const TwoLmHeads<Storage, kCap> heads(call);
  using R = typename Accumulate<Storage>::type;
  const std::int64_t n = heads.student.rows, cols = heads.student.cols;
  const bool write = call.weights != nullptr;
  const auto out = as_matrix<Storage>(call.student, "log_cosh", "student", write);
  R* sums = static_cast<R*>(call.sums);
  const R* weights = static_cast<const R*>(call.weights);
  parallel_for(n, grain_rows(cols), [&](std::int64_t begin, std::int64_t end) {
    alignas(64) R s[kChunk];
    alignas(64) R t[kChunk];
    for (std::int64_t i = begin; i < end; ++i) {
      R total = 0;
      for (std::int64_t first = 0; first < cols; first += kChunk) {
        const std::int64_t count = cols - first < kChunk ? cols - first : kChunk;
        heads.load_student(i, first, count, s);
        heads.load_teacher(i, first, count, t);
        if (sums != nullptr) {
          R sum = 0;
#pragma omp simd reduction(+ : sum)
          for (std::int64_t j = 0; j < count; ++j) {
            // log cosh x = |x| + log1p(e^(-2|x|)) - log 2, here with x = (s - t) / 2.
            const R x = vabs(s[j] - t[j]) * R(0.5);
            sum += x + vlog1p_unit(vexp_weight(R(-2) * x)) - R(0.6931471805599453);
          }
          total += sum;
        }
        if (write) {
          Storage* row = out.row(i) + first;
          const R weight = weights[i];
#pragma omp simd
          for (std::int64_t j = 0; j < count; ++j) {
            s[j] = weight * vtanh((s[j] - t[j]) * R(0.5)) * heads.student_map.template slope<kCap>(s[j]);
          }
          store_chunk(s, count, row);
        }
      }
      if (sums != nullptr) sums[i] += total;
    }
  });
}

template <class F>
void dispatch_heads(const TwoTilesCall& call, F&& f) {
  note_simd_level();
  dispatch_float(call.student.dtype, "divergence", "student", [&](auto storage) {
    if (call.student_transform.softcap > 0 || call.teacher_transform.softcap > 0) {
      f(storage, std::true_type{});
    } else {
      f(storage, std::false_type{});
    }
  });
}

}  // namespace

void divergence_statistics(const logprob::DivergenceCall& call) {
  dispatch_heads(call, [&](auto storage, auto cap) { statistics_rows<decltype(storage), cap.value>(call); });
}
void divergence_mixture(const logprob::DivergenceCall& call) {
  dispatch_heads(call, [&](auto storage, auto cap) { mixture_rows<decltype(storage), cap.value>(call); });
}
void divergence_gradient(const logprob::DivergenceCall& call) {
  const bool jsd = call.mixture != nullptr;
  dispatch_heads(call, [&](auto storage, auto cap) {
    if (jsd) {
      gradient_rows<decltype(storage), cap.value, true>(call);
    } else {
      gradient_rows<decltype(storage), cap.value, false>(call);
    }
  });
}
void log_cosh(const logprob::LogCoshCall& call) {
  dispatch_heads(call, [&](auto storage, auto cap) { log_cosh_rows<decltype(storage), cap.value>(call); });
}

#include "core/simd_end.hpp"
