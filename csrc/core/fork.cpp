// SPDX-License-Identifier: Apache-2.0
#include "core/fork.hpp"

#include <dirent.h>
#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace hotloop {

namespace {

std::atomic<std::int64_t> working{0};  // threads inside Unforkable, counted once per nesting
std::atomic<int> forking{0};
std::atomic<bool> several_threads{false};  // of this process when it forked
thread_local std::int64_t depth = 0;
thread_local bool lost = false;

// Waits are short (one call of a table) or as long as a call over millions of keys: first yield, then sleep.
template <class Condition>
void wait_until(Condition&& condition) {
  for (int round = 0; !condition(); ++round) {
    if (round < 64) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
}

// Whether this process has threads beside the calling one; true where that is not known.
bool has_other_threads() {
#if defined(__linux__)
  DIR* tasks = opendir("/proc/self/task");
  if (tasks == nullptr) return true;
  int count = 0;
  while (const dirent* entry = readdir(tasks)) count += entry->d_name[0] != '.';
  closedir(tasks);
  return count > 1;
#else
  return true;
#endif
}

void before_fork() {
  forking.fetch_add(1);
  wait_until([] { return working.load() <= depth; });
  several_threads.store(has_other_threads());
}

void in_parent() { forking.fetch_sub(1); }

void in_child() {
  forking.store(0);
  working.store(depth);
  if (!several_threads.load()) return;
  lost = true;
  // torch and NumPy's BLAS ask the same OpenMP runtime, and would wait for the same threads.
  omp_set_num_threads(1);
}

[[maybe_unused]] const int installed = pthread_atfork(before_fork, in_parent, in_child);

}  // namespace

bool lost_threads() { return lost; }

Unforkable::Unforkable() {
  if (depth++ > 0) {
    working.fetch_add(1);
    return;
  }
  working.fetch_add(1);
  while (forking.load() != 0) {
    working.fetch_sub(1);
    wait_until([] { return forking.load() == 0; });
    working.fetch_add(1);
  }
}

Unforkable::~Unforkable() {
  --depth;
  working.fetch_sub(1);
}

}  // namespace hotloop
