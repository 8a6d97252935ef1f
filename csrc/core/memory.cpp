// SPDX-License-Identifier: Apache-2.0
#include "core/memory.hpp"

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace hotloop {

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (address + page - 1) / page * page;
  const std::uintptr_t end = (address + bytes) / page * page;
  // Advice only: where it is refused the buffer works as before.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Pages::Pages(std::size_t bytes, bool huge) {
  constexpr std::size_t kHuge = std::size_t{1} << 21;
  const std::size_t align = huge ? kHuge : 4096;
#if defined(__unix__) || defined(__APPLE__)
  mapped_bytes_ = bytes + (huge ? kHuge : 0);
  void* got = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) throw std::bad_alloc();
  mapped_ = got;
#else
  mapped_bytes_ = bytes + align;
  mapped_ = std::calloc(mapped_bytes_, 1);
  if (mapped_ == nullptr) throw std::bad_alloc();
#endif
  const auto address = reinterpret_cast<std::uintptr_t>(mapped_);
  data_ = reinterpret_cast<void*>((address + align - 1) / align * align);
  if (huge) advise_huge_pages(data_, bytes);
}

void Pages::release() {
  if (mapped_ == nullptr) return;
#if defined(__unix__) || defined(__APPLE__)
  munmap(mapped_, mapped_bytes_);
#else
  std::free(mapped_);
#endif
  mapped_ = nullptr;
}

}  // namespace hotloop
