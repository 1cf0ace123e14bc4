#include "cpu/workspace.h"

#include <torch/library.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace uasparse {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Buffer {
  void* data;
  size_t capacity;
};

struct Pool {
  std::mutex mutex;
  std::vector<Buffer> free;
  size_t bytes = 0;
};

// Never destroyed: a thread may still hold a workspace when the process exits.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

}  // namespace

#ifdef __SANITIZE_ADDRESS__

// To the byte and never used again, so that an access beyond it is noticed.
Workspace::Workspace(size_t bytes) {
  if (bytes > 0 && posix_memalign(&data_, 64, bytes) != 0) throw std::bad_alloc();
}

Workspace::~Workspace() { std::free(data_); }

#else

Workspace::Workspace(size_t bytes) {
  if (bytes == 0) return;
  {
    // The smallest buffer that fits, unless it is far too large to be tied up by this request.
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    size_t best = p.free.size();
    for (size_t i = 0; i < p.free.size(); ++i) {
      const size_t capacity = p.free[i].capacity;
      if (capacity < bytes || capacity > 4 * bytes + (size_t{1} << 16)) continue;
      if (best == p.free.size() || capacity < p.free[best].capacity) best = i;
    }
    if (best < p.free.size()) {
      data_ = p.free[best].data;
      capacity_ = p.free[best].capacity;
      p.bytes -= capacity_;
      p.free[best] = p.free.back();
      p.free.pop_back();
      return;
    }
  }
  // Huge pages where they are worth it: the kernels' accesses are spread over the whole buffer.
  const size_t alignment = bytes >= kHugePage ? kHugePage : 4096;
  capacity_ = (bytes + alignment - 1) / alignment * alignment;
  data_ = std::aligned_alloc(alignment, capacity_);
  if (data_ == nullptr) throw std::bad_alloc();
#ifdef __linux__
  if (alignment == kHugePage) madvise(data_, capacity_, MADV_HUGEPAGE);
#endif
}

Workspace::~Workspace() {
  if (data_ == nullptr) return;
  Pool& p = pool();
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    if (p.bytes + capacity_ <= kPoolBytes) {
      p.free.push_back({data_, capacity_});
      p.bytes += capacity_;
      return;
    }
  }
  std::free(data_);
}

#endif

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  constexpr size_t kFromSystem = size_t{32} << 20;
  if (bytes < kFromSystem) return;
  // The whole pages inside.
  const auto address = reinterpret_cast<uintptr_t>(data), first = (address + kHugePage - 1) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), (address + bytes - first) / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

size_t free_workspaces() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  for (const Buffer& buffer : p.free) std::free(buffer.data);
  p.free.clear();
  return std::exchange(p.bytes, 0);
}

TORCH_LIBRARY_FRAGMENT(uasparse, m) {
  m.def("free_workspaces() -> int", [] { return static_cast<int64_t>(free_workspaces()); });
}

}  // namespace uasparse
