// SPDX-License-Identifier: Apache-2.0
// What forward and backward of the router do to one row of logits. Included by *.simd.cpp only, behind
// core/simd_begin.hpp. Rows are padded to a multiple of kLanes, so that there are no loops over leftovers, and sums run
// in kLanes interleaved lanes, in one order on every instruction set. Lanes are vectors by name: GCC 12 keeps the lanes
// of an array in memory, or takes them one by one.
namespace {

using namespace hotloop::moe;

#if HOTLOOP_SIMD_LEVEL == 2
constexpr int kVectorBytes = 64;
#elif HOTLOOP_SIMD_LEVEL == 1
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class R>
constexpr R kInf = std::numeric_limits<R>::infinity();

// kLanes numbers in as many registers as they take.
template <class R>
struct Lanes {
  typedef R Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(R));
  static constexpr int kVectors = static_cast<int>(kLanes) / kWidth;
  Vector v[kVectors];

  static HOTLOOP_INLINE Lanes all(R x) {
    Lanes a;
    HOTLOOP_UNROLL
    for (int i = 0; i < kVectors; ++i) a.v[i] = x - Vector{};
    return a;
  }
  static HOTLOOP_INLINE Lanes load(const R* p) {
    Lanes a;
    HOTLOOP_UNROLL
    for (int i = 0; i < kVectors; ++i) std::memcpy(&a.v[i], p + i * kWidth, sizeof(Vector));
    return a;
  }
  HOTLOOP_INLINE void store(R* p) const {
    HOTLOOP_UNROLL
    for (int i = 0; i < kVectors; ++i) std::memcpy(p + i * kWidth, &v[i], sizeof(Vector));
  }
  template <class F>
  HOTLOOP_INLINE Lanes with(const Lanes& other, F f) const {
    Lanes a;
    HOTLOOP_UNROLL
    for (int i = 0; i < kVectors; ++i) a.v[i] = f(v[i], other.v[i]);
    return a;
  }
  HOTLOOP_INLINE Lanes operator+(const Lanes& b) const {
    return with(b, [](auto x, auto y) { return x + y; });
  }
  HOTLOOP_INLINE Lanes operator*(const Lanes& b) const {
    return with(b, [](auto x, auto y) { return x * y; });
  }
};

// NaN among the first is passed over.
template <class R>
HOTLOOP_INLINE Lanes<R> larger(const Lanes<R>& a, const Lanes<R>& b) {
  return a.with(b, [](auto x, auto y) { return x > y ? x : y; });
}
template <class R>
HOTLOOP_INLINE Lanes<R> smaller(const Lanes<R>& a, const Lanes<R>& b) {
  return a.with(b, [](auto x, auto y) { return x < y ? x : y; });
}

// Lane l takes lane l + 8, then l + 4, l + 2 and l + 1.
template <class R>
HOTLOOP_INLINE R sum_of(const Lanes<R>& lanes) {
  alignas(64) R lane[kLanes];
  lanes.store(lane);
  HOTLOOP_UNROLL
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}
template <class R>
HOTLOOP_INLINE R largest_of(const Lanes<R>& lanes) {
  alignas(64) R lane[kLanes];
  lanes.store(lane);
  R most = lane[0];
  for (std::int64_t l = 1; l < kLanes; ++l) most = lane[l] > most ? lane[l] : most;
  return most;
}

// A loop of its own, over all of a row, is one that GCC vectorises.
template <class Storage, class R>
__attribute__((noinline)) void widen(const Storage* __restrict row, std::int64_t n, R* __restrict out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = to_float(row[i]);
}

template <class R>
HOTLOOP_INLINE Lanes<R> lane_sums(const R* x, std::int64_t n) {
  Lanes<R> sum = Lanes<R>::load(x);
  for (std::int64_t i = kLanes; i < n; i += kLanes) sum = sum + Lanes<R>::load(x + i);
  return sum;
}
template <class R>
HOTLOOP_INLINE Lanes<R> lane_maxima(const R* x, std::int64_t n) {
  Lanes<R> best = Lanes<R>::all(-kInf<R>);
  for (std::int64_t i = 0; i < n; i += kLanes) best = larger(Lanes<R>::load(x + i), best);
  return best;
}

// The first `count` of kLanes numbers, -inf in the place of the others. No copy by way of memory: a whole vector read
// where parts of it were just written waits for them.
HOTLOOP_INLINE Lanes<float> load_first(const float* p, std::int64_t count) {
#if HOTLOOP_SIMD_LEVEL == 2
  Lanes<float> a;
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  const __m512 v = _mm512_mask_loadu_ps(_mm512_set1_ps(-kInf<float>), mask, p);
  std::memcpy(&a.v[0], &v, sizeof v);
  return a;
#elif HOTLOOP_SIMD_LEVEL == 1
  Lanes<float> a;
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int i = 0; i < 2; ++i) {
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count) - 8 * i), lane);
    const __m256 v = _mm256_maskload_ps(p + 8 * i, mask);
    const __m256 filled = _mm256_blendv_ps(_mm256_set1_ps(-kInf<float>), v, _mm256_castsi256_ps(mask));
    std::memcpy(&a.v[i], &filled, sizeof filled);
  }
  return a;
#else
  alignas(64) float some[kLanes];
  for (std::int64_t l = 0; l < kLanes; ++l) some[l] = l < count ? p[l] : -kInf<float>;
  return Lanes<float>::load(some);
#endif
}
HOTLOOP_INLINE Lanes<double> load_first(const double* p, std::int64_t count) {
  alignas(64) double some[kLanes];
  for (std::int64_t l = 0; l < kLanes; ++l) some[l] = l < count ? p[l] : -kInf<double>;
  return Lanes<double>::load(some);
}

// A row of logits as R, padded with -inf. Returns the largest of every lane; NaN is passed over.
template <class Storage, class R>
HOTLOOP_INLINE Lanes<R> read_row(const Storage* row, std::int64_t experts, std::int64_t n, R* x) {
  if constexpr (std::is_same_v<Storage, R>) {
    const std::int64_t whole = experts / kLanes * kLanes;
    Lanes<R> best = Lanes<R>::all(-kInf<R>);
    for (std::int64_t i = 0; i < whole; i += kLanes) {
      const Lanes<R> v = Lanes<R>::load(row + i);
      v.store(x + i);
      best = larger(v, best);
    }
    if (whole == n) return best;
    const Lanes<R> rest = load_first(row + whole, experts - whole);
    rest.store(x + whole);
    return larger(rest, best);
  } else {
    if (n != experts) Lanes<R>::all(-kInf<R>).store(x + n - kLanes);
    widen(row, experts, x);
    return lane_maxima(x, n);
  }
}

}  // namespace
