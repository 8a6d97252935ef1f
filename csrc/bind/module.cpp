// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "bind/array.hpp"
#include "bind/register.hpp"
#include "core/fork.hpp"
#include "core/memory.hpp"
#include "core/parallel.hpp"
#include "core/philox.hpp"
#include "core/simd.hpp"
#include "core/vmath_kernels.hpp"

namespace hotloop::bind {

namespace {

std::int64_t dense_size(const View& view, const char* op, const char* argument, bool writable) {
  check_view(view, op, argument, 1, writable);
  if (view.shape[0] > 1 && view.stride[0] != 1) {
    throw std::invalid_argument(std::string("[") + op + "] " + argument + ": expected a contiguous array.");
  }
  return view.shape[0];
}

void map(const std::string& name, const py::object& x, const py::object& out) {
  constexpr const char* kOp = "core.map";
  const Array in(x, kOp, "x"), y(out, kOp, "out");
  const std::int64_t n = dense_size(in.view, kOp, "x", false);
  if (dense_size(y.view, kOp, "out", true) != n || in.view.dtype != y.view.dtype) {
    throw std::invalid_argument("[core.map] out: expected the size and dtype of x.");
  }
  int function = 0;
  for (const char* known : kMathFunctionNames) {
    if (name == known) {
      const auto f = static_cast<MathFunction>(function);
      py::gil_scoped_release release;
      if (in.view.dtype == Dtype::kFloat64) {
        map_function(f, static_cast<const double*>(in.view.data), static_cast<double*>(y.view.data), n);
      } else if (in.view.dtype == Dtype::kFloat32) {
        map_function(f, static_cast<const float*>(in.view.data), static_cast<float*>(y.view.data), n);
      } else {
        throw std::invalid_argument(std::string("[core.map] x: expected float32 or float64, got ") +
                                    dtype_name(in.view.dtype) + ".");
      }
      return;
    }
    ++function;
  }
  throw std::invalid_argument("[core.map] name: got " + name + ", which is none of the functions.");
}

// out (n, 4) uint32 viewed as int32: the four words of items first_item, first_item + 1, ...
void philox_fill(std::uint64_t seed, std::uint64_t offset, std::uint64_t first_item, const py::object& out) {
  const Array words(out, "core.philox", "out");
  check_view(words.view, "core.philox", "out", 2, true);
  if (words.view.dtype != Dtype::kInt32 || words.view.shape[1] != 4 || words.view.stride[1] != 1 ||
      words.view.stride[0] != 4) {
    throw std::invalid_argument("[core.philox] out: expected a contiguous int32 array of shape (n, 4).");
  }
  auto* data = static_cast<std::uint32_t*>(words.view.data);
  const std::int64_t n = words.view.shape[0];
  py::gil_scoped_release release;
  parallel_for(n, 4096, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const Philox4x32 r = philox(seed, offset, first_item + static_cast<std::uint64_t>(i));
      std::memcpy(data + 4 * i, r.word, sizeof(r.word));
    }
  });
}

}  // namespace

}  // namespace hotloop::bind

PYBIND11_MODULE(_core, m) {
  using namespace hotloop::bind;
  using namespace hotloop;
  m.doc() = "hotloop's CPU loops. Use the functions of the hotloop package, which check their arguments.";
  add_rooms(m);
  m.def("map", &map, py::arg("name"), py::arg("x"), py::arg("out"));
  m.def("map_names",
        [] { return std::vector<std::string>(std::begin(kMathFunctionNames), std::end(kMathFunctionNames)); });
  m.def("philox_fill", &philox_fill, py::arg("seed"), py::arg("offset"), py::arg("first_item"), py::arg("out"));
  m.def("philox4x32_10", [](std::vector<std::uint32_t> counter, std::vector<std::uint32_t> key) {
    const Philox4x32 r =
        philox4x32_10({{counter.at(0), counter.at(1), counter.at(2), counter.at(3)}}, key.at(0), key.at(1));
    return std::vector<std::uint32_t>(r.word, r.word + 4);
  });
  m.def("simd_level", [] { return std::string(simd_level_name(simd_level())); });
  m.def("force_simd_level", &force_simd_level, py::arg("level"));
  m.def("last_simd_level", [] {
    const int level = last_simd_level.load();
    return std::string(level < 0 ? "none" : simd_level_name(static_cast<SimdLevel>(level)));
  });
  m.def("simd_levels", [] {
    py::dict levels;
    for (SimdLevel level : {SimdLevel::kBaseline, SimdLevel::kAvx2, SimdLevel::kAvx512}) {
      if (simd_level_compiled(level)) levels[simd_level_name(level)] = simd_level_runnable(level);
    }
    return levels;
  });
  m.def("max_threads", &max_threads);
  m.def("lost_threads", &lost_threads);
  m.def(
      "advise_huge_pages",
      [](std::uintptr_t address, std::size_t bytes) { advise_huge_pages(reinterpret_cast<void*>(address), bytes); },
      py::arg("address"), py::arg("bytes"));
  m.def("describe", [](const py::object& array) {  // what the views see; for tests and bug reports
    const Array a(array, "describe", "array");
    py::list shape, stride;
    for (int i = 0; i < a.view.rank; ++i) {
      shape.append(a.view.shape[static_cast<std::size_t>(i)]);
      stride.append(a.view.stride[static_cast<std::size_t>(i)]);
    }
    py::dict d;
    d["dtype"] = dtype_name(a.view.dtype);
    d["shape"] = py::tuple(shape);
    d["stride"] = py::tuple(stride);
    d["read_only"] = a.view.read_only;
    return d;
  });
}
