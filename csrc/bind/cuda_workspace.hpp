// SPDX-License-Identifier: Apache-2.0
// Device memory for the length of a call: of the caller's allocator, in the order of its stream.
#pragma once

#include <cstdint>

#include "bind/arguments.hpp"

namespace hotloop::bind {

// workspace: a function of a number of bytes to a uint8 array of at least as many.
inline void* workspace_of(Arguments& a, const py::function& workspace, std::int64_t bytes) {
  const View& found = a.bytes(workspace(bytes), "workspace");
  if (found.shape[0] < bytes || reinterpret_cast<std::uintptr_t>(found.data) % 256 != 0) {
    a.fail("workspace", "expected " + std::to_string(bytes) + " bytes at a multiple of 256");
  }
  return found.data;
}

}  // namespace hotloop::bind
