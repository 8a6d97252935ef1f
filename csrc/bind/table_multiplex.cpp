// SPDX-License-Identifier: Apache-2.0
// The bindings of multiplexed lookups: forward and the two backwards. The layout of features, chunks and tables comes
// as a tuple; arrays are checked against it before a loop runs. `Hits` lists the hits of a
// batch once, sorted by row, for the backwards.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "bind/arguments.hpp"
#include "bind/register.hpp"
#include "bind/released.hpp"
#include "table/multiplex.hpp"

namespace hotloop::bind {

namespace {

using namespace hotloop::table;

constexpr const char* kOp = "multiplexed_embedding_lookup";

// layout: (batch, buckets, tables, features, combiner, padding_id or None, seed); features: a list of (values,
// offsets or None, count, bag, chunks).
MultiplexLayout layout_of(Arguments& a, const py::tuple& layout) {
  MultiplexLayout l{};
  l.batch = layout[0].cast<std::int64_t>();
  l.buckets = layout[1].cast<std::int64_t>();
  l.tables = layout[2].cast<std::int64_t>();
  for (const py::handle& item : layout[3].cast<py::list>()) {
    const auto f = item.cast<py::tuple>();
    MultiplexFeature feature{};
    feature.count = f[2].cast<std::int64_t>();
    feature.bag = f[3].cast<std::int64_t>();
    feature.chunks = f[4].cast<std::int64_t>();
    feature.first_column = l.columns;
    feature.values = a.array<const std::int64_t>(py::object(f[0]), "values", {feature.count});
    feature.offsets = a.array<const std::int64_t>(py::object(f[1]), "offsets", {l.batch + 1});
    if (feature.offsets == nullptr) {
      if (feature.bag < 0 || feature.bag * l.batch != feature.count) a.fail("values", "wrong number of values");
    } else {
      std::int64_t last = 0;
      for (std::int64_t b = 0; b <= l.batch; ++b) {
        const std::int64_t offset = feature.offsets[b];
        if (offset < last || (b == 0 && offset != 0) || offset > feature.count ||
            (b == l.batch && offset != feature.count)) {
          a.fail("offsets", "expected offsets that rise from 0 to the number of values, " +
                                std::to_string(feature.count) + ", got " + std::to_string(offset) + " at [" +
                                std::to_string(b) + "]. Pass one more than there are samples");
        }
        last = offset;
      }
    }
    l.columns += feature.chunks;
    l.features.push_back(feature);
  }
  const auto combiner = layout[4].cast<std::string>();
  l.combiner = combiner == "sum" ? Combiner::kSum : combiner == "mean" ? Combiner::kMean : Combiner::kSqrtn;
  l.has_padding = !layout[5].is_none();
  l.padding_id = l.has_padding ? layout[5].cast<std::int64_t>() : 0;
  l.seed = layout[6].cast<std::uint64_t>();
  return l;
}

MultiplexTables tables_of(Arguments& a, const py::list& arrays, std::int64_t rows, bool writable) {
  MultiplexTables t{};
  for (const py::handle& item : arrays) {
    const View& view = a.tile(py::reinterpret_borrow<py::object>(item), "tables", writable);
    if (t.data.empty()) {
      t.dim = view.shape[1];
      t.dtype = view.dtype;
    }
    if (view.shape[0] != rows || view.shape[1] != t.dim || view.dtype != t.dtype) a.fail("tables", "differ");
    t.data.push_back(view.data);
    t.strides.push_back(view.stride[0]);
  }
  return t;
}

const void* gradient_of(Arguments& a, const py::object& grad, Dtype dtype, std::int64_t batch, std::int64_t width) {
  return a.dense(grad, "grad", dtype, {batch, width}, false).data;
}

std::size_t arrays_of(const py::tuple& layout) { return 2 * layout[3].cast<py::list>().size(); }

void run_lookup(const py::tuple& layout, const py::list& tables, const py::object& out) {
  Arguments a(kOp, arrays_of(layout) + tables.size() + 1);
  const MultiplexLayout l = layout_of(a, layout);
  const MultiplexTables t = tables_of(a, tables, l.buckets, false);
  if (l.buckets < 1 || t.data.size() != static_cast<std::size_t>(l.tables)) a.fail("tables", "wrong number of tables");
  void* o = a.dense(out, "out", t.dtype, {l.batch, l.columns * t.dim}, true).data;
  const Released released;
  multiplexed_lookup(l, t, o);
}

// The hits of a batch and what is needed to check the arrays that come with them.
struct Hits {
  std::int64_t batch, buckets, tables, columns;
  std::unique_ptr<MultiplexHits> sorted;
};

std::unique_ptr<Hits> make_hits(const py::tuple& layout) {
  Arguments a(kOp, arrays_of(layout));
  const MultiplexLayout l = layout_of(a, layout);
  if (l.buckets < 1 || l.tables < 1 || l.buckets > INT64_MAX / 2 / l.tables) a.fail("tables", "too many rows");
  if (l.columns > 0 && l.batch > (std::int64_t{1} << 32) / l.columns) a.fail("values", "expected at most 2^32 chunks");
  auto hits = std::make_unique<Hits>(Hits{l.batch, l.buckets, l.tables, l.columns, nullptr});
  const Released released;
  hits->sorted = std::make_unique<MultiplexHits>(l);
  return hits;
}

void run_dense(const Hits& hits, const py::list& gradients, const py::object& grad) {
  Arguments a(kOp, gradients.size() + 1);
  const MultiplexTables t = tables_of(a, gradients, hits.buckets, true);
  if (t.data.size() != static_cast<std::size_t>(hits.tables)) a.fail("tables", "wrong number of gradients");
  const void* g = gradient_of(a, grad, t.dtype, hits.batch, hits.columns * t.dim);
  const Released released;
  hits.sorted->dense(t, g);
}

std::int64_t run_rows(const Hits& hits, std::int64_t table) {
  const Released released;
  return hits.sorted->rows(table);
}

void run_sparse(const Hits& hits, std::int64_t table, const py::object& indices, const py::object& values,
                const py::object& grad) {
  Arguments a(kOp, 3);
  const std::int64_t rows = run_rows(hits, table);
  auto* i = a.array<std::int64_t>(indices, "indices", {1, rows});
  py::list one;
  one.append(values);
  const MultiplexTables t = tables_of(a, one, rows, true);
  const void* g = gradient_of(a, grad, t.dtype, hits.batch, hits.columns * t.dim);
  const Released released;
  hits.sorted->sparse(table, t, g, i);
}

}  // namespace

HOTLOOP_BIND(table) {
  def(m, "multiplexed", &run_lookup, "layout tables out");
  py::class_<Hits> c(m, "MultiplexHits");
  c.def(py::init(&make_hits), py::arg("layout"));
  def(c, "dense", &run_dense, "gradients grad");
  def(c, "rows", &run_rows, "table");
  def(c, "sparse", &run_sparse, "table indices values grad");
}

}  // namespace hotloop::bind
