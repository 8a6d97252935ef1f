// SPDX-License-Identifier: Apache-2.0
// Large buffers: whole pages from the system, and advice about their size.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <utility>

namespace hotloop {

// Asks for huge pages in [data, data + bytes): a buffer that is written once costs one page fault per 2 MiB
// instead of one per 4 KiB. Does nothing where the system has no such call.
void advise_huge_pages(void* data, std::size_t bytes);

// Zeroed memory straight from the system, aligned to 2 MiB if large. Untouched pages take no memory.
class Pages {
 public:
  Pages() = default;
  Pages(std::size_t bytes, bool huge);  // throws std::bad_alloc
  ~Pages() { release(); }
  Pages(Pages&& other) noexcept { *this = std::move(other); }
  Pages& operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(mapped_, other.mapped_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
    return *this;
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  void* data() const { return data_; }

 private:
  void release();
  void* data_ = nullptr;
  void* mapped_ = nullptr;
  std::size_t mapped_bytes_ = 0;
};

// A zeroed array of which most will never be touched.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using SparseArray = std::unique_ptr<T[], Free>;
template <class T>
static SparseArray<T> sparse_array(std::size_t count) {
  return SparseArray<T>(static_cast<T*>(std::calloc(count, sizeof(T))));
}

}  // namespace hotloop
