// SPDX-License-Identifier: Apache-2.0
// From a dispatch to what the products of experts walk over: the rows of every expert, and spans of experts whose rows
// fit a workspace.
#pragma once

#include <cstdint>
#include <vector>

#include "moe/products.hpp"

namespace hotloop::moe {

struct Order {
  std::int64_t experts = 0, rows = 0, slots = 0;
  const std::int64_t* expert_offsets = nullptr;  // (experts + 1,)
  const std::int64_t* expert_counts = nullptr;   // nullptr: all rows between offsets are held
  const std::int64_t* slot_of_row = nullptr;     // nullptr: rows have no slots
  const std::int64_t* row_of_slot = nullptr;
};

// Groups [first_group, last_group), whose rows lie within [first_row, last_row).
struct Span {
  std::int64_t first_group, last_group, first_row, last_row;
};

// One group per expert. Returns the number of rows held, or -1 where offsets fall, counts do not fit between them, or
// slots and rows are not each other's inverse: nothing may then be read through them.
std::int64_t make_groups(const Order& order, Group* groups);

// Spans of at most `most` rows, but of one expert at least; none crosses row `border`, but for the span of an expert
// whose own rows do.
std::vector<Span> make_spans(const Group* groups, std::int64_t count, std::int64_t most, std::int64_t border);

}  // namespace hotloop::moe
