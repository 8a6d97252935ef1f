// SPDX-License-Identifier: Apache-2.0
// Looking up many features in a few shared tables: hashing, gathering, pooling and concatenation in one pass.
//
// Forward walks blocks of samples; inside a block, column by column (one column per chunk of a feature), it hashes the
// block's keys into a buffer of row addresses, asks for the rows, and copies those it asked for one column before. No
// index is ever stored. Backward lists every hit as (row, where its gradient stands), sorts that by row, stably and by
// radix, and sums each row's gradients in float64, in the order of the samples: the result does not depend on the
// number of threads. (Sums in float32 take the same time, within noise: the gradients' way from memory decides.)
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.hpp"

namespace hotloop::table {

enum class Combiner { kSum, kMean, kSqrtn };

struct MultiplexFeature {
  const std::int64_t* values;  // (count,)
  std::int64_t count;
  const std::int64_t* offsets;  // (batch + 1,), or null: `bag` values per sample
  std::int64_t bag;
  std::int64_t chunks;
  std::int64_t first_column;  // chunks of the features before

  std::int64_t begin(std::int64_t sample) const { return offsets == nullptr ? sample * bag : offsets[sample]; }
};

struct MultiplexLayout {
  std::int64_t batch, buckets, tables, columns;
  std::vector<MultiplexFeature> features;
  Combiner combiner;
  bool has_padding;
  std::int64_t padding_id;
  std::uint64_t seed;
};

struct MultiplexTables {
  std::int64_t dim;
  Dtype dtype;
  std::vector<void*> data;            // one per table, rows of `dim`
  std::vector<std::int64_t> strides;  // of a row, in elements
};

// out: (batch, columns * dim), contiguous.
void multiplexed_lookup(const MultiplexLayout& layout, const MultiplexTables& tables, void* out);

// Every hit of a batch, sorted by row.
class MultiplexHits {
 public:
  explicit MultiplexHits(const MultiplexLayout& layout);

  // Writes the gradient of every row that was hit; the others are left alone. grad: (batch, columns * dim).
  void dense(const MultiplexTables& gradients, const void* grad) const;
  // Rows of a table that were hit.
  std::int64_t rows(std::int64_t table) const;
  // indices (rows,) in ascending order, values (rows, dim).
  void sparse(std::int64_t table, const MultiplexTables& values, const void* grad, std::int64_t* indices) const;

 private:
  struct Hit {
    std::uint64_t row;     // table * buckets + bucket
    std::uint32_t source;  // sample * columns + column
    std::uint32_t bag;     // values pooled with this one
  };
  void sort(std::uint64_t most);
  std::int64_t first_of(std::int64_t table) const;
  template <class Storage, class Target>
  void sum(std::int64_t begin, std::int64_t end, std::int64_t dim, const Storage* grad, const Target& target) const;

  std::int64_t buckets_, tables_;
  Combiner combiner_;
  std::vector<Hit> hits_;
};

}  // namespace hotloop::table
