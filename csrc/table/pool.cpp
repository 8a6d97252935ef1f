#include "table/pool.hpp"

#include <algorithm>
#include <vector>

#include "core/parallel.hpp"
#include "table/store.hpp"

namespace hotloop::table {

namespace {

constexpr std::int64_t kGrain = 256;  // positions worth a thread: about 20 us

using AddRow = decltype(&simd_baseline::table_add_row);
using MaxRow = decltype(&simd_baseline::table_max_row);
using DotRow = decltype(&simd_baseline::table_dot_row);
AddRow add_row() { HOTLOOP_SIMD_DISPATCH(table_add_row) }
MaxRow max_row() { HOTLOOP_SIMD_DISPATCH(table_max_row) }
DotRow dot_row() { HOTLOOP_SIMD_DISPATCH(table_dot_row) }

// Calls use(row of values) until it ran on a row that nobody wrote meanwhile; false where it is not the key's.
template <class Use>
bool use_row(const Table& table, std::uint64_t key, std::uint32_t row, std::vector<char>& copy, Use&& use) {
  const char* const p = table.arena().row(row);
  const RowLayout& layout = table.layout();
  for (;;) {
    const std::uint32_t v = table.locks().begin_read(row);
    if (load_relaxed<std::uint64_t>(p) != key) return false;
    if constexpr (kWordByWord) {
      copy.resize(static_cast<std::size_t>(layout.value_bytes()));
      copy_out(copy.data(), p + layout.values, copy.size());
      use(copy.data());
    } else {
      use(p + layout.values);
    }
    if (table.locks().end_read(row, v)) return true;
  }
}

// The sums of one bag: a row is added from one buffer into the other, so that a row that changed under the addition
// is added again from what was before.
class Sums {
 public:
  Sums(const Table& table, const Bags& bags, const Pooled& pooled)
      : table_(table), bags_(bags), pooled_(pooled), dim_(table.layout().dim), add_(add_row()), max_(max_row()) {
    for (int i = 0; i < 2; ++i) {
      sum_[i].resize(static_cast<std::size_t>(dim_));
      if (bags.pool == Pool::kMax) from_[i].resize(static_cast<std::size_t>(dim_));
    }
  }

  void start() {
    std::fill(sum_[now_].begin(), sum_[now_].end(), 0.0f);
    std::fill(from_[now_].begin(), from_[now_].end(), std::int64_t{-1});
    size_ = 0;
  }
  bool add(std::int64_t at, std::uint64_t key, std::uint32_t row) {
    const int next = 1 - now_;
    const Dtype dtype = table_.settings().dtype;
    const bool used = use_row(table_, key, row, copy_, [&](const void* p) {
      if (bags_.pool == Pool::kMax) {
        max_(dtype, p, bags_.scale, at, sum_[now_].data(), from_[now_].data(), dim_, sum_[next].data(), from_[next].data());
      } else {
        const float weight = bags_.weights != nullptr ? bags_.weights[at] : 1.0f;
        add_(dtype, p, weight * bags_.scale, sum_[now_].data(), dim_, sum_[next].data());
      }
    });
    if (!used) return false;
    now_ = next;
    ++size_;
    return true;
  }
  void finish(std::int64_t bag) {
    float* const sum = sum_[now_].data();
    if (bags_.pool == Pool::kMean && size_ > 1) {
      const float n = static_cast<float>(size_);
      for (std::int64_t j = 0; j < dim_; ++j) sum[j] /= n;
    }
    store_floats(pooled_.dtype, sum, pooled_.out.row(bag), dim_);
    if (pooled_.sizes != nullptr) pooled_.sizes[bag] = size_;
    if (pooled_.largest != nullptr) std::copy_n(from_[now_].data(), dim_, pooled_.largest + bag * dim_);
  }

 private:
  const Table& table_;
  const Bags& bags_;
  const Pooled& pooled_;
  std::int64_t dim_;
  AddRow add_;
  MaxRow max_;
  int now_ = 0;
  std::int64_t size_ = 0;
  std::vector<float> sum_[2];
  std::vector<std::int64_t> from_[2];
  std::vector<char> copy_;
};

// Calls body(first bag, last bag + 1) on threads with about as many positions each.
template <class Body>
void divide_bags(const Bags& bags, Body&& body) {
  const std::int64_t n = bags.count > 0 ? bags.end(bags.count - 1) - bags.begin(0) + bags.count : 0;
  const std::int64_t threads = std::clamp<std::int64_t>(n / kGrain, 1, max_threads());
  const auto bag_at = [&](std::int64_t share) {
    if (share >= threads || bags.offsets == nullptr) return share >= threads ? bags.count : bags.count * share / threads;
    const std::int64_t position = bags.begin(0) + (bags.end(bags.count - 1) - bags.begin(0)) * share / threads;
    return static_cast<std::int64_t>(std::lower_bound(bags.offsets, bags.offsets + bags.count, position) - bags.offsets);
  };
  if (bags.count == 0) return;
  parallel_for(threads, 1, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t first = begin == 0 ? 0 : bag_at(begin), last = bag_at(end);
    if (first < last) body(first, last);
  });
}

// Calls visit(position, key, row) in order for the positions of bags [first, last); row may be kNoRow.
template <class Visit>
void visit_rows(const Table& table, const Bags& bags, const std::uint32_t* rows, std::int64_t first, std::int64_t last,
                Visit&& visit) {
  const std::int64_t begin = bags.begin(first), end = bags.end(last - 1);
  const RowLayout& layout = table.layout();
  const std::int64_t bytes = layout.values + layout.value_bytes();
  if (rows == nullptr) {
    table.look_up(
        *table.index(), end - begin, bytes, [&](std::int64_t i) { return std::pair(begin + i, bags.keys[begin + i]); },
        [&](std::int64_t at, std::uint64_t key, std::uint64_t, std::uint32_t row) { visit(at, key, row); });
    return;
  }
  constexpr std::int64_t kAhead = 16;
  for (std::int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end && rows[i + kAhead] != kNoRow) prefetch_row(table.arena().row(rows[i + kAhead]), bytes);
    visit(i, bags.keys[i], rows[i]);
  }
}

std::uint32_t look_again(const Table& table, std::uint64_t key) { return table.row_of(*table.index(), key, place_hash(key)); }

}  // namespace

void pool_bags(const Table& table, const Bags& bags, const std::uint32_t* rows, const Pooled& pooled) {
  divide_bags(bags, [&](std::int64_t first, std::int64_t last) {
    Sums sums(table, bags, pooled);
    std::int64_t bag = first;
    sums.start();
    visit_rows(table, bags, rows, first, last, [&](std::int64_t at, std::uint64_t key, std::uint32_t row) {
      for (; at >= bags.end(bag); sums.start()) sums.finish(bag++);
      while (row != kNoRow && !sums.add(at, key, row)) row = look_again(table, key);
    });
    for (; bag < last; sums.start()) sums.finish(bag++);
  });
}

void weight_gradient(const Table& table, const Bags& bags, const std::uint32_t* rows, const float* grad,
                     std::int64_t grad_stride, float* grad_weights) {
  divide_bags(bags, [&](std::int64_t first, std::int64_t last) {
    const DotRow dot = dot_row();
    std::vector<char> copy;
    std::int64_t bag = first;
    visit_rows(table, bags, rows, first, last, [&](std::int64_t at, std::uint64_t key, std::uint32_t row) {
      while (at >= bags.end(bag)) ++bag;
      grad_weights[at] = 0;
      bool used = false;
      for (; !used && row != kNoRow; row = used ? row : look_again(table, key)) {
        used = use_row(table, key, row, copy, [&](const void* p) {
          grad_weights[at] = dot(table.settings().dtype, p, grad + bag * grad_stride, table.layout().dim);
        });
      }
    });
  });
}

bool all_finite(const float* x, std::int64_t n) { HOTLOOP_SIMD_DISPATCH(table_all_finite(x, n)) }

}  // namespace hotloop::table
