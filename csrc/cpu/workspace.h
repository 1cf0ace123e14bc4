// Reusable scratch memory of the CPU kernels.
//
// Fresh large allocations page-fault on every call, which costs as much as the kernels themselves; so a Workspace takes
// a buffer from a process-wide pool and gives it back when it goes out of scope. The pool keeps at most kPoolBytes;
// torch.ops.uasparse.free_workspaces() empties it. Memory is aligned to 64 bytes and not initialised.
#pragma once

#include <cstddef>
#include <cstdint>

namespace uasparse {

constexpr size_t kPoolBytes = size_t{256} << 20;

class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t capacity_ = 0;
};

// Of memory that is about to be written, whole: has it huge pages where the C library took it from the system for this
// block alone, as it does from 32 MiB on. Small pages, asked for one by one, would cost more than the kernel.
void prefer_huge_pages(void* data, size_t bytes);

// Returns the bytes given back.
size_t free_workspaces();

}  // namespace uasparse
