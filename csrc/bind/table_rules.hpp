// A row optimizer as Python states it, for every binding that takes one.
#pragma once

#include <pybind11/pybind11.h>

#include "table/heads.hpp"

namespace hotloop::bind {

// `rule`: the dictionary that the dataclasses of hotloop.table give (`_rule()`): "rule" is a name, the rest are the
// fields of RuleParameters by their names; what is left out is 0 or false.
table::RuleSpec rule_spec(const pybind11::dict& rule);

}  // namespace hotloop::bind
