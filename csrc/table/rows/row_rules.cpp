// SPDX-License-Identifier: Apache-2.0
#include "table/rows/row_rules.hpp"

#include <stdexcept>
#include <string>

namespace hotloop::table {

UpdateRow update_row(const RuleSpec& spec, Dtype values) {
  if (values != Dtype::kFloat32 && values != Dtype::kFloat16 && values != Dtype::kBFloat16) {
    throw std::invalid_argument(std::string("[table] values: expected float32, float16 or bfloat16, got ") +
                                dtype_name(values) + ".");
  }
  HOTLOOP_SIMD_DISPATCH(table_update_row(spec, values))
}

}  // namespace hotloop::table
