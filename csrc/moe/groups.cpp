// SPDX-License-Identifier: Apache-2.0
#include "moe/groups.hpp"

namespace hotloop::moe {

std::int64_t make_groups(const Order& order, Group* groups) {
  const std::int64_t* const offsets = order.expert_offsets;
  if (offsets[0] < 0 || offsets[order.experts] > order.rows) return -1;
  std::int64_t held = 0, empty_from = order.slot_of_row == nullptr ? order.rows : 0;
  const auto hold_nothing = [&](std::int64_t until) {
    for (; empty_from < until; ++empty_from) {
      if (order.slot_of_row[empty_from] != -1) return false;
    }
    return true;
  };
  for (std::int64_t e = 0; e < order.experts; ++e) {
    const std::int64_t first = offsets[e], room = offsets[e + 1] - first;
    const std::int64_t count = order.expert_counts == nullptr ? room : order.expert_counts[e];
    // Offsets are looked at before they index anything: each is between its neighbours, the last within the rows.
    if (room < 0 || offsets[e + 1] > order.rows || count < 0 || count > room) return -1;
    groups[e] = {e, first, count};
    held += count;
    if (order.slot_of_row == nullptr) continue;
    if (!hold_nothing(first)) return -1;
    for (std::int64_t r = first; r < first + count; ++r) {
      const std::int64_t slot = order.slot_of_row[r];
      if (slot < 0 || slot >= order.slots || order.row_of_slot[slot] != r) return -1;
    }
    empty_from = first + count;
  }
  if (order.slot_of_row == nullptr) return held;
  if (!hold_nothing(order.rows)) return -1;
  // Rows that are held have slots of their own, so that as many slots have a row.
  std::int64_t placed = 0;
  for (std::int64_t s = 0; s < order.slots; ++s) {
    if (order.row_of_slot[s] < -1) return -1;
    placed += order.row_of_slot[s] >= 0 ? 1 : 0;
  }
  return placed == held ? held : -1;
}

std::vector<Span> make_spans(const Group* groups, std::int64_t count, std::int64_t most, std::int64_t border) {
  std::vector<Span> spans;
  Span open{0, 0, 0, 0};
  const auto close = [&](std::int64_t group) {
    open.last_group = group;
    if (open.last_group > open.first_group) spans.push_back(open);
    open = {group, group, 0, 0};
  };
  for (std::int64_t g = 0; g < count; ++g) {
    const Group& group = groups[g];
    const std::int64_t last = group.first + group.count;
    if (group.count == 0) continue;  // goes with the span that is open
    if (open.last_row > 0) {
      const bool full = last - open.first_row > most;
      if (full || (open.last_row <= border && last > border)) close(g);
    }
    if (open.last_row == 0) open.first_row = group.first;
    open.last_row = last;
  }
  close(count);
  return spans;
}

}  // namespace hotloop::moe
