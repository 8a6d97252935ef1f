// SPDX-License-Identifier: Apache-2.0
// The error memory of ReLoop2 in one pass: cosine similarity of every query to every slot, a running top-k, and sums
// over the k slots weighted by a softmax. Slots are taken in blocks that are normalised and transposed into panels,
// which stay in L2. A tile of eight queries by one block of similarities stays in L1; only similarities above a query's
// k-th best so far are written to memory. The queries x slots matrix is never stored.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "core/dtype.hpp"
#include "core/macros.hpp"
#include "core/simd.hpp"
#include "core/view.hpp"

namespace hotloop::table {

inline constexpr std::int64_t kGroup = 8;  // queries in a tile
// Slots in a tile: with eight float32 queries 16 KiB, half of a 32 KiB L1.
inline constexpr std::int64_t kMostTileSlots = 512;
// Panels of a block: half of a 256 KiB L2, the smallest in use; the other half is for queries and candidates.
inline constexpr std::int64_t kBlockBytes = 128 * 1024;
inline constexpr std::int64_t kPanelAlign = 32;  // slots: a multiple of every level's panel
// Similarities that are looked at together, and of these the ones that are written down together.
inline constexpr std::int64_t kLook = 32, kWalk = 16;

template <class R>
inline std::int64_t block_slots(std::int64_t dim) {
  const std::int64_t fit = kBlockBytes / (static_cast<std::int64_t>(sizeof(R)) * (dim > 0 ? dim : 1));
  const std::int64_t whole = fit / kPanelAlign * kPanelAlign;
  return whole < kPanelAlign ? kPanelAlign : (whole > kMostTileSlots ? kMostTileSlots : whole);
}

// A slot and its similarity as one number that grows with the similarity and falls with the slot's age rank: the
// order of neighbours is the order of numbers. float32: 32 bits of either.
template <class R>
struct Candidate;
template <>
struct Candidate<float> {
  using Key = std::uint64_t;
  static HOTLOOP_INLINE Key make(float similarity, std::int64_t index) {
    const auto bits = std::bit_cast<std::uint32_t>(similarity + 0.0f);  // -0 becomes 0
    const std::uint32_t ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
    return static_cast<Key>(ordered) << 32 | (0xffffffffu - static_cast<std::uint32_t>(index));
  }
  static float similarity(Key key) {
    const auto ordered = static_cast<std::uint32_t>(key >> 32);
    return std::bit_cast<float>((ordered & 0x80000000u) != 0 ? ordered & 0x7fffffffu : ~ordered);
  }
  static std::int64_t index(Key key) { return 0xffffffffu - static_cast<std::uint32_t>(key & 0xffffffffu); }
};
template <>
struct Candidate<double> {
  struct Key {
    double similarity;
    std::int64_t index;
    friend bool operator>(const Key& a, const Key& b) {
      return a.similarity > b.similarity || (a.similarity == b.similarity && a.index < b.index);
    }
  };
  static HOTLOOP_INLINE Key make(double similarity, std::int64_t index) { return {similarity, index}; }
  static double similarity(const Key& key) { return key.similarity; }
  static std::int64_t index(const Key& key) { return key.index; }
};

// What may be among the k best of one query. Compacted to the k best when there may be no room for the next few.
template <class R>
struct Candidates {
  typename Candidate<R>::Key* items = nullptr;
  std::int64_t count = 0;
  std::int64_t capacity = 0;  // > k + kWalk
  std::int64_t k = 0;
  // What a later slot has to exceed: an equal one is younger, or of a higher slot, and loses.
  R least = -std::numeric_limits<R>::infinity();
};
void compact(Candidates<float>& found);
void compact(Candidates<double>& found);

template <class R>
struct ScanCall {
  const R* queries;         // (groups, dim, kGroup): unit vectors, 0 where there is no query
  std::int64_t count;       // queries
  View keys;                // (N, dim), unit stride inside a row
  std::int64_t first;       // slot that is counted as 0
  std::int64_t begin, end;  // slots to look at, counted from `first`
  Candidates<R>* found;     // (count,)
  R* panels;                // block_slots(dim) * dim, 64-byte aligned
  R* tile;                  // kGroup * kMostTileSlots, 64-byte aligned
};

struct Readout {
  double temperature, gamma, lam;
};
// y_base + lam * (gamma * (y - y_base) + (1 - gamma) * (y - yb)), held in [0, 1]; NaN stays NaN.
inline double compensated(const Readout& readout, double base, double label, double stored_base) {
  const double error = readout.gamma * (label - base) + (1.0 - readout.gamma) * (label - stored_base);
  const double moved = base + readout.lam * error;
  return moved < 0.0 ? 0.0 : (moved > 1.0 ? 1.0 : moved);
}

// R below is float64 for float64 keys, else float32.
struct MemoryCall {
  View query;                    // (B, dim) R, unit stride
  View keys;                     // (N, dim) any float, unit stride
  std::int64_t first = 0;        // the oldest slot; equal similarities go to the older
  const void* base_prediction;   // (B,) R
  const void* labels;            // (N,) R
  const void* base_predictions;  // (N,) R
  std::int64_t k;                // 0 to N
  Readout readout;
  void* prediction;         // (B,) R
  void* weights;            // (B, k) R or nullptr; 0 after the last neighbour
  std::int64_t* neighbors;  // (B, k) or nullptr: slots, most similar first; -1 after the last
};
void error_memory(const MemoryCall& call);

// bucket_r = sum_l 2^l [<W_rl, h> > 0]. Sums run over the dimensions in order, product and sum rounded apart: the same
// bucket on every machine and instruction set.
struct BucketCall {
  const float* hidden;       // (rows, dim)
  const float* projections;  // (repeats, bits, dim)
  std::int64_t rows, dim, repeats, bits;
  std::int32_t* buckets;  // (rows, repeats)
};
struct BucketRange {
  std::int64_t begin, end;  // groups of rows
  float* panels;            // all projections, panels of one level
  float* group;             // dim * kGroup
  float* tile;              // kGroup * kMostTileSlots
};
void lsh_buckets(const BucketCall& call);

// Sums in the sketch are whole multiples of 2^-32 and counts whole numbers, all int64: additions commute exactly, and
// nothing saturates before 2^31 samples fell into one bucket.
inline constexpr double kSketchUnit = 0x1p-32;
struct SketchCall {
  std::int64_t* sketch;         // (repeats, buckets, 3): count, labels, base predictions
  const std::int32_t* buckets;  // (rows, repeats)
  std::int64_t rows, repeats, size;
};
void sketch_write(const SketchCall& call, const double* labels, const double* base_predictions);
struct SketchReadCall : SketchCall {
  const double* base_prediction;  // (rows,)
  double share;                   // similarity of a bucket is share * count
  Readout readout;
  double* prediction;  // (rows,)
  double* weights;     // (rows, repeats) or nullptr
};
void sketch_read(const SketchReadCall& call);

}  // namespace hotloop::table

HOTLOOP_SIMD_FUNCTION(table, void, scan_slots, (const table::ScanCall<float>& call), (call))
HOTLOOP_SIMD_FUNCTION(table, void, scan_slots, (const table::ScanCall<double>& call), (call))
HOTLOOP_SIMD_FUNCTION(table, void, pack_projections, (const table::BucketCall& call, float* panels), (call, panels))
HOTLOOP_SIMD_FUNCTION(table, void, bucket_rows, (const table::BucketCall& call, const table::BucketRange& range),
                      (call, range))
