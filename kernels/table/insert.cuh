// SPDX-License-Identifier: Apache-2.0
// Insertion of unknown keys. They are sorted by hash, so equal keys are neighbours, and so are the keys of a bucket.
// One warp owns a bucket and needs no lock, and its decisions depend on nothing but the batch. This step decides slots
// only; rows are written afterwards, one warp each.
#pragma once

#include <cstdint>

#include "kernels/table/lookup.cuh"
#include "table/store/first_values.hpp"

namespace hotloop::table::gpu {

// First values of a row by the lanes of a warp.
template <class Storage>
HOTLOOP_BOTH inline void first_row(const Shape& shape, std::uint64_t key, char* row, int lane) {
  Storage* out = reinterpret_cast<Storage*>(row);
  for (std::int64_t block = lane; block * 4 < shape.dim; block += kWarp) {
    float x[4];
    first_values(shape.initializer, shape.first, shape.second, shape.seed, key, block, x);
    HOTLOOP_UNROLL
    for (int w = 0; w < 4; ++w) {
      if (block * 4 + w < shape.dim) put(out[block * 4 + w], x[w]);
    }
  }
}

// Positions without a row: a flag each, and the hash that they are sorted by.
struct FlagMisses {
  const std::uint32_t* rows;
  std::uint8_t* flags;
  HOTLOOP_BOTH void each(std::int64_t i) const { flags[i] = rows[i] == kNoRow ? 1 : 0; }
};
struct HashMisses {
  const std::uint64_t* keys;
  const std::uint32_t* positions;
  std::uint64_t* hashes;
  std::uint64_t seed;
  HOTLOOP_BOTH void each(std::int64_t i) const { hashes[i] = place_hash(keys[positions[i]], seed); }
};
// The first of equal hashes, which are equal keys: the hash is a bijection.
struct FlagDistinct {
  const std::uint64_t* hashes;
  std::uint8_t* flags;
  HOTLOOP_BOTH void each(std::int64_t i) const { flags[i] = i == 0 || hashes[i] != hashes[i - 1] ? 1 : 0; }
};

// The unknown keys of a batch: `firsts` are the places of the d distinct ones among m sorted positions.
struct Misses {
  const std::uint64_t* keys = nullptr;       // (n,) of the batch
  const std::uint64_t* hashes = nullptr;     // (m,) sorted
  const std::uint32_t* positions = nullptr;  // (m,) of equal keys in order
  const std::uint32_t* firsts = nullptr;     // (d,)
  std::int64_t m = 0, d = 0;

  HOTLOOP_INLINE std::uint64_t hash(std::int64_t k) const { return hashes[firsts[k]]; }
  HOTLOOP_INLINE std::int64_t end(std::int64_t k) const { return k + 1 < d ? firsts[k + 1] : m; }
  HOTLOOP_INLINE std::uint64_t key(std::int64_t k) const { return keys[positions[firsts[k]]]; }
  HOTLOOP_INLINE std::int64_t last(std::int64_t k) const { return positions[end(k) - 1]; }
  HOTLOOP_INLINE bool begins_bucket(std::int64_t k, std::uint64_t buckets) const {
    return k == 0 || bucket_of(hash(k - 1), buckets) != bucket_of(hash(k), buckets);
  }
};

HOTLOOP_INLINE int used_slots(std::uint32_t digests) { return 4 - cuda::count_bits(same_bytes(digests, 0u)); }

// How full the fullest bucket would be with all of the new keys.
struct CountFill {
  static constexpr std::int64_t kScratch = 0;
  Store store;
  Misses misses;
  std::uint32_t* fullest;
  std::int64_t warps() const { return misses.d; }
  HOTLOOP_BOTH void operator()(std::int64_t k, int lane, float*) const {
    if (!misses.begins_bucket(k, store.buckets)) return;
    const std::uint64_t bucket = bucket_of(misses.hash(k), store.buckets);
    const std::uint32_t digests = store.digests[bucket * kWarp + static_cast<std::uint64_t>(lane)];
    std::uint64_t fill = warp_sum(static_cast<std::uint64_t>(used_slots(digests)));
    for (std::int64_t i = k;; i += kWarp) {
      const bool same = i + lane < misses.d && bucket_of(misses.hash(i + lane), store.buckets) == bucket;
      const std::uint32_t mine = cuda::ballot(same);
      fill += static_cast<std::uint64_t>(cuda::count_bits(mine));
      if (mine != 0xffffffffu) break;
    }
    if (lane == 0) cuda::max_global(fullest, static_cast<std::uint32_t>(fill < 0xffffffffu ? fill : 0xffffffffu));
  }
};

// The key that was evicted for distinct key k, and where its row is; or k itself, where k was refused.
struct Gone {
  std::uint8_t* flags = nullptr;  // (d,), all 0 at first
  std::uint64_t* keys = nullptr;
  std::uint64_t* scores = nullptr;
  std::uint32_t* slots = nullptr;  // of a row from before this batch, or kNoRow
  std::uint32_t* fresh = nullptr;  // which distinct key of this batch it was
  bool refused = false;            // a key that is not let in stands for itself
};

// A slot for each distinct key: a free one or, in a full bucket, that of the lowest (score, key). A lane has four slots
// of the bucket in registers until all is decided.
struct Settle {
  static constexpr std::int64_t kScratch = 0;
  static constexpr int kEach = kSlots / kWarp;
  Store store;
  Shape shape;
  Misses misses;
  Stamp stamp;
  std::uint32_t most;      // slots of a bucket that may be used
  std::uint32_t* slot_of;  // (d,) out, kNoRow at first
  Gone gone;
  std::uint64_t* size;

  std::int64_t warps() const { return misses.d; }

  HOTLOOP_BOTH void operator()(std::int64_t begin, int lane, float*) const {
    if (!misses.begins_bucket(begin, store.buckets)) return;
    const std::uint64_t bucket = bucket_of(misses.hash(begin), store.buckets);
    const bool evicts = store.scores != nullptr;
    const auto mine = static_cast<std::int64_t>(bucket) * kSlots + lane * kEach;
    const std::uint32_t before = store.digests[mine / 4];
    std::uint32_t digests = before, dirty = 0;
    std::uint64_t keys[kEach], scores[kEach];
    std::uint32_t owners[kEach];
    HOTLOOP_UNROLL
    for (int e = 0; e < kEach; ++e) {
      owners[e] = kNoRow;
      keys[e] = evicts ? store.keys[mine + e] : 0;
      scores[e] = evicts ? store.scores[mine + e] : 0;
    }
    auto used = static_cast<std::uint32_t>(warp_sum(static_cast<std::uint64_t>(used_slots(digests))));
    const std::uint32_t used_before = used;
    for (std::int64_t k = begin; k < misses.d && bucket_of(misses.hash(k), store.buckets) == bucket; ++k) {
      const std::uint64_t key = misses.key(k), score = fresh_score(k, lane);
      int at = -1;  // the slot within the bucket
      if (used < most) {
        const std::uint32_t empty = same_bytes(digests, 0u);
        const std::uint32_t lanes = cuda::ballot(empty != 0);
        const int holder = cuda::lowest_bit(lanes);
        const auto first = static_cast<std::uint32_t>(empty != 0 ? cuda::lowest_bit(empty) / 8 : 0);
        at = holder * kEach + static_cast<int>(cuda::shuffle(first, holder));
        ++used;
      } else if (evicts) {
        at = evict(k, score, lane, digests, keys, scores, owners);
      }
      if (at < 0) continue;  // refused
      HOTLOOP_UNROLL
      for (int e = 0; e < kEach; ++e) {
        if (at != lane * kEach + e) continue;
        digests = (digests & ~(0xffu << (8 * e))) | digest_of(misses.hash(k)) << (8 * e);
        keys[e] = key;
        scores[e] = score;
        owners[e] = static_cast<std::uint32_t>(k);
        dirty |= 1u << e;
      }
      if (lane == 0) slot_of[k] = static_cast<std::uint32_t>(static_cast<std::int64_t>(bucket) * kSlots + at);
    }
    if (digests != before) store.digests[mine / 4] = digests;
    HOTLOOP_UNROLL
    for (int e = 0; e < kEach; ++e) {
      if ((dirty >> e & 1u) == 0) continue;
      store.keys[mine + e] = keys[e];
      if (evicts) store.scores[mine + e] = scores[e];
    }
    if (lane == 0 && used != used_before) cuda::add_global(size, std::uint64_t{used - used_before});
  }

 private:
  HOTLOOP_BOTH std::uint64_t fresh_score(std::int64_t k, int lane) const {
    if (shape.strategy == Strategy::kNone) return 0;
    std::uint64_t given = 0;
    if (counts_uses(shape, stamp)) {
      const std::int64_t first = misses.firsts[k], end = misses.end(k);
      if (stamp.scores == nullptr) {
        given = static_cast<std::uint64_t>(end - first);
      } else {
        for (std::int64_t i = first + lane; i < end; i += kWarp) {
          given = add_scores(given, uses_of(shape, stamp, misses.positions[i]));
        }
        given = warp_add_scores(given);
      }
    } else if (stamp.scores != nullptr) {
      given = stamp.scores[misses.last(k)];
    }
    return score_after(shape, stamp, given, true, true, 0);
  }

  // The slot of the lowest (score, key), which leaves, or -1: the newcomer is lower.
  HOTLOOP_BOTH int evict(std::int64_t k, std::uint64_t score, int lane, std::uint32_t digests,
                         const std::uint64_t (&keys)[kEach], const std::uint64_t (&scores)[kEach],
                         const std::uint32_t (&owners)[kEach]) const {
    std::uint64_t low_score = ~std::uint64_t{0}, low_key = ~std::uint64_t{0};
    std::uint32_t low_at = kNoRow, owner = kNoRow;
    HOTLOOP_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const bool is_used = (digests >> (8 * e) & 0xffu) != 0;
      const bool lower = low_at == kNoRow || scores[e] < low_score || (scores[e] == low_score && keys[e] < low_key);
      if (!is_used || !lower) continue;
      low_score = scores[e];
      low_key = keys[e];
      low_at = static_cast<std::uint32_t>(lane * kEach + e);
      owner = owners[e];
    }
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      const std::uint64_t other_score = cuda::shuffle_xor(low_score, distance);
      const std::uint64_t other_key = cuda::shuffle_xor(low_key, distance);
      const std::uint32_t other_at = cuda::shuffle_xor(low_at, distance);
      const std::uint32_t other_owner = cuda::shuffle_xor(owner, distance);
      const bool below = other_score < low_score || (other_score == low_score && other_key < low_key);
      const bool lower = other_at != kNoRow && (low_at == kNoRow || below);
      low_score = lower ? other_score : low_score;
      low_key = lower ? other_key : low_key;
      low_at = lower ? other_at : low_at;
      owner = lower ? other_owner : owner;
    }
    // New keys of LFU begin low; refused, none would ever get in.
    if (low_at == kNoRow || (shape.strategy != Strategy::kLfu && score < low_score)) {
      if (lane == 0 && gone.refused) {
        gone.flags[k] = 1;
        gone.keys[k] = misses.key(k);
        gone.scores[k] = score;
        gone.slots[k] = kNoRow;
        gone.fresh[k] = static_cast<std::uint32_t>(k);
      }
      return -1;
    }
    if (lane == 0) {
      if (owner != kNoRow) slot_of[owner] = kNoRow;
      if (gone.flags != nullptr) {
        const std::uint64_t bucket = bucket_of(misses.hash(k), store.buckets);
        gone.flags[k] = 1;
        gone.keys[k] = low_key;
        gone.scores[k] = low_score;
        gone.slots[k] = owner == kNoRow ? static_cast<std::uint32_t>(bucket * kSlots + low_at) : kNoRow;
        gone.fresh[k] = owner;
      }
    }
    return static_cast<int>(low_at);
  }
};

// The rows that leave, in the order of `which`, before anybody writes over them.
template <class Storage>
struct CopyGone {
  static constexpr std::int64_t kScratch = 0;
  Store store;
  Shape shape;
  Misses misses;
  Matrix given;  // values of the batch, or none
  Gone gone;
  const std::uint32_t* which;  // (m,) distinct keys for which a key was evicted
  std::int64_t m;
  std::uint64_t* keys;    // (m,) out
  std::uint64_t* scores;  // (m,) out
  Matrix values;          // (m, dim) out
  std::int64_t warps() const { return m; }
  HOTLOOP_BOTH void operator()(std::int64_t i, int lane, float*) const {
    const std::uint32_t k = which[i], slot = gone.slots[k];
    if (slot != kNoRow) {
      copy_row(values.row(i), row_at(store, shape, slot), shape.value_bytes, values.access, lane, kWarp);
    } else if (given.data != nullptr) {
      const int access = given.access < values.access ? given.access : values.access;
      copy_row(values.row(i), given.row(misses.last(gone.fresh[k])), shape.value_bytes, access, lane, kWarp);
    } else {
      first_row<Storage>(shape, gone.keys[k], values.row(i), lane);
    }
    if (lane == 0) {
      keys[i] = gone.keys[k];
      scores[i] = gone.scores[k];
    }
  }
};

// The rows of keys that have a slot now.
template <class Storage>
struct FillRows {
  static constexpr std::int64_t kScratch = 0;
  Store store;
  Shape shape;
  Misses misses;
  Stamp stamp;
  Matrix given;
  const std::uint32_t* slot_of;
  std::int64_t warps() const { return misses.d; }
  HOTLOOP_BOTH void operator()(std::int64_t k, int lane, float*) const {
    const std::uint32_t slot = slot_of[k];
    if (slot == kNoRow) return;
    char* row = row_at(store, shape, slot);
    if (given.data != nullptr) {
      copy_row(row, given.row(misses.last(k)), shape.value_bytes, given.access, lane, kWarp);
    } else {
      first_row<Storage>(shape, misses.key(k), row, lane);
    }
    float* state = reinterpret_cast<float*>(row + shape.state);
    for (std::int64_t j = lane; j < shape.states; j += kWarp) state[j] = shape.initial_state[j];
    if (lane != 0) return;
    if (store.times != nullptr) store.times[slot] = stamp.time;
    if (store.versions != nullptr) store.versions[slot] = stamp.generation;
  }
};

// The slot of every unknown key, at all of its positions; the later ones of a new key find it, as they would one after
// the other.
struct PlaceRows {
  static constexpr std::int64_t kScratch = 0;
  Misses misses;
  const std::uint32_t* slot_of;
  std::uint32_t* rows;
  std::uint8_t* found;
  std::int64_t warps() const { return misses.d; }
  HOTLOOP_BOTH void operator()(std::int64_t k, int lane, float*) const {
    const std::uint32_t slot = slot_of[k];
    const std::int64_t first = misses.firsts[k], end = misses.end(k);
    for (std::int64_t i = first + lane; i < end; i += kWarp) {
      const std::uint32_t position = misses.positions[i];
      rows[position] = slot;
      if (found != nullptr) found[position] = slot != kNoRow && i > first ? 1 : 0;
    }
  }
};

// Known keys of the batch may have had to leave for its new ones.
struct ConfirmRows {
  Store store;
  const std::uint64_t* keys;
  std::uint32_t* rows;
  HOTLOOP_BOTH void each(std::int64_t i) const {
    if (rows[i] != kNoRow && !holds(store, rows[i], keys[i])) rows[i] = kNoRow;
  }
};

struct DistinctKeys {
  Misses misses;
  std::uint64_t* keys;  // (d,) out
  HOTLOOP_BOTH void each(std::int64_t k) const { keys[k] = misses.key(k); }
};

// Twice the buckets: the keys of bucket b go to 2b and 2b + 1, in the order of their slots.
struct Split {
  static constexpr std::int64_t kScratch = 0;
  static constexpr int kEach = kSlots / kWarp;
  Store from, to;
  Shape shape;
  std::int64_t warps() const { return static_cast<std::int64_t>(from.buckets); }
  HOTLOOP_BOTH void operator()(std::int64_t bucket, int lane, float*) const {
    const std::int64_t first = bucket * kSlots;
    std::uint32_t target[kEach];
    int filled[2] = {0, 0};
    HOTLOOP_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const std::int64_t slot = first + e * kWarp + lane;
      const unsigned char digest = *digest_at(from, slot);
      const std::uint64_t key = from.keys[slot];
      const auto side = static_cast<int>(bucket_of(place_hash(key, to.hash_seed), to.buckets) & 1u);
      const std::uint32_t even = cuda::ballot(digest != 0 && side == 0), odd = cuda::ballot(digest != 0 && side == 1);
      const std::uint32_t below = (1u << lane) - 1u;
      const int rank = filled[side] + cuda::count_bits((side == 0 ? even : odd) & below);
      target[e] = kNoRow;
      if (digest != 0) {
        const std::int64_t at = (2 * bucket + side) * kSlots + rank;
        target[e] = static_cast<std::uint32_t>(at);
        *digest_at(to, at) = digest;
        to.keys[at] = key;
        if (from.scores != nullptr) to.scores[at] = from.scores[slot];
        if (from.times != nullptr) to.times[at] = from.times[slot];
        if (from.versions != nullptr) to.versions[at] = from.versions[slot];
      }
      filled[0] += cuda::count_bits(even);
      filled[1] += cuda::count_bits(odd);
    }
    HOTLOOP_UNROLL
    for (int e = 0; e < kEach; ++e) {
      for (int l = 0; l < kWarp; ++l) {
        const std::uint32_t at = cuda::shuffle(target[e], l);
        if (at == kNoRow) continue;
        copy_row(row_at(to, shape, at), row_at(from, shape, first + e * kWarp + l), shape.stride, 16, lane, kWarp);
      }
    }
  }
};

}  // namespace hotloop::table::gpu
