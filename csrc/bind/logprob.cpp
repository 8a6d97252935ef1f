// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bind/arguments.hpp"
#include "bind/register.hpp"
#include "logprob/rows.hpp"

namespace hotloop::bind {

namespace {

using namespace hotloop::logprob;

Dtype accumulate_dtype(Dtype dtype) { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }

Transform transform(const py::tuple& t) { return {t[0].cast<double>(), t[1].cast<double>(), t[2].cast<double>()}; }

// A tile of logits and what turns its numbers into logits.
void one_tile(Arguments& a, TileCall& call, const py::object& tile, bool writable, const py::object& bias,
              const py::object& labels, std::int64_t first_column, const py::tuple& logit) {
  call.tile = a.tile(tile, "tile", writable);
  call.bias = a.dense(bias, "bias", accumulate_dtype(call.tile.dtype), {call.tile.shape[1]}, false);
  call.labels = a.array<const std::int64_t>(labels, "labels", {call.tile.shape[0]});
  call.first_column = first_column;
  call.transform = transform(logit);
}

// The tiles of a student and of its teacher.
void two_tiles(Arguments& a, TwoTilesCall& call, const char* op, bool writable, const py::object& student,
               const py::object& teacher, const py::object& student_bias, const py::object& teacher_bias,
               const py::tuple& student_logit, const py::tuple& teacher_logit) {
  call.student = a.tile(student, "student", writable);
  call.teacher = a.tile(teacher, "teacher", false);
  if (call.teacher.dtype != call.student.dtype) {
    throw std::invalid_argument(std::string("[") + op + "] teacher: expected the student's dtype.");
  }
  const Dtype r = accumulate_dtype(call.student.dtype);
  call.student_bias = a.dense(student_bias, "student_bias", r, {call.student.shape[1]}, false);
  call.teacher_bias = a.dense(teacher_bias, "teacher_bias", r, {call.student.shape[1]}, false);
  call.student_transform = transform(student_logit);
  call.teacher_transform = transform(teacher_logit);
}

void run_row_statistics(const py::object& tile, const py::object& bias, const py::object& labels,
                        std::int64_t first_column, const py::tuple& logit, bool all, const py::object& statistics,
                        const py::object& argmax) {
  Arguments a("row_statistics", 5);
  StatisticsCall call;
  one_tile(a, call, tile, false, bias, labels, first_column, logit);
  const std::int64_t n = call.tile.shape[0];
  const Dtype r = accumulate_dtype(call.tile.dtype);
  call.all = all;
  call.statistics = a.dense(statistics, "statistics", r, {kStatistics, n}, true).data;
  call.argmax = a.array<std::int64_t>(argmax, "argmax", {n});
  py::gil_scoped_release release;
  row_statistics(call);
}

void run_row_gradient(const py::object& tile, const py::object& bias, const py::object& labels,
                      std::int64_t first_column, const py::tuple& logit, const py::object& coefficients) {
  Arguments a("row_gradient", 4);
  GradientCall call;
  one_tile(a, call, tile, true, bias, labels, first_column, logit);
  const std::int64_t n = call.tile.shape[0];
  const Dtype r = accumulate_dtype(call.tile.dtype);
  call.coefficients = a.dense(coefficients, "coefficients", r, {6, n}, false).data;
  py::gil_scoped_release release;
  row_gradient(call);
}

// mode: "statistics", "mixture" or "gradient"; arrays the mode does not use are None.
void run_divergence(const std::string& mode, const py::object& student, const py::object& teacher,
                    const py::object& student_bias, const py::object& teacher_bias, const py::tuple& student_logit,
                    const py::tuple& teacher_logit, double beta, const py::object& statistics,
                    const py::object& coefficients, const py::object& mixture) {
  Arguments a("divergence", 7);
  DivergenceCall call;
  two_tiles(a, call, "divergence", mode == "gradient", student, teacher, student_bias, teacher_bias, student_logit,
            teacher_logit);
  const std::int64_t n = call.student.shape[0];
  const Dtype r = accumulate_dtype(call.student.dtype);
  call.beta = beta;
  call.statistics = a.dense(statistics, "statistics", r, {kDivergenceStatistics, n}, true).data;
  call.coefficients = a.dense(coefficients, "coefficients", r, {7, n}, false).data;
  call.mixture = a.dense(mixture, "mixture", r, {2, n}, true).data;
  py::gil_scoped_release release;
  if (mode == "statistics") {
    divergence_statistics(call);
  } else if (mode == "mixture") {
    divergence_mixture(call);
  } else {
    divergence_gradient(call);
  }
}

void run_log_cosh(const py::object& student, const py::object& teacher, const py::object& student_bias,
                  const py::object& teacher_bias, const py::tuple& student_logit, const py::tuple& teacher_logit,
                  const py::object& sums, const py::object& weights) {
  Arguments a("log_cosh", 6);
  LogCoshCall call;
  two_tiles(a, call, "log_cosh", !weights.is_none(), student, teacher, student_bias, teacher_bias, student_logit,
            teacher_logit);
  const std::int64_t n = call.student.shape[0];
  const Dtype r = accumulate_dtype(call.student.dtype);
  call.sums = a.dense(sums, "sums", r, {n}, true).data;
  call.weights = a.dense(weights, "weights", r, {n}, false).data;
  py::gil_scoped_release release;
  log_cosh(call);
}

}  // namespace

HOTLOOP_BIND(logprob) {
  def(m, "row_statistics", &run_row_statistics, "tile bias labels first_column logit all statistics argmax");
  def(m, "row_gradient", &run_row_gradient, "tile bias labels first_column logit coefficients");
  def(m, "divergence", &run_divergence,
      "mode student teacher student_bias teacher_bias student_logit teacher_logit beta statistics coefficients "
      "mixture");
  def(m, "log_cosh", &run_log_cosh,
      "student teacher student_bias teacher_bias student_logit teacher_logit sums weights");
  m.attr("STATISTICS") = static_cast<int>(kStatistics);
  m.attr("DIVERGENCE_STATISTICS") = static_cast<int>(kDivergenceStatistics);
}

}  // namespace hotloop::bind
