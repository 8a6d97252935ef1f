// SPDX-License-Identifier: Apache-2.0
#include "bind/register.hpp"

#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace hotloop::bind {

namespace {

// By name of the room. A function's static, because files register before main and in any order.
std::map<std::string, std::vector<void (*)(pybind11::module_&)>>& rooms() {
  static std::map<std::string, std::vector<void (*)(pybind11::module_&)>> found;
  return found;
}

}  // namespace

Registration::Registration(const char* room, void (*fill)(pybind11::module_& m)) { rooms()[room].push_back(fill); }

void add_rooms(pybind11::module_& module) {
  for (const auto& [name, files] : rooms()) {
    pybind11::module_ room = module.def_submodule(name.c_str());
    for (const auto fill : files) fill(room);
  }
}

std::vector<std::string> argument_names(const char* function, const std::string& names, std::size_t count) {
  std::istringstream text(names);
  std::vector<std::string> words;
  for (std::string word; text >> word;) words.push_back(word);
  if (words.size() != count) {
    throw std::logic_error(std::string(function) + ": takes " + std::to_string(count) + " arguments, named: " + names);
  }
  return words;
}

}  // namespace hotloop::bind
