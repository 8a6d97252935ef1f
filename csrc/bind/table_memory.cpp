// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bind/register.hpp"
#include "bind/released.hpp"
#include "bind/table_arguments.hpp"
#include "table/error_memory/error_memory.hpp"

namespace hotloop::bind {

namespace {

using namespace hotloop::table;

Readout readout_of(const std::array<double, 3>& numbers) { return {numbers[0], numbers[1], numbers[2]}; }

// numbers: (temperature, gamma, lam).
void run_error_memory(const py::object& query, const py::object& keys, std::int64_t first,
                      const py::object& base_prediction, const py::object& labels, const py::object& base_predictions,
                      std::int64_t k, const std::array<double, 3>& numbers, const py::object& prediction,
                      const py::object& weights, const py::object& neighbors) {
  Arguments a("error_memory", 8);
  MemoryCall call{};
  call.query = a.tile(query, "query", false);
  call.keys = a.tile(keys, "keys", false);
  const std::int64_t rows = call.query.shape[0], slots = call.keys.shape[0];
  dispatch_float(call.keys.dtype, "error_memory", "keys", [](auto) {});
  const Dtype r = call.keys.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  if (call.query.dtype != r || call.query.shape[1] != call.keys.shape[1]) a.fail("query", "expected rows like keys");
  if (slots > 0 && call.keys.shape[1] < 1) a.fail("keys", "expected at least one dimension");
  if (first < 0 || first > slots || k < 0 || k > slots) a.fail("k", "expected 0 to the number of slots");
  call.first = first;
  call.base_prediction = a.dense(base_prediction, "base_prediction", r, {rows}, false).data;
  call.labels = a.dense(labels, "labels", r, {slots}, false).data;
  call.base_predictions = a.dense(base_predictions, "base_predictions", r, {slots}, false).data;
  call.k = k;
  call.readout = readout_of(numbers);
  call.prediction = a.dense(prediction, "prediction", r, {rows}, true).data;
  call.weights = a.dense(weights, "weights", r, {rows, k}, true).data;
  call.neighbors = a.array<std::int64_t>(neighbors, "neighbors", {rows, k});
  const Released released;
  error_memory(call);
}

void run_lsh_buckets(const py::object& hidden, const py::object& projections, const py::object& buckets) {
  Arguments a("lsh_buckets", 3);
  BucketCall call{};
  const View& rows = a.tile(hidden, "hidden", false);
  const View& w = a.rows(projections, "projections");
  if (w.rank != 3 || w.shape[1] < 1 || w.shape[1] > 30) a.fail("projections", "wrong shape " + w.shape_text());
  call.rows = rows.shape[0];
  call.dim = rows.shape[1];
  call.repeats = w.shape[0];
  call.bits = w.shape[1];
  call.hidden = a.array<const float>(hidden, "hidden", {call.rows, call.dim});
  call.projections = a.array<const float>(projections, "projections", {call.repeats, call.bits, call.dim});
  call.buckets = a.array<std::int32_t>(buckets, "buckets", {call.rows, call.repeats});
  const Released released;
  lsh_buckets(call);
}

void sketch_arguments(Arguments& a, SketchCall& call, const py::object& buckets, const py::object& sketch,
                      bool writable) {
  const View& ids = a.tile(buckets, "buckets", false);
  call.rows = ids.shape[0];
  call.repeats = ids.shape[1];
  call.buckets = a.array<const std::int32_t>(buckets, "buckets", {call.rows, call.repeats});
  const View& table = a.rows(sketch, "sketch");
  if (table.rank != 3) a.fail("sketch", "wrong shape " + table.shape_text());
  call.size = table.shape[1];
  call.sketch =
      static_cast<std::int64_t*>(a.dense(sketch, "sketch", Dtype::kInt64, {call.repeats, call.size, 3}, writable).data);
  for (std::int64_t i = 0; i < call.rows * call.repeats; ++i) {
    if (call.buckets[i] < 0 || call.buckets[i] >= call.size) a.fail("buckets", "expected buckets of the sketch");
  }
}

void run_sketch_write(const py::object& buckets, const py::object& labels, const py::object& base_predictions,
                      const py::object& sketch) {
  Arguments a("lsh_error_sketch_write", 6);
  SketchCall call{};
  sketch_arguments(a, call, buckets, sketch, true);
  const double* y = a.array<const double>(labels, "labels", {call.rows});
  const double* base = a.array<const double>(base_predictions, "base_predictions", {call.rows});
  for (std::int64_t b = 0; b < call.rows; ++b) {
    if (!(y[b] >= 0.0 && y[b] <= 1.0 && base[b] >= 0.0 && base[b] <= 1.0)) a.fail("labels", "expected 0 to 1");
  }
  const Released released;
  sketch_write(call, y, base);
}

// numbers: (temperature, gamma, lam).
void run_sketch_read(const py::object& buckets, const py::object& base_prediction, const py::object& sketch,
                     double share, const std::array<double, 3>& numbers, const py::object& prediction,
                     const py::object& weights) {
  Arguments a("lsh_error_sketch", 8);
  SketchReadCall call{};
  sketch_arguments(a, call, buckets, sketch, false);
  call.base_prediction = a.array<const double>(base_prediction, "base_prediction", {call.rows});
  call.share = share;
  call.readout = readout_of(numbers);
  call.prediction = a.array<double>(prediction, "prediction", {call.rows});
  call.weights = a.array<double>(weights, "weights", {call.rows, call.repeats});
  const Released released;
  sketch_read(call);
}

}  // namespace

HOTLOOP_BIND(table) {
  def(m, "error_memory", &run_error_memory,
      "query keys first base_prediction labels base_predictions k numbers prediction weights neighbors");
  def(m, "lsh_buckets", &run_lsh_buckets, "hidden projections buckets");
  def(m, "lsh_sketch_write", &run_sketch_write, "buckets labels base_predictions sketch");
  def(m, "lsh_sketch_read", &run_sketch_read, "buckets base_prediction sketch share numbers prediction weights");
}

}  // namespace hotloop::bind
