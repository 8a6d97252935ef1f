// SPDX-License-Identifier: Apache-2.0
// Device memory that is given back whatever happens, and kept for the next call where it is scratch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace hotloop::table::gpu {

template <class Machine>
class Buffers;

// Room for some T, until it goes out of scope.
template <class Machine, class T>
class Held {
 public:
  Held() = default;
  Held(Buffers<Machine>* from, void* at) : from_(from), at_(at) {}
  Held(Held&& o) noexcept : from_(std::exchange(o.from_, nullptr)), at_(std::exchange(o.at_, nullptr)) {}
  Held& operator=(Held&& o) noexcept {
    std::swap(from_, o.from_);
    std::swap(at_, o.at_);
    return *this;
  }
  ~Held() {
    if (at_ != nullptr) from_->give(at_);
  }
  T* get() const { return static_cast<T*>(at_); }

 private:
  Buffers<Machine>* from_ = nullptr;
  void* at_ = nullptr;
};

template <class Machine>
class Buffers {
 public:
  // Without `keeps`, memory goes back to the machine as soon as it is not held any more.
  Buffers(Machine& machine, bool keeps) : machine_(machine), keeps_(keeps) {}
  ~Buffers() {
    for (const Block& b : blocks_) machine_.release(b.at);
  }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  template <class T>
  Held<Machine, T> take(std::int64_t n) {
    return {this, room(static_cast<std::size_t>(std::max<std::int64_t>(n, 1)) * sizeof(T))};
  }
  void give(void* at) {
    const auto b = std::find_if(blocks_.begin(), blocks_.end(), [&](const Block& x) { return x.at == at; });
    b->used = false;
    if (!keeps_) drop(b);
  }
  std::int64_t bytes() const {
    std::int64_t sum = 0;
    for (const Block& b : blocks_) sum += static_cast<std::int64_t>(b.bytes);
    return sum;
  }

 private:
  struct Block {
    void* at;
    std::size_t bytes;
    bool used;
  };
  using Place = typename std::vector<Block>::iterator;

  void drop(Place b) {
    machine_.release(b->at);
    blocks_.erase(b);
  }
  void* room(std::size_t bytes) {
    Place best = blocks_.end(), small = blocks_.end();
    for (Place b = blocks_.begin(); b != blocks_.end(); ++b) {
      if (b->used) continue;
      if (b->bytes >= bytes && (best == blocks_.end() || b->bytes < best->bytes)) best = b;
      if (b->bytes < bytes && (small == blocks_.end() || b->bytes > small->bytes)) small = b;
    }
    if (best != blocks_.end()) {
      best->used = true;
      return best->at;
    }
    // One that is too small makes way, so that growing batches do not leave a trail.
    if (small != blocks_.end()) drop(small);
    // A little more than asked, for batches that differ a little; whole tables get what they asked for.
    const std::size_t more = keeps_ ? bytes + bytes / 4 + 256 : bytes;
    blocks_.reserve(blocks_.size() + 1);
    blocks_.push_back({machine_.allocate(more), more, true});
    return blocks_.back().at;
  }

  Machine& machine_;
  bool keeps_;
  std::vector<Block> blocks_;
};

}  // namespace hotloop::table::gpu
