// SPDX-License-Identifier: Apache-2.0
// A GPU for tests: every thread of every block is a fiber, one of which runs at a time. A fiber runs until it
// waits, at the barrier of its block, for the other threads of its warp (a shuffle), or for a letter; then one
// of those that can go on is chosen at random. A barrier that is missing therefore lets threads read what has
// not been written yet, in some order that a test with many seeds comes upon, and a barrier that not all
// threads reach ends the test with a message instead of hanging. Defines what kernels/core/threads.cuh leaves
// open; include it in one source file.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels/core/threads.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace hotloop::test {

class Gpu {
 public:
  // kernel(thread, block) for threads x blocks. Each order of `seed` is another interleaving.
  void launch(int blocks, int threads, std::uint64_t seed, std::function<void(int, int)> kernel) {
    random_ = seed * 2 + 1;
    ahead_ = seed % 2 == 0;
    kernel_ = std::move(kernel);
    fibers_.clear();
    ready_.clear();
    const auto count = static_cast<std::size_t>(blocks) * static_cast<std::size_t>(threads);
    while (stacks_.size() < count) stacks_.push_back(std::make_unique<char[]>(kStack));
    barriers_.assign(static_cast<std::size_t>(blocks), {threads, 0, {}});
    warps_.assign(count / cuda::kWarp, {});
    fibers_.resize(count);
    for (std::size_t i = 0; i < count; ++i) {
      fibers_[i].thread = static_cast<int>(i) % threads;
      fibers_[i].block = static_cast<int>(i) / threads;
      fibers_[i].warp = static_cast<int>(i) / cuda::kWarp;
      fibers_[i].stack = stacks_[i].get();
      ready_.push_back(static_cast<int>(i));
    }
    left_ = static_cast<int>(count);
    while (left_ > 0) {
      if (ready_.empty()) fail("threads wait for others that have ended or wait elsewhere");
      // In half of the launches mostly the one that became ready last: a warp then runs far ahead of the others.
      const bool last = ahead_ && draw() % 16 != 0;
      const std::size_t at = last ? ready_.size() - 1 : draw() % ready_.size();
      std::swap(ready_[at], ready_.back());
      const int next = ready_.back();
      ready_.pop_back();
      enter(next);
    }
  }

  void block_barrier() { arrive(barriers_[static_cast<std::size_t>(fiber().block)]); }

  template <class Pick>
  std::uint64_t shuffle(std::uint64_t x, Pick&& pick) {
    std::uint64_t theirs = 0;
    const int lane = fiber().thread % cuda::kWarp;
    exchange(x, [&](const std::uint64_t* slots) { theirs = slots[pick(lane)]; });
    return theirs;
  }

  std::uint32_t ballot(bool x) {
    std::uint32_t bits = 0;
    const auto gather = [&bits](const std::uint64_t* slots) {
      for (int i = 0; i < cuda::kWarp; ++i) bits |= static_cast<std::uint32_t>(slots[i] & 1) << i;
    };
    exchange(x ? 1 : 0, gather);
    return bits;
  }

  void wait() {
    if (++waits_ > kMostWaits) fail("a letter never comes");
    ready_.push_back(current_);
    leave();
  }

 private:
  static constexpr std::size_t kStack = std::size_t{1} << 18;
  static constexpr std::int64_t kMostWaits = 400'000'000;

  struct Fiber {
    jmp_buf at;
    char* stack = nullptr;
    void* fake_stack = nullptr;
    int thread = 0, block = 0, warp = 0;
    unsigned int shuffles = 0;
    bool started = false;
  };
  struct Barrier {
    int size = 0, arrived = 0;
    std::vector<int> waiting;
  };
  struct Warp {
    Barrier barrier{cuda::kWarp, 0, {}};
    std::uint64_t slots[2][cuda::kWarp];
  };

  // Calls read(what each thread of the warp brought).
  template <class Read>
  void exchange(std::uint64_t x, Read&& read) {
    Fiber& me = fiber();
    Warp& warp = warps_[static_cast<std::size_t>(me.warp)];
    // Two sets in turn: nobody writes to this one again before all have read it.
    std::uint64_t* slots = warp.slots[me.shuffles++ % 2];
    slots[me.thread % cuda::kWarp] = x;
    arrive(warp.barrier);
    read(slots);
  }

  Fiber& fiber() { return fibers_[static_cast<std::size_t>(current_)]; }
  std::uint64_t draw() {  // xorshift
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_ >> 16;
  }
  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "emulated GPU: %s\n", what);
    std::exit(1);
  }

  void arrive(Barrier& barrier) {
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
      barrier.waiting.clear();
      return;
    }
    barrier.waiting.push_back(current_);
    leave();
  }

  // From the scheduler to a fiber, and back when it waits or ends. A context is made once per fiber; after
  // that _setjmp and _longjmp change stacks without a system call.
  void enter(int next) {
    current_ = next;
    Fiber& to = fiber();
    if (_setjmp(scheduler_) != 0) return finish_switch(scheduler_fake_, nullptr);
    start_switch(&scheduler_fake_, to.stack, kStack);
    if (to.started) _longjmp(to.at, 1);
    to.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = to.stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    self_ = this;
    makecontext(&context, &Gpu::run, 0);
    setcontext(&context);
  }
  void leave() {
    Fiber& from = fiber();
    if (_setjmp(from.at) != 0) return finish_switch(fiber().fake_stack, this);
    start_switch(&from.fake_stack, scheduler_stack_, scheduler_size_);
    _longjmp(scheduler_, 1);
  }
  static void run() {
    Gpu& gpu = *self_;
    gpu.finish_switch(nullptr, &gpu);
    gpu.kernel_(gpu.fiber().thread, gpu.fiber().block);
    --gpu.left_;
    gpu.start_switch(nullptr, gpu.scheduler_stack_, gpu.scheduler_size_);
    _longjmp(gpu.scheduler_, 1);
  }

#if defined(__SANITIZE_ADDRESS__)
  void start_switch(void** fake, const void* stack, std::size_t size) {
    __sanitizer_start_switch_fiber(fake, stack, size);
  }
  // `from_scheduler`: not null in a fiber, which then learns where the scheduler's stack is.
  void finish_switch(void* fake, Gpu* in_fiber) {
    if (in_fiber != nullptr) {
      __sanitizer_finish_switch_fiber(fake, &scheduler_stack_, &scheduler_size_);
    } else {
      __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
    }
  }
#else
  void start_switch(void**, const void*, std::size_t) {}
  void finish_switch(void*, Gpu*) {}
#endif

  static inline Gpu* self_ = nullptr;
  std::function<void(int, int)> kernel_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<Fiber> fibers_;
  std::vector<Barrier> barriers_;
  std::vector<Warp> warps_;
  std::vector<int> ready_;
  jmp_buf scheduler_;
  void* scheduler_fake_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  std::size_t scheduler_size_ = 0;
  std::uint64_t random_ = 1;
  std::int64_t waits_ = 0;
  int current_ = 0, left_ = 0;
  bool ahead_ = false;
};

inline Gpu gpu;

// Warps of a body in a random order, up to `most` at a time, two to a block; each has as much scratch, filled before.
template <class T, class Body, class Random>
void run_warps(const Body& body, Random& random, int most, std::int64_t scratch, T fill) {
  const std::int64_t warps = body.warps();
  if (warps <= 0) return;
  std::vector<std::int64_t> order(static_cast<std::size_t>(warps));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::shuffle(order.begin(), order.end(), random);
  std::vector<T> memory(static_cast<std::size_t>(most * (scratch + 1)), fill);
  const int at_once = static_cast<int>(std::min<std::int64_t>(most, (warps + 1) / 2 * 2));
  gpu.launch(at_once / 2, 2 * cuda::kWarp, random(), [&](int thread, int block) {
    const int mine = block * 2 + thread / cuda::kWarp;
    for (std::int64_t w = mine; w < warps; w += at_once) {
      body(order[static_cast<std::size_t>(w)], thread % cuda::kWarp, memory.data() + mine * (scratch + 1));
    }
  });
}

// Blocks of a body in a random order, up to `most` at a time; each has as much shared memory, filled before.
template <class Body, class Random>
void run_blocks(const Body& body, Random& random, int most) {
  struct alignas(16) Unit {
    std::uint64_t of[2] = {0xA5A5A5A5A5A5A5A5u, 0xA5A5A5A5A5A5A5A5u};
  };
  const std::int64_t blocks = body.blocks();
  if (blocks <= 0) return;
  std::vector<std::int64_t> order(static_cast<std::size_t>(blocks));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::shuffle(order.begin(), order.end(), random);
  const int at_once = static_cast<int>(std::min<std::int64_t>(most, blocks));
  std::vector<std::vector<Unit>> memory(static_cast<std::size_t>(at_once));
  for (auto& each : memory) each.resize(static_cast<std::size_t>((body.shared_bytes() + 15) / 16));
  gpu.launch(at_once, body.threads(), random(), [&](int thread, int block) {
    for (std::int64_t b = block; b < blocks; b += at_once) {
      body(order[static_cast<std::size_t>(b)], thread, memory[static_cast<std::size_t>(block)].data());
      gpu.block_barrier();
    }
  });
}

}  // namespace hotloop::test

namespace hotloop::cuda::emulated {

void block_barrier() { test::gpu.block_barrier(); }
std::uint64_t shuffle_xor(std::uint64_t x, int distance) {
  return test::gpu.shuffle(x, [distance](int lane) { return lane ^ distance; });
}
std::uint64_t shuffle_up(std::uint64_t x, int distance) {
  return test::gpu.shuffle(x, [distance](int lane) { return lane < distance ? lane : lane - distance; });
}
std::uint64_t shuffle(std::uint64_t x, int lane) {
  return test::gpu.shuffle(x, [lane](int) { return lane & (kWarp - 1); });
}
std::uint32_t ballot(bool x) { return test::gpu.ballot(x); }
void wait() { test::gpu.wait(); }

}  // namespace hotloop::cuda::emulated
