// SPDX-License-Identifier: Apache-2.0
#include "core/view.hpp"

#include <stdexcept>
#include <string>

namespace hotloop {

namespace {
std::string where(const char* op, const char* argument) { return std::string("[") + op + "] " + argument + ": "; }
}  // namespace

std::string View::shape_text() const {
  std::string text = "(";
  for (int i = 0; i < rank; ++i) {
    text += std::to_string(shape[static_cast<std::size_t>(i)]);
    text += rank == 1 || i + 1 < rank ? "," : "";
    text += i + 1 < rank ? " " : "";
  }
  return text + ")";
}

void throw_float_expected(Dtype dtype, const char* op, const char* argument) {
  throw std::invalid_argument(where(op, argument) + "expected float32, float64, float16 or bfloat16, got " +
                              dtype_name(dtype) + ". Convert it first.");
}

void throw_shape_mismatch(const View& expected, const View& got, const char* op, const char* argument) {
  throw std::invalid_argument(where(op, argument) + "expected shape " + expected.shape_text() + ", got " +
                              got.shape_text() + ".");
}

void check_view(const View& view, const char* op, const char* argument, int rank, bool writable) {
  if (view.rank != rank) {
    throw std::invalid_argument(where(op, argument) + "expected " + std::to_string(rank) + " dimension(s), got shape " +
                                view.shape_text() + ".");
  }
  if (writable && view.read_only) {
    throw std::invalid_argument(where(op, argument) + "expected a writable array, got a read-only one. Pass a copy.");
  }
}

void check_matrix(const View& view, const char* op, const char* argument, Dtype dtype, bool writable) {
  check_view(view, op, argument, 2, writable);
  if (view.dtype != dtype) {
    throw std::invalid_argument(where(op, argument) + "expected " + dtype_name(dtype) + ", got " +
                                dtype_name(view.dtype) + ".");
  }
  if (view.shape[1] > 1 && view.stride[1] != 1) {
    throw std::invalid_argument(where(op, argument) + "expected contiguous rows, got stride " +
                                std::to_string(view.stride[1]) + " inside a row. Pass a contiguous copy.");
  }
}

}  // namespace hotloop
