// SPDX-License-Identifier: Apache-2.0
// The loops of multiplexed lookups: forward and the two backwards, dense and sparse; multiplex.hpp says how they work.
//
// Forward: a thread takes blocks of 32 samples; per column it hashes the keys of the block, prefetches the rows, and
// copies those of the column before. Backward: `MultiplexHits` lists every hit as (row, where its gradient stands), a
// stable radix sort groups the hits by row, and each thread sums the gradients of a range of hits.
#include "table/multiplex.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>

#include "core/parallel.hpp"
#include "core/stable_pass.hpp"
#include "table/hash.hpp"

namespace hotloop::table {

namespace {

// Rows in flight. A row of 64 bytes out of 256 MB takes 7.8 ns with 32, 8.2 with 64, 9.0 with 128 (AMD EPYC, one
// thread).
constexpr std::int64_t kBlock = 32;
// Hits asked for before they are summed.
constexpr std::int64_t kAhead = 16;
constexpr std::int64_t kHitsPerThread = std::int64_t{1} << 14;

template <class Storage>
using Real = decltype(to_float(Storage{}));

struct Column {
  const MultiplexFeature* feature;
  std::uint64_t salt;
  std::int64_t table;
};

std::vector<Column> columns_of(const MultiplexLayout& layout) {
  std::vector<Column> columns;
  std::uint64_t number = 0;
  for (const MultiplexFeature& f : layout.features) {
    for (std::int64_t k = 0; k < f.chunks; ++k) {
      const auto column = static_cast<std::int64_t>(columns.size());
      const std::uint64_t salt = hash_salt(number, static_cast<std::uint64_t>(k), layout.seed);
      columns.push_back({&f, salt, column % layout.tables});
    }
    ++number;
  }
  return columns;
}

std::int64_t row_of(std::int64_t value, std::uint64_t salt, std::int64_t buckets) {
  const std::uint64_t h = mix64(static_cast<std::uint64_t>(value) ^ salt);
  return static_cast<std::int64_t>(bucket_of(h, static_cast<std::uint64_t>(buckets)));
}

template <class R>
R bag_scale(Combiner combiner, std::int64_t n) {
  if (combiner == Combiner::kSum || n <= 1) return R{1};
  return combiner == Combiner::kMean ? R{1} / static_cast<R>(n) : R{1} / std::sqrt(static_cast<R>(n));
}

// A fixed size where one is common: a call of memcpy costs more than copying 64 bytes.
template <std::size_t Bytes>
void copy_rows(const char* const* from, std::int64_t n, char* out, std::int64_t out_stride, std::size_t bytes) {
  const std::size_t size = Bytes == 0 ? bytes : Bytes;
  for (std::int64_t i = 0; i < n; ++i, out += out_stride) {
    if (from[i] == nullptr) {
      std::memset(out, 0, size);
    } else {
      std::memcpy(out, from[i], size);
    }
  }
}

using CopyRows = void (*)(const char* const*, std::int64_t, char*, std::int64_t, std::size_t);
CopyRows copy_of(std::size_t bytes) {
  switch (bytes) {
    case 16:
      return &copy_rows<16>;
    case 32:
      return &copy_rows<32>;
    case 64:
      return &copy_rows<64>;
    case 128:
      return &copy_rows<128>;
    default:
      return &copy_rows<0>;
  }
}

void prefetch_row(const char* row, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
}

template <class Storage>
class Lookup {
 public:
  Lookup(const MultiplexLayout& layout, const MultiplexTables& tables, void* out)
      : layout_(layout),
        tables_(tables),
        columns_(columns_of(layout)),
        bytes_(static_cast<std::size_t>(tables.dim) * sizeof(Storage)),
        copy_(copy_of(bytes_)),
        stride_(static_cast<std::int64_t>(bytes_) * layout.columns),
        out_(static_cast<char*>(out)) {}

  void run(std::int64_t begin, std::int64_t end) const {
    std::array<std::array<const char*, kBlock>, 2> rows;
    const auto sums = std::make_unique<Real<Storage>[]>(static_cast<std::size_t>(tables_.dim));
    for (std::int64_t first = begin; first < end; first += kBlock) {
      const std::int64_t n = std::min(kBlock, end - first);
      char* out = out_ + first * stride_;
      std::int64_t waiting = -1;  // the column whose rows are on their way
      for (std::int64_t c = 0; c < layout_.columns; ++c) {
        const Column& column = columns_[static_cast<std::size_t>(c)];
        if (column.feature->offsets != nullptr || column.feature->bag != 1) {
          pool(column, first, first + n, sums.get(), out + c * static_cast<std::int64_t>(bytes_));
          continue;
        }
        ask(column, column.feature->values + first, n, rows[static_cast<std::size_t>(c & 1)].data());
        if (waiting >= 0) finish(waiting, n, rows, out);
        waiting = c;
        // Columns of pooled features may stand between: the buffer of the next single one must be the other.
        if (c + 1 < layout_.columns) {
          const MultiplexFeature& next = *columns_[static_cast<std::size_t>(c + 1)].feature;
          if (next.offsets != nullptr || next.bag != 1) {
            finish(waiting, n, rows, out);
            waiting = -1;
          }
        }
      }
      if (waiting >= 0) finish(waiting, n, rows, out);
    }
  }

 private:
  void finish(std::int64_t column, std::int64_t n, const std::array<std::array<const char*, kBlock>, 2>& rows,
              char* out) const {
    const auto bytes = static_cast<std::int64_t>(bytes_);
    copy_(rows[static_cast<std::size_t>(column & 1)].data(), n, out + column * bytes, stride_, bytes_);
  }

  void ask(const Column& column, const std::int64_t* values, std::int64_t n, const char** rows) const {
    const auto table = static_cast<std::size_t>(column.table);
    const char* data = static_cast<const char*>(tables_.data[table]);
    const std::int64_t stride = tables_.strides[table] * static_cast<std::int64_t>(sizeof(Storage));
    for (std::int64_t i = 0; i < n; ++i) {
      rows[i] = data + row_of(values[i], column.salt, layout_.buckets) * stride;
      prefetch_row(rows[i], bytes_);
    }
    if (!layout_.has_padding) return;
    for (std::int64_t i = 0; i < n; ++i) {
      if (values[i] == layout_.padding_id) rows[i] = nullptr;
    }
  }

  void pool(const Column& column, std::int64_t sample, std::int64_t last, Real<Storage>* sums, char* out) const {
    using R = Real<Storage>;
    const MultiplexFeature& f = *column.feature;
    const std::int64_t dim = tables_.dim;
    std::array<const char*, kBlock> rows;
    std::int64_t taken = 0;
    std::fill(sums, sums + dim, R{0});
    const auto close = [&] {
      const R scale = bag_scale<R>(layout_.combiner, taken);
      auto* to = reinterpret_cast<Storage*>(out);
      for (std::int64_t j = 0; j < dim; ++j) put(to[j], sums[j] * scale);
      std::fill(sums, sums + dim, R{0});
      taken = 0;
      ++sample;
      out += stride_;
    };
    const std::int64_t stop = f.begin(last);
    for (std::int64_t at = f.begin(sample); at < stop; at += kBlock) {
      const std::int64_t n = std::min(kBlock, stop - at);
      ask(column, f.values + at, n, rows.data());
      for (std::int64_t i = 0; i < n; ++i) {
        while (at + i >= f.begin(sample + 1)) close();
        if (rows[static_cast<std::size_t>(i)] == nullptr) continue;
        const auto* row = reinterpret_cast<const Storage*>(rows[static_cast<std::size_t>(i)]);
        for (std::int64_t j = 0; j < dim; ++j) sums[j] += to_float(row[j]);
        ++taken;
      }
    }
    while (sample < last) close();
  }

  const MultiplexLayout& layout_;
  const MultiplexTables& tables_;
  const std::vector<Column> columns_;
  const std::size_t bytes_;
  const CopyRows copy_;
  const std::int64_t stride_;
  char* out_;
};

std::int64_t samples_per_thread(const MultiplexLayout& layout) {
  // 2^12 rows take about 40 us: less is not worth waking a thread.
  return std::max<std::int64_t>(1, 4096 / std::max<std::int64_t>(1, layout.columns));
}

}  // namespace

void multiplexed_lookup(const MultiplexLayout& layout, const MultiplexTables& tables, void* out) {
  dispatch_float(tables.dtype, "multiplexed_embedding_lookup", "tables", [&](auto storage) {
    const Lookup<decltype(storage)> lookup(layout, tables, out);
    parallel_for(layout.batch, samples_per_thread(layout),
                 [&](std::int64_t begin, std::int64_t end) { lookup.run(begin, end); });
  });
}

MultiplexHits::MultiplexHits(const MultiplexLayout& layout)
    : buckets_(layout.buckets), tables_(layout.tables), combiner_(layout.combiner) {
  const std::vector<Column> columns = columns_of(layout);
  std::vector<std::int64_t> firsts;  // of each column's hits
  std::int64_t n = 0;
  for (const Column& c : columns) {
    firsts.push_back(n);
    n += c.feature->count;
  }
  hits_.resize(static_cast<std::size_t>(n));
  const auto most = static_cast<std::uint64_t>(buckets_) * static_cast<std::uint64_t>(tables_);
  parallel_for(layout.batch, samples_per_thread(layout), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      for (std::int64_t c = 0; c < layout.columns; ++c) {
        const Column& column = columns[static_cast<std::size_t>(c)];
        const MultiplexFeature& f = *column.feature;
        const std::int64_t start = f.begin(b), stop = f.begin(b + 1);
        std::int64_t bag = stop - start;
        if (layout.has_padding && combiner_ != Combiner::kSum && bag > 1) {
          bag -= std::count(f.values + start, f.values + stop, layout.padding_id);
        }
        const auto source = static_cast<std::uint32_t>(b * layout.columns + c);
        Hit* hit = hits_.data() + firsts[static_cast<std::size_t>(c)] + start;
        for (std::int64_t i = start; i < stop; ++i, ++hit) {
          const bool padded = layout.has_padding && f.values[i] == layout.padding_id;
          const std::int64_t row = column.table * buckets_ + row_of(f.values[i], column.salt, buckets_);
          *hit = {padded ? most : static_cast<std::uint64_t>(row), source, static_cast<std::uint32_t>(bag)};
        }
      }
    }
  });
  sort(most);
  // Padding is sorted behind everything else.
  const auto padding = std::lower_bound(hits_.begin(), hits_.end(), most,
                                        [](const Hit& hit, std::uint64_t row) { return hit.row < row; });
  hits_.resize(static_cast<std::size_t>(padding - hits_.begin()));
}

// Least significant digit first, each pass stable: equal rows stay in the order of the samples.
void MultiplexHits::sort(std::uint64_t most) {
  const auto n = static_cast<std::int64_t>(hits_.size());
  const int bits = static_cast<int>(std::bit_width(most));
  const int passes = (bits + 10) / 11;  // at most 2048 counters a pass
  const int digit = passes == 0 ? 0 : (bits + passes - 1) / passes;
  const std::uint64_t mask = (std::uint64_t{1} << digit) - 1;
  std::vector<Hit> other(hits_.size());
  for (int shift = 0; shift < passes * digit; shift += digit) {
    stable_pass(
        n, std::int64_t{1} << digit, kHitsPerThread, nullptr,
        [&](std::int64_t i) { return (hits_[static_cast<std::size_t>(i)].row >> shift) & mask; },
        [&](std::int64_t i, std::int64_t to) {
          other[static_cast<std::size_t>(to)] = hits_[static_cast<std::size_t>(i)];
        });
    hits_.swap(other);
  }
}

std::int64_t MultiplexHits::first_of(std::int64_t table) const {
  const auto row = static_cast<std::uint64_t>(table * buckets_);
  return std::lower_bound(hits_.begin(), hits_.end(), row,
                          [](const Hit& hit, std::uint64_t wanted) { return hit.row < wanted; }) -
         hits_.begin();
}

std::int64_t MultiplexHits::rows(std::int64_t table) const {
  const std::int64_t begin = first_of(table), end = first_of(table + 1);
  std::int64_t n = 0;
  for (std::int64_t i = begin; i < end; ++i) {
    n += i == begin || hits_[static_cast<std::size_t>(i)].row != hits_[static_cast<std::size_t>(i - 1)].row;
  }
  return n;
}

// Sums the gradients of every row whose first hit lies in [begin, end), in order, into target(row).
template <class Storage, class Target>
void MultiplexHits::sum(std::int64_t begin, std::int64_t end, std::int64_t dim, const Storage* grad,
                        const Target& target) const {
  using R = Real<Storage>;
  const auto n = static_cast<std::int64_t>(hits_.size());
  const auto sums = std::make_unique<double[]>(static_cast<std::size_t>(dim));
  const std::size_t bytes = static_cast<std::size_t>(dim) * sizeof(Storage);
  const Hit* hits = hits_.data();
  std::int64_t i = begin;
  while (i < end && i > 0 && hits[i].row == hits[i - 1].row) ++i;
  while (i < end) {
    const std::uint64_t row = hits[i].row;
    std::fill(sums.get(), sums.get() + dim, 0.0);
    for (; i < n && hits[i].row == row; ++i) {
      if (i + kAhead < n) {
        prefetch_row(reinterpret_cast<const char*>(grad + std::int64_t{hits[i + kAhead].source} * dim), bytes);
      }
      const Storage* from = grad + std::int64_t{hits[i].source} * dim;
      const R scale = bag_scale<R>(combiner_, hits[i].bag);
      for (std::int64_t j = 0; j < dim; ++j) sums[static_cast<std::size_t>(j)] += to_float(from[j]) * scale;
    }
    Storage* to = target(row);
    for (std::int64_t j = 0; j < dim; ++j) put(to[j], static_cast<R>(sums[static_cast<std::size_t>(j)]));
  }
}

void MultiplexHits::dense(const MultiplexTables& gradients, const void* grad) const {
  dispatch_float(gradients.dtype, "multiplexed_embedding_lookup", "grad", [&](auto storage) {
    using Storage = decltype(storage);
    parallel_for(static_cast<std::int64_t>(hits_.size()), kHitsPerThread, [&](std::int64_t begin, std::int64_t end) {
      sum<Storage>(begin, end, gradients.dim, static_cast<const Storage*>(grad), [&](std::uint64_t row) {
        const auto table = static_cast<std::size_t>(row / static_cast<std::uint64_t>(buckets_));
        const auto bucket = static_cast<std::int64_t>(row % static_cast<std::uint64_t>(buckets_));
        return static_cast<Storage*>(gradients.data[table]) + bucket * gradients.strides[table];
      });
    });
  });
}

void MultiplexHits::sparse(std::int64_t table, const MultiplexTables& values, const void* grad,
                           std::int64_t* indices) const {
  const std::int64_t first = first_of(table), last = first_of(table + 1);
  const std::uint64_t base = static_cast<std::uint64_t>(table * buckets_);
  // Where each part's rows go: the same split twice, so that the counts fit.
  const std::int64_t parts = std::min<std::int64_t>(max_threads(), (last - first) / kHitsPerThread + 1);
  std::vector<std::int64_t> begins(static_cast<std::size_t>(parts) + 1, 0);
  const auto edge = [&](std::int64_t p) { return first + (last - first) * p / parts; };
  const auto opens = [&](std::int64_t i) {
    return i == first || hits_[static_cast<std::size_t>(i)].row != hits_[static_cast<std::size_t>(i - 1)].row;
  };
  parallel_for(parts, 1, [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t p = from; p < to; ++p) {
      std::int64_t n = 0;
      for (std::int64_t i = edge(p); i < edge(p + 1); ++i) n += opens(i);
      begins[static_cast<std::size_t>(p) + 1] = n;
    }
  });
  for (std::size_t p = 1; p < begins.size(); ++p) begins[p] += begins[p - 1];
  dispatch_float(values.dtype, "multiplexed_embedding_lookup", "grad", [&](auto storage) {
    using Storage = decltype(storage);
    parallel_for(parts, 1, [&](std::int64_t from, std::int64_t to) {
      for (std::int64_t p = from; p < to; ++p) {
        std::int64_t at = begins[static_cast<std::size_t>(p)];
        sum<Storage>(edge(p), edge(p + 1), values.dim, static_cast<const Storage*>(grad), [&](std::uint64_t row) {
          indices[at] = static_cast<std::int64_t>(row - base);
          return static_cast<Storage*>(values.data[0]) + at++ * values.strides[0];
        });
      }
    });
  });
}

}  // namespace hotloop::table
