// SPDX-License-Identifier: Apache-2.0
// The CPU pointwise loop, compiled once per instruction set and not once per head. Rows are taken in blocks of 256 that
// stay in L1. First, columns of another type or stride and group columns are copied into dense arrays. Then the head's
// block function (core/room_heads.hpp) runs over the block as one SIMD loop on dual numbers. Then losses and
// gradients are multiplied by the weights of the rows and stored in the types and strides that the caller asked for.
// Bytes per row for DPO in float32: 16 read, 8 (gradients) or 12 (and losses) written.
#include "core/pointwise.hpp"

#include <atomic>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/dtype.hpp"
#include "core/parallel.hpp"

#include "core/simd_begin.hpp"

namespace {

using namespace hotloop::pointwise;

// A block of DPO takes about 1 us; below sixteen blocks a second thread costs more than it brings.
constexpr std::int64_t kGrainBlocks = 16;
// Blocks in one call of a head whose columns all lie in place: the constants of a formula are loaded once for them.
constexpr std::int64_t kMostBlocks = 4;
constexpr std::int64_t kL1 = 28 * 1024;

template <class Storage, class R>
void load(const InputColumn& column, std::int64_t first, std::int64_t count, R* out) {
  const Storage* x = static_cast<const Storage*>(column.data) + first * column.stride;
  if (column.stride == 1) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<R>(to_float(x[i]));
  } else {
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<R>(to_float(x[i * column.stride]));
  }
}

template <class R>
void load_any(const InputColumn& column, std::int64_t first, std::int64_t count, R* out) {
  with_float(column.dtype, [&](auto storage) { load<decltype(storage)>(column, first, count, out); });
}

template <class Storage, class R>
void store(const OutputColumn& column, std::int64_t first, std::int64_t count, const R* x) {
  using A = typename Accumulate<Storage>::type;
  Storage* out = static_cast<Storage*>(column.data) + first * column.stride;
  if (column.stride == 1) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) put(out[i], static_cast<A>(x[i]));
  } else {
    for (std::int64_t i = 0; i < count; ++i) put(out[i * column.stride], static_cast<A>(x[i]));
  }
}

template <class R>
void store_any(const OutputColumn& column, std::int64_t first, std::int64_t count, const R* x) {
  with_float(column.dtype, [&](auto storage) { store<decltype(storage)>(column, first, count, x); });
}

// Sum in a fixed order: sixteen interleaved partial sums, so that the additions do not wait for each other.
template <class R>
double sum_in_lanes(const R* x, std::int64_t count) {
  double lane[16] = {};
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (std::int64_t k = 0; k < 16; ++k) lane[k] += static_cast<double>(x[i + k]);
  }
  double total = 0.0;
  for (; i < count; ++i) total += static_cast<double>(x[i]);
  for (double part : lane) total += part;
  return total;
}

// Repeats the group's value over its rows. Groups without rows are stepped over.
template <class R>
void load_groups(const InputColumn& column, const Groups& groups, std::int64_t first, std::int64_t count, R* out) {
  std::int64_t group = group_of(groups, first);
  for (std::int64_t i = 0; i < count; ++group) {
    const std::int64_t end =
        (groups.offsets == nullptr ? (group + 1) * groups.rows : offset_at(groups, group + 1)) - first;
    if (end <= i) continue;
    R value;
    load_any(column, group, 1, &value);
    for (const std::int64_t stop = end < count ? end : count; i < stop; ++i) out[i] = value;
  }
}

// A row of weight 0 is left out: its loss and gradients are 0 even where they were infinite or NaN.
template <class R>
void multiply(const R* weight, R* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] = weight[i] == R(0) ? R(0) : weight[i] * x[i];
}

constexpr OutTotal kNothing{0.0, std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()};

void add(OutTotal& total, const OutTotal& x) {
  total.sum += x.sum;
  total.least = x.least < total.least || x.least != x.least ? x.least : total.least;
  total.largest = x.largest > total.largest || x.largest != x.largest ? x.largest : total.largest;
}

template <class R>
OutTotal reduce(const R* x, const R* weight, std::int64_t count) {
  OutTotal total = kNothing;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto v = static_cast<double>(x[i]);
    if (weight == nullptr || weight[i] != R(0)) add(total, {v, v, v});
  }
  return total;
}

template <class R>
void run(const HeadInfo& info, Block<R> block, const Call& call) {
  const auto columns = [](int k) { return static_cast<std::size_t>(k); };
  const int plain = info.grads + info.rows, inputs = plain + info.groups;
  const bool weighted = call.weight.data != nullptr;
  const bool extra = call.outs != nullptr || call.counted != nullptr;
  const auto kept = static_cast<std::size_t>(info.outs);
  R params[kMaxParams];
  for (int k = 0; k < kMaxParams; ++k) params[k] = static_cast<R>(call.params[columns(k)]);
  const std::int64_t blocks = (call.n + kBlock - 1) / kBlock;
  // By block, added up afterwards: a number per 256 rows, and what extra values take only where they are wanted.
  std::vector<double> totals(call.total != nullptr ? static_cast<std::size_t>(blocks) : 0);
  std::vector<double> counted(extra ? static_cast<std::size_t>(blocks) : 0);
  std::vector<OutTotal> extras(extra ? static_cast<std::size_t>(blocks) * kept : 0);
  parallel_for(blocks, kGrainBlocks, [&](std::int64_t begin, std::int64_t end) {
    alignas(64) R in_buffer[kMaxInputs][kBlock];
    alignas(64) R grad_buffer[kMaxInputs][kBlock];
    alignas(64) R out[kMaxOuts][kBlock];
    alignas(64) R loss[kMostBlocks * kBlock];
    alignas(64) R weight[kBlock];
    const R* in[kMaxInputs];
    R* grad[kMaxInputs];
    R* outs[kMaxOuts];
    // Columns whose whole blocks are read and written where they lie; nullptr: through a buffer.
    const R* in_place[kMaxInputs] = {};
    R* grad_in_place[kMaxInputs] = {};
    for (int k = 0; k < info.outs; ++k) outs[k] = out[k];
    for (int k = 0; k < info.grads; ++k) {
      const OutputColumn& column = call.grads[columns(k)];
      if (column.stride == 1 && column.dtype == DtypeOf<R>::value) grad_in_place[k] = static_cast<R*>(column.data);
    }
    for (int k = 0; k < inputs; ++k) {
      const InputColumn& column = call.inputs[columns(k)];
      if (k < plain && column.stride == 1 && column.dtype == DtypeOf<R>::value) {
        in_place[k] = static_cast<const R*>(column.data);
      }
      for (R& x : in_buffer[k]) x = R(1);  // the unused tail of the last block
      if (k < plain && column.stride == 0) load_any(column, 0, kBlock, in_buffer[k]);
    }
    bool all_in_place = !weighted && !extra;
    for (int k = 0; k < inputs; ++k) all_in_place = all_in_place && in_place[k] != nullptr;
    for (int k = 0; k < info.grads; ++k) all_in_place = all_in_place && grad_in_place[k] != nullptr;
    const std::int64_t fit = kL1 / ((inputs + info.grads + 1) * kBlock * std::int64_t{sizeof(R)});
    const std::int64_t most = !all_in_place || fit < 1 ? 1 : fit < kMostBlocks ? fit : kMostBlocks;
    for (std::int64_t b = begin, blocks_here; b < end; b += blocks_here) {
      const std::int64_t first = b * kBlock, left = call.n - first;
      const std::int64_t in_range = end - b < most ? end - b : most;
      blocks_here = left < in_range * kBlock ? 1 : in_range;
      const std::int64_t count = left < blocks_here * kBlock ? left : blocks_here * kBlock;
      const bool whole = count == blocks_here * kBlock;
      for (int k = 0; k < inputs; ++k) {
        if (whole && in_place[k] != nullptr) {
          in[k] = in_place[k] + first;
          continue;
        }
        const InputColumn& column = call.inputs[columns(k)];
        in[k] = in_buffer[k];
        if (k >= plain) {
          load_groups(column, call.groups, first, count, in_buffer[k]);
        } else if (column.stride != 0) {
          load_any(column, first, count, in_buffer[k]);
        }
      }
      for (int k = 0; k < info.grads; ++k) {
        grad[k] = whole && grad_in_place[k] != nullptr ? grad_in_place[k] + first : grad_buffer[k];
      }
      block(in, params, blocks_here, static_cast<R>(call.grad_scale), loss, grad, outs);
      if (weighted) {
        load_any(call.weight, first, count, weight);
        multiply(weight, loss, count);
        for (int k = 0; k < info.grads; ++k) multiply(weight, grad[k], count);
      }
      for (std::int64_t j = 0; call.total != nullptr && j < blocks_here; ++j) {
        totals[static_cast<std::size_t>(b + j)] = sum_in_lanes(loss + j * kBlock, whole ? kBlock : count);
      }
      if (extra) {
        double& rows = counted[static_cast<std::size_t>(b)];
        if (!weighted) rows = static_cast<double>(count);
        for (std::int64_t i = 0; weighted && i < count; ++i) rows += weight[i] != R(0) ? 1.0 : 0.0;
        OutTotal* const mine = extras.data() + static_cast<std::size_t>(b) * kept;
        for (int k = 0; k < info.outs; ++k) mine[k] = reduce(out[k], weighted ? weight : nullptr, count);
      }
      if (call.loss.data != nullptr) store_any(call.loss, first, count, loss);
      for (int k = 0; k < info.grads; ++k) {
        const OutputColumn& column = call.grads[columns(k)];
        if (column.data != nullptr && grad[k] == grad_buffer[k]) store_any(column, first, count, grad[k]);
      }
    }
  });
  if (call.total != nullptr) {
    double total = 0.0;
    for (double part : totals) total += part;
    *call.total = total;
  }
  if (call.counted != nullptr) {
    double rows = 0.0;
    for (double part : counted) rows += part;
    *call.counted = rows;
  }
  for (int k = 0; call.outs != nullptr && k < info.outs; ++k) {
    call.outs[k] = kNothing;
    for (std::size_t b = 0; b < counted.size(); ++b) add(call.outs[k], extras[b * kept + columns(k)]);
  }
}

}  // namespace

void pointwise_loop(const Entry& head, const Call& call) {
  note_simd_level();
  if (call.double_precision) {
    run<double>(head.info, head.block_double, call);
  } else {
    run<float>(head.info, head.block_float, call);
  }
}

#include "core/simd_end.hpp"
