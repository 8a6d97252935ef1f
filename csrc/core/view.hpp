// SPDX-License-Identifier: Apache-2.0
// A view: pointer, dtype, extents and strides (in elements) of an array that somebody else owns.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <type_traits>

#include "core/dtype.hpp"

namespace hotloop {

inline constexpr int kMaxRank = 4;

struct View {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int rank = 0;
  bool read_only = false;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> stride{};

  std::int64_t size() const {
    std::int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[static_cast<std::size_t>(i)];
    return n;
  }
  std::string shape_text() const;
};

// A matrix whose rows are contiguous inside and `row_stride` elements apart.
template <class T>
struct Matrix {
  T* data;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t row_stride;
  HOTLOOP_INLINE T* row(std::int64_t i) const { return data + i * row_stride; }
};

// What would corrupt memory; the front door has already told the user everything else. Out of line, so
// that a *.simd.cpp formats no text (see simd_begin.hpp).
void check_view(const View& view, const char* op, const char* argument, int rank, bool writable);
void check_matrix(const View& view, const char* op, const char* argument, Dtype dtype, bool writable);
[[noreturn]] void throw_shape_mismatch(const View& expected, const View& got, const char* op, const char* argument);

template <class T>
static Matrix<T> as_matrix(const View& view, const char* op, const char* argument, bool writable) {
  check_matrix(view, op, argument, DtypeOf<std::remove_const_t<T>>::value, writable);
  return {static_cast<T*>(view.data), view.shape[0], view.shape[1], view.stride[0]};
}

}  // namespace hotloop
