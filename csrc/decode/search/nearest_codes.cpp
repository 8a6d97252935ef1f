// SPDX-License-Identifier: Apache-2.0
// The k nearest codes of each code of a codebook, from a tile of matrix products.
//
// |E_i - E_j|^2 = |E_i|^2 - 2 E_i . E_j + |E_j|^2 is known up to the rounding of the product. Codes that this rounding
// cannot tell apart, and those around the k-th place, are measured again, dimension by dimension in float64. So neither
// the order in which a library sums nor the number of threads changes a table. Equal distances: the lower index first.
// A sample of 512 distances gives a bound that a little more than k codes lie within, so that only these are sorted.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "core/parallel.hpp"
#include "decode/search/calls.hpp"

namespace hotloop::decode {

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Neighbor {
  double distance;
  std::int32_t id;
  bool operator<(const Neighbor& o) const { return std::tie(distance, id) < std::tie(o.distance, o.id); }
};

// The nearest codes of one code. Scratch is kept from row to row.
class Nearest {
 public:
  explicit Nearest(const NeighborCall& call)
      : c_(call),
        largest_(*std::max_element(call.squares, call.squares + call.codes)),
        near_(static_cast<std::size_t>(call.codes) + 1),
        sorted_(near_.size()) {}

  void row(std::int64_t i) {
    self_ = c_.first + i;
    products_ = static_cast<const double*>(c_.products.data) + i * c_.products.stride[0];
    own_ = c_.squares[self_];
    // Two codes further apart than this are in the right order; the others are measured again.
    const double unsure = 4.0 * (c_.product_error * std::sqrt(own_) * std::sqrt(largest_) + c_.tiny) +
                          8.0 * static_cast<double>(c_.dim + 8) * 0x1p-52 * (own_ + largest_);
    const double bound = guess();
    gather(bound);
    if (count_ < c_.k) gather(kInf);
    sort();
    const double last = sorted_[static_cast<std::size_t>(c_.k - 1)].distance + unsure;
    if (last > bound) {
      gather(last);
      sort();
    }
    const auto end = sorted_.begin() + count_;
    const auto stop = std::find_if(sorted_.begin() + c_.k, end, [&](const Neighbor& n) { return n.distance > last; });
    for (auto from = sorted_.begin(); from < sorted_.begin() + c_.k;) {
      auto to = from + 1;
      while (to < stop && to->distance - (to - 1)->distance <= unsure) ++to;
      if (to - from > 1) {
        for (auto n = from; n < to; ++n) n->distance = measured(n->id);
        std::sort(from, to);
      }
      from = to;
    }
    for (std::int64_t n = 0; n < c_.k; ++n) c_.out[i * c_.out_stride + n] = sorted_[static_cast<std::size_t>(n)].id;
  }

 private:
  double distance(std::int64_t j) const { return (own_ + c_.squares[j]) - 2.0 * products_[j]; }

  // A distance that a little more than k codes are expected to lie within, from a sample of them.
  double guess() {
    constexpr std::int64_t kSample = 512;
    if (4 * c_.k >= c_.codes || c_.codes < 4 * kSample) return kInf;
    std::array<double, kSample> sample;
    for (std::int64_t s = 0; s < kSample; ++s) {
      const std::int64_t j = s * c_.codes / kSample;
      sample[static_cast<std::size_t>(s)] = j == self_ ? kInf : distance(j);
    }
    const double expected = static_cast<double>(c_.k) * kSample / static_cast<double>(c_.codes);
    const auto rank = static_cast<std::ptrdiff_t>(expected + 4.0 * std::sqrt(expected) + 4.0);
    std::nth_element(sample.begin(), sample.begin() + rank, sample.end());
    return sample[static_cast<std::size_t>(rank)];
  }
  void gather(double bound) {
    count_ = 0;
    for (std::int64_t j = 0; j < c_.codes; ++j) {
      const double d = distance(j);
      near_[static_cast<std::size_t>(count_)] = {d, static_cast<std::int32_t>(j)};
      count_ += static_cast<std::int64_t>(d <= bound) & static_cast<std::int64_t>(j != self_);
    }
  }
  // Into buckets of equal width, which leaves about one element in each to be sorted: 4 times as fast as std::sort on
  // 1200 of them.
  void sort() {
    constexpr std::size_t kBuckets = 2048;
    const auto end = near_.begin() + count_;
    const auto [low, high] = std::minmax_element(near_.begin(), end);
    const double least = low->distance, scale = (kBuckets - 1) / (high->distance - least);
    if (!std::isfinite(scale)) {
      std::sort(near_.begin(), end);
      std::copy(near_.begin(), end, sorted_.begin());
      return;
    }
    std::array<std::int32_t, kBuckets + 1> starts{};
    const auto bucket = [&](const Neighbor& n) { return static_cast<std::size_t>((n.distance - least) * scale); };
    for (auto n = near_.begin(); n < end; ++n) ++starts[bucket(*n) + 1];
    for (std::size_t i = 0; i < kBuckets; ++i) starts[i + 1] += starts[i];
    for (auto n = near_.begin(); n < end; ++n) sorted_[static_cast<std::size_t>(starts[bucket(*n)]++)] = *n;
    auto from = sorted_.begin();
    for (std::size_t i = 0; i < kBuckets; ++i) {
      const auto to = sorted_.begin() + starts[i];
      if (to - from > 1) std::sort(from, to);
      from = to;
    }
  }
  double measured(std::int64_t j) const {
    const double *x = c_.codebook + self_ * c_.dim, *y = c_.codebook + j * c_.dim;
    double sum = 0.0;
    for (std::int64_t d = 0; d < c_.dim; ++d) sum += (x[d] - y[d]) * (x[d] - y[d]);
    return sum;
  }

  const NeighborCall& c_;
  double largest_, own_ = 0.0;
  const double* products_ = nullptr;
  std::int64_t self_ = 0, count_ = 0;
  std::vector<Neighbor> near_, sorted_;
};

}  // namespace

void nearest_codes(const NeighborCall& call) {
  parallel_for(call.rows, 1 + 32768 / (call.codes + 1), [&](std::int64_t begin, std::int64_t end) {
    Nearest nearest(call);
    for (std::int64_t i = begin; i < end; ++i) nearest.row(i);
  });
}

}  // namespace hotloop::decode
