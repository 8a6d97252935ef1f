// SPDX-License-Identifier: Apache-2.0
// Lookups that end in sums: bags of keys to rows of the output, and gradients of bags back to rows of the table.
//
// The table's rows are read where they lie; what is between (n, dim) is never in memory. Sums are float32, in the
// order of the batch.
#pragma once

#include <cstdint>

#include "core/simd.hpp"
#include "table/rows/row_rules.hpp"
#include "table/store/table.hpp"

namespace hotloop::table {

void pool_bags(const Table& table, const Bags& bags, const Pooled& pooled);

// The same for keys that get rows where they have none: an `upsert` without values of the keys of the bags, which
// writes call.rows and call.found, and pools in one pass over the table what was there before.
void pool_or_insert(Table& table, const Bags& bags, const Upsert& call, const Pooled& pooled);

// The rows of keys, as float32 (int8 codes times `scale`) or in the type of the table; zeros where a key has no row.
// `find` changes nothing; `find_or_insert` is an `upsert` without values, which writes call.found. It gives out what
// is there after the batch.
struct Found {
  Values values{};
  Dtype dtype = Dtype::kFloat32;
  float scale = 1;
};
void find(const Table& table, Keys keys, const Found& out, std::uint8_t* found);
void find_or_insert(Table& table, const Upsert& call, const Found& out);

// The gradient of pool_bags with respect to the weights: grad_weights[i] = <row of position i, gradient of its bag>.
// kept: (n, dim) of `dtype`, the rows as they were when the bags were pooled; the table's may have moved since.
void weight_gradient(const Bags& bags, const Values& kept, Dtype dtype, std::int64_t dim, const float* grad,
                     std::int64_t grad_stride, float* grad_weights);

// Positions whose row is no longer the key's are looked up again; returns how many were left without one.
std::int64_t update_bags(Table& table, const Bags& bags, const Update& update);

struct WeightedRow {
  const void* row;
  float weight;
};

float largest(const float* x, std::int64_t n);

}  // namespace hotloop::table

HOTLOOP_FOR_EACH_SIMD(
    // out = sum + weight * row, for one row after the other; sum: null for zeros.
    void table_add_rows(Dtype dtype, const table::WeightedRow* rows, std::int64_t count, std::int64_t dim,
                        const float* sum, float* out);
    void table_max_row(Dtype dtype, const void* row, float scale, std::int64_t position, const float* best,
                       const std::int64_t* from, std::int64_t dim, float* out, std::int64_t* out_from);
    float table_dot_row(Dtype dtype, const void* row, const float* grad, std::int64_t dim);
    std::uint32_t table_largest(const float* x, std::int64_t n);)
