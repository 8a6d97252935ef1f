// SPDX-License-Identifier: Apache-2.0
// Adds rows of gradients that belong together. A thread owns every row of the output whose number is its own modulo
// the threads, and goes through the whole batch: no two threads write to one row, and the order is the batch's.
#include "table/rows/merge.hpp"

#include <atomic>
#include <cstdint>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "core/simd_begin.hpp"

namespace {

using namespace hotloop::table;

constexpr std::int64_t kAhead = 8;       // rows that are asked of memory ahead of the one in work
constexpr std::int64_t kGrain = 131072;  // elements worth a thread: about 50 us of memory traffic

template <class Storage>
void merge(const MergeCall& call) {
  const Storage* const grads = static_cast<const Storage*>(call.grads);
  const std::int64_t wanted = call.n * call.dim / kGrain;
  const std::int64_t owners = wanted < 1 ? 1 : wanted < max_threads() ? wanted : max_threads();
  parallel_for(owners, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t owner = begin; owner < end; ++owner) {
      std::int64_t seen = owner;  // the next number of this owner to appear for the first time
      for (std::int64_t i = 0; i < call.n; ++i) {
        if (i + kAhead < call.n) {
          const char* next = reinterpret_cast<const char*>(call.out + call.inverse[i + kAhead] * call.dim);
          for (std::int64_t at = 0; at < call.dim * 4 && at < 512; at += 64) __builtin_prefetch(next + at, 1);
        }
        const std::int64_t number = call.inverse[i];
        if (owners > 1 && number % owners != owner) continue;
        const Storage* const g = grads + i * call.grad_stride;
        float* const out = call.out + number * call.dim;
        if (number == seen) {  // numbers first appear in ascending order
          seen += owners;
#pragma GCC ivdep
          for (std::int64_t j = 0; j < call.dim; ++j) out[j] = to_float(g[j]);
        } else {
#pragma GCC ivdep
          for (std::int64_t j = 0; j < call.dim; ++j) out[j] += to_float(g[j]);
        }
      }
    }
  });
}

}  // namespace

void merge_rows(const MergeCall& call) {
  note_simd_level();
  with_row_type(call.dtype, [&](auto storage) { merge<decltype(storage)>(call); });
}

#include "core/simd_end.hpp"
