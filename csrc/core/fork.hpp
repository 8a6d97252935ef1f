// SPDX-License-Identifier: Apache-2.0
// What a fork leaves behind. A child process has one thread, the one that forked: the OpenMP threads that worked for
// it are gone, and a lock that another thread held will never be released. The handlers are installed when this
// library is loaded.
#pragma once

namespace hotloop {

// Whether the calling thread came through a fork of a process with other threads. OpenMP would hand its work to
// threads that do not exist in the child, and wait for them forever.
bool lost_threads();

// A stretch of work on structures with locks. A fork waits until no thread is inside one, so a child finds every
// lock free and every row whole. Must not be held while waiting for something that the forking thread may hold.
class Unforkable {
 public:
  Unforkable();
  ~Unforkable();
  Unforkable(const Unforkable&) = delete;
  Unforkable& operator=(const Unforkable&) = delete;
};

}  // namespace hotloop
