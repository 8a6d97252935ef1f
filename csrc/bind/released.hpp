// SPDX-License-Identifier: Apache-2.0
// The GIL released around work on a structure that has locks.
#pragma once

#include <pybind11/pybind11.h>

#include "core/fork.hpp"

namespace hotloop::bind {

// A fork waits for the work and then holds the GIL, so the work is declared over before the GIL is asked for again:
// members are destroyed in reverse order.
class Released {
 private:
  pybind11::gil_scoped_release release_;
  Unforkable unforkable_;
};

}  // namespace hotloop::bind
