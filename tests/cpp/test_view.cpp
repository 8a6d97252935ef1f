// SPDX-License-Identifier: Apache-2.0
#include "core/view.hpp"

#include <string>

#include "check.hpp"

using namespace hotloop;

namespace {

using test::error_of;

View matrix(float* data) { return test::matrix(data, 3, 4, 6); }

}  // namespace

TEST(size_and_text) {
  View v;
  CHECK(v.size() == 1 && v.shape_text() == "()");
  v.rank = 1;
  v.shape[0] = 7;
  CHECK(v.size() == 7 && v.shape_text() == "(7,)");
  v.rank = 3;
  v.shape = {2, 0, 5, 0};
  CHECK(v.size() == 0 && v.shape_text() == "(2, 0, 5)");
}

TEST(a_matrix_knows_its_row_stride) {
  float data[18];
  for (int i = 0; i < 18; ++i) data[i] = static_cast<float>(i);
  const auto m = as_matrix<const float>(matrix(data), "op", "x", false);
  CHECK(m.rows == 3 && m.cols == 4 && m.row_stride == 6);
  CHECK(m.row(2)[3] == 15.0f);
}

TEST(what_would_corrupt_memory_is_refused) {
  float data[18] = {};
  View v = matrix(data);
  CHECK(error_of([&] { check_view(v, "op", "x", 1, false); }) == "[op] x: expected 1 dimension(s), got shape (3, 4).");
  CHECK(error_of([&] { as_matrix<double>(v, "op", "x", false); }) == "[op] x: expected float64, got float32.");
  v.read_only = true;
  CHECK(error_of([&] { as_matrix<const float>(v, "op", "x", false); }).empty());
  CHECK(error_of([&] { as_matrix<float>(v, "op", "x", true); }) ==
        "[op] x: expected a writable array, got a read-only one. Pass a copy.");
  v.stride[1] = 2;
  CHECK(error_of([&] { as_matrix<const float>(v, "op", "x", false); }) ==
        "[op] x: expected contiguous rows, got stride 2 inside a row. Pass a contiguous copy.");
  v.shape[1] = 1;  // a single column has no stride to speak of
  CHECK(error_of([&] { as_matrix<const float>(v, "op", "x", false); }).empty());
  CHECK(error_of([&] { throw_shape_mismatch(matrix(data), v, "op", "y"); }) ==
        "[op] y: expected shape (3, 4), got (3, 1).");
}

TEST_MAIN
