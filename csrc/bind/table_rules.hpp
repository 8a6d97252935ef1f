// SPDX-License-Identifier: Apache-2.0
// Rules and settings of tables as Python states them, for every binding that takes them.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "core/rules.hpp"
#include "table/store/calls.hpp"
#include "table/store/layout.hpp"

namespace hotloop::bind {

// `rule`: the dictionary that the dataclasses of hotloop.table give (`_rule()`): "rule" is a name, the rest are the
// fields of RuleParameters by their names; what is left out is 0 or false.
RuleSpec rule_spec(const pybind11::dict& rule);

// The dictionary that Table.__init__ makes.
table::Settings settings_of(const pybind11::dict& settings);

// "sum", "mean" or "max".
table::Pool pool_named(const std::string& name);

}  // namespace hotloop::bind
