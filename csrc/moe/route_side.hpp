// SPDX-License-Identifier: Apache-2.0
// Numbers of eight tokens side by side, for what would be a few instructions of one token and long waits between them:
// the threshold of the k best, and the order of the candidates. And the candidates of one token, as bits. Included by
// *.simd.cpp only, behind moe/route_rows.hpp.
namespace {

constexpr std::int64_t kBatch = 8;        // tokens side by side
constexpr std::int64_t kCandidates = 16;  // of a token that is ranked beside the others

// One number of each token of the batch.
template <class R>
class Side {
 public:
  typedef R Vector __attribute__((vector_size(kBatch * sizeof(R))));
  using Whole = std::conditional_t<sizeof(R) == 4, std::int32_t, std::int64_t>;
  typedef Whole Count __attribute__((vector_size(kBatch * sizeof(R))));
  explicit Side(const Vector& v) { std::memcpy(x_, &v, sizeof v); }
  R operator[](std::int64_t t) const { return x_[t]; }

 private:
  alignas(64) R x_[kBatch];
};

// v[i][j] = v[j][i], of eight vectors of eight.
template <class V, class Count>
HOTLOOP_INLINE void transpose(V* v) {
  const auto exchange = [&](int apart, const Count& low, const Count& high) {
    HOTLOOP_UNROLL
    for (int i = 0; i < 8; ++i) {
      if ((i & apart) != 0) continue;
      const V a = v[i], b = v[i + apart];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + apart] = __builtin_shuffle(a, b, high);
    }
  };
  exchange(1, Count{0, 8, 2, 10, 4, 12, 6, 14}, Count{1, 9, 3, 11, 5, 13, 7, 15});
  exchange(2, Count{0, 1, 8, 9, 4, 5, 12, 13}, Count{2, 3, 10, 11, 6, 7, 14, 15});
  exchange(4, Count{0, 1, 2, 3, 8, 9, 10, 11}, Count{4, 5, 6, 7, 12, 13, 14, 15});
}

// side[l] = lane l of all rows.
template <class R, class V>
HOTLOOP_INLINE void side_by_side(const R (*rows)[kLanes], V* side) {
  if constexpr (sizeof(V) <= kVectorBytes) {
    HOTLOOP_UNROLL
    for (int half = 0; half < 2; ++half) {
      HOTLOOP_UNROLL
      for (int t = 0; t < kBatch; ++t) std::memcpy(&side[half * kBatch + t], rows[t] + half * kBatch, sizeof(V));
      transpose<V, typename Side<R>::Count>(side + half * kBatch);
    }
  } else {
    alignas(64) R turned[kLanes][kBatch];
    for (int t = 0; t < kBatch; ++t) {
      for (int l = 0; l < kLanes; ++l) turned[l][t] = rows[t][l];
    }
    std::memcpy(side, turned, sizeof turned);
  }
}

// Batcher's merge exchange for 16 numbers: 63 pairs.
constexpr auto exchanges() {
  std::array<std::pair<int, int>, 63> pairs{};
  std::size_t n = 0;
  for (int p = 1; p < kLanes; p *= 2) {
    for (int q = p; q > 0; q /= 2) {
      for (int j = q % p; j + q < kLanes; j += 2 * q) {
        for (int i = j; i < j + q && i + q < kLanes; ++i) {
          if (i / (2 * p) == (i + q) / (2 * p)) pairs[n++] = {i, i + q};
        }
      }
    }
  }
  return pairs;
}
constexpr auto kExchanges = exchanges();

template <class V, std::size_t... I>
HOTLOOP_INLINE void exchange_all(V* v, std::index_sequence<I...>) {
  const auto exchange = [](V& a, V& b) {
    const V high = a > b ? a : b, low = a > b ? b : a;
    a = high;
    b = low;
  };
  (exchange(v[kExchanges[I].first], v[kExchanges[I].second]), ...);
}

// The lanes of every row in falling order, rows side by side.
template <class R, class V>
__attribute__((noinline)) void sort_falling(const R (*rows)[kLanes], V* sorted) {
  V v[kLanes];
  side_by_side(rows, v);
  exchange_all(v, std::make_index_sequence<kExchanges.size()>());
  std::memcpy(sorted, v, sizeof v);
}

// rank[c][t]: how many of N candidates of token t are better than candidate c, equal ones that stand before it among
// them; those from found[t] on are worse than all others.
template <int N, class R>
__attribute__((noinline)) void rank_candidates(const R (*value)[kBatch], const typename Side<R>::Whole* found,
                                               typename Side<R>::Whole (*rank)[kBatch]) {
  typename Side<R>::Vector v[N];
  typename Side<R>::Count better[N], there;
  std::memcpy(&there, found, sizeof there);
  std::memcpy(v, value, sizeof v);
  HOTLOOP_UNROLL
  for (int c = 0; c < N; ++c) {
    v[c] = there > c ? v[c] : -kInf<R> - typename Side<R>::Vector{};
    better[c] = typename Side<R>::Count{} + c;  // all that stand before it, and then less those that are worse
    HOTLOOP_UNROLL
    for (int d = 0; d < c; ++d) {
      const auto is_above = v[c] > v[d];  // all bits, which is -1
      better[c] += is_above;
      better[d] -= is_above;
    }
  }
  std::memcpy(rank, better, sizeof better);
}

// Bit l is set where x[l] >= least, for kLanes numbers. Not where x[l] is NaN.
HOTLOOP_INLINE std::uint32_t reach(const float* x, float least) {
#if HOTLOOP_SIMD_LEVEL == 2
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(least), _CMP_GE_OQ);
#elif HOTLOOP_SIMD_LEVEL == 1
  const __m256 limit = _mm256_set1_ps(least);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), limit, _CMP_GE_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + 8), limit, _CMP_GE_OQ));
  return static_cast<std::uint32_t>(low | high << 8);
#elif defined(__x86_64__)
  const __m128 limit = _mm_set1_ps(least);
  int bits = 0;
  for (int i = 0; i < 4; ++i) bits |= _mm_movemask_ps(_mm_cmpge_ps(_mm_loadu_ps(x + 4 * i), limit)) << (4 * i);
  return static_cast<std::uint32_t>(bits);
#else
  std::uint32_t bits = 0;
  for (std::uint32_t l = 0; l < kLanes; ++l) bits |= static_cast<std::uint32_t>(x[l] >= least) << l;
  return bits;
#endif
}
HOTLOOP_INLINE std::uint32_t reach(const double* x, double least) {
  std::uint32_t bits = 0;
  for (std::uint32_t l = 0; l < kLanes; ++l) bits |= static_cast<std::uint32_t>(x[l] >= least) << l;
  return bits;
}

// Numbers in the order of integers, and back.
HOTLOOP_INLINE std::int32_t ordered(float x) {
  const auto bits = std::bit_cast<std::int32_t>(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
HOTLOOP_INLINE std::int64_t ordered(double x) {
  const auto bits = std::bit_cast<std::int64_t>(x);
  return bits ^ ((bits >> 63) & 0x7fffffffffffffff);
}
HOTLOOP_INLINE float number(std::int32_t key) { return std::bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff)); }
HOTLOOP_INLINE double number(std::int64_t key) {
  return std::bit_cast<double>(key ^ ((key >> 63) & 0x7fffffffffffffff));
}

// Above low, at most high.
template <class Integer>
HOTLOOP_INLINE Integer between(Integer low, Integer high) {
  using Unsigned = std::make_unsigned_t<Integer>;
  const Unsigned gap = static_cast<Unsigned>(high) - static_cast<Unsigned>(low);
  return static_cast<Integer>(static_cast<Unsigned>(low) + gap / 2 + gap % 2);
}

template <class R>
std::int64_t count_reaching(const R* x, std::int64_t n, R least) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < n; i += kLanes) count += std::popcount(reach(x + i, least));
  return count;
}

// Not by the next key: -0 and 0 have two keys and are equal.
template <class R>
std::int64_t count_above(const R* x, std::int64_t n, R least) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < n; ++i) count += x[i] > least ? 1 : 0;
  return count;
}

}  // namespace
