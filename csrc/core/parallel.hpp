// SPDX-License-Identifier: Apache-2.0
// One parallel-for. The thread count is OpenMP's, which torch.set_num_threads and OMP_NUM_THREADS set,
// since the process holds one OpenMP runtime. It is 1 after a fork that left threads behind.
#pragma once

#include <omp.h>

#include <cstdint>
#include <exception>
#include <utility>

#include "core/fork.hpp"

namespace hotloop {

// Static, as all that a *.simd.cpp shares (see simd_begin.hpp).
static inline int max_threads() { return omp_in_parallel() || lost_threads() ? 1 : omp_get_max_threads(); }

// Calls body(begin, end) on disjoint ranges that cover [0, n). Ranges are contiguous and as equal as
// can be, so a fixed n and thread count give a fixed split. `grain`: fewest items worth a thread.
template <class Body>
static void parallel_for(std::int64_t n, std::int64_t grain, Body&& body) {
  if (n <= 0) return;
  const std::int64_t wanted = (n + grain - 1) / grain;
  const int threads = static_cast<int>(wanted < max_threads() ? wanted : max_threads());
  if (threads <= 1) {
    body(std::int64_t{0}, n);
    return;
  }
  std::exception_ptr failure;
#pragma omp parallel num_threads(threads)
  {
    const std::int64_t team = omp_get_num_threads();
    const std::int64_t me = omp_get_thread_num();
    const std::int64_t begin = n * me / team;
    const std::int64_t end = n * (me + 1) / team;
    try {
      if (begin < end) body(begin, end);
    } catch (...) {
#pragma omp critical(hotloop_parallel_for)
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace hotloop
