// A small CUDA on the host, so that the tests execute csrc/cuda/*.cu without a GPU, under the sanitizers of g++.
//
// Compile a .cu file as C++ (-x c++ -std=c++20) with this folder before CUDA's own on the include path. Each thread of a
// block is a fibre (ucontext), switched at barriers and warp operations, in a random order. ThreadSanitizer is told of
// the fibres and of what a barrier, a warp operation or an atomic orders, and so sees every other pair of accesses as the
// race that it is on a GPU, whatever the order in which they ran; AddressSanitizer is told of the stacks. Blocks run one
// after another, in a random order (races between blocks are not seen). __shared__ variables are static, between redzones
// of AddressSanitizer, and keep what the last block left. Warps are 32 threads, and warp operations need all of them.
// What a kernel may use is what is written below: add what a new kernel needs.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 64 << 10;

// The machinery itself runs in one thread: what it writes in one fibre and reads in another is no race.
#define UASPARSE_UNSEEN __attribute__((no_sanitize("thread")))

// Threads that wait for one another: the last to come lets all go on.
struct Barrier {
  unsigned size = 0, arrived = 0;
  uint64_t generation = 0;
  char order[2];  // what ThreadSanitizer knows it by, one for each of two generations that may overlap
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  bool done = false;
  const Barrier* waits_for = nullptr;
  uint64_t generation = 0;
  std::vector<Copy> copies;  // asynchronous ones that have not happened yet
  std::vector<size_t> commits;
  void* sanitizer = nullptr;  // the fibre as ThreadSanitizer knows it, or AddressSanitizer's fake stack
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][kWarpSize];  // in turn: who reads one operation's meets nobody who writes the next one's
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::function<void()> kernel;
  void* shared = nullptr;
  size_t shared_bytes = 0;
  Fiber scheduler;
};

#if defined(__SANITIZE_ADDRESS__)
inline const void* main_stack = nullptr;
inline size_t main_stack_bytes = 0;
#endif
inline Block* const block = new Block;  // and never deleted: fibres stand in it
inline Fiber* current = nullptr;
inline std::mt19937 random{1};

inline void happens_before(void* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(at);
#else
  (void)at;
#endif
}
inline void happens_after(void* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(at);
#else
  (void)at;
#endif
}

// Goes on in another fibre. The switch itself orders nothing, to ThreadSanitizer.
UASPARSE_UNSEEN inline void switch_to(Fiber* to) {
  Fiber* const from = current;
  current = to;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to->sanitizer, __tsan_switch_to_fiber_no_sync);
#elif defined(__SANITIZE_ADDRESS__)
  const bool main = to == &block->scheduler;
  __sanitizer_start_switch_fiber(&from->sanitizer, main ? main_stack : to->stack.get(),
                                 main ? main_stack_bytes : kStackBytes);
#endif
  swapcontext(&from->context, &to->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from->sanitizer, nullptr, nullptr);
#endif
}

UASPARSE_UNSEEN inline void wait(Barrier& barrier) {
  char* const order = &barrier.order[barrier.generation % 2];
  happens_before(order);
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    current->waits_for = &barrier;
    current->generation = barrier.generation;
    switch_to(&block->scheduler);
    current->waits_for = nullptr;
  }
  happens_after(order);
}

// A fibre's life: one block after another. Sanitizers take long to make a fibre, so they are kept for the next launch.
UASPARSE_UNSEEN inline void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
#endif
  for (;;) {
    happens_after(block);
    block->kernel();
    current->done = true;
    happens_before(block);
    switch_to(&block->scheduler);
  }
}

inline void make_fibers(unsigned count) {
#if defined(__SANITIZE_THREAD__)
  block->scheduler.sanitizer = __tsan_get_current_fiber();
#endif
  current = &block->scheduler;
  while (block->fibers.size() < count) {
    Fiber& fiber = *block->fibers.emplace_back(std::make_unique<Fiber>());
    fiber.thread = dim3(static_cast<unsigned>(block->fibers.size()) - 1);
    fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, run_fiber, 0);
#if defined(__SANITIZE_THREAD__)
    fiber.sanitizer = __tsan_create_fiber(0);
#endif
  }
}

// Runs one block: fibres that can go on do so, in a random order, until all are done.
UASPARSE_UNSEEN inline void run_block() {
  const unsigned threads = blockDim.x;
  block->barrier = {threads, 0, 0, {}};
  for (Warp& warp : block->warps) warp.barrier = {kWarpSize, 0, 0, {}};
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  if (block->shared_bytes) std::memset(block->shared, 0xff, block->shared_bytes);
  for (const unsigned t : order) {
    block->fibers[t]->done = false;
    block->fibers[t]->waits_for = nullptr;
    block->fibers[t]->copies.clear();
    block->fibers[t]->commits.clear();
  }
  happens_before(block);
  for (unsigned left = threads; left > 0;) {
    bool moved = false;
    for (const unsigned t : order) {
      Fiber& fiber = *block->fibers[t];
      if (fiber.done || (fiber.waits_for && fiber.waits_for->generation == fiber.generation)) continue;
      moved = true;
      switch_to(&fiber);
      left -= fiber.done;
    }
    if (!moved) {
      std::fprintf(stderr, "cuda_emulation: deadlock, some threads wait where others never come\n");
      std::abort();
    }
  }
  happens_after(block);
}

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(block->shared);
}

// Exactly so many bytes, so that AddressSanitizer sees the one after them.
inline void* aligned(size_t bytes) {
  void* at = nullptr;
  return posix_memalign(&at, 128, bytes) == 0 ? at : nullptr;
}

inline unsigned lane() { return current->thread.x % kWarpSize; }

// Gives every lane the values of all: read(slots) after a barrier.
template <typename T, typename Read>
auto exchange(unsigned mask, T value, Read read) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) {
    std::fprintf(stderr, "cuda_emulation: a warp operation needs the full mask\n");
    std::abort();
  }
  Warp& warp = block->warps[current->thread.x / kWarpSize];
  uint64_t* const slots = warp.slots[warp.barrier.generation % 2];
  std::memcpy(&slots[lane()], &value, sizeof value);
  wait(warp.barrier);
  return read([slots](unsigned from) {
    T got;
    std::memcpy(&got, &slots[from], sizeof got);
    return got;
  });
}

}  // namespace emulation

using std::min;

#define threadIdx (emulation::current->thread)

inline void __syncthreads() { emulation::wait(emulation::block->barrier); }
inline void __threadfence() {}  // atomics below are sequentially consistent

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return emulation::exchange(mask, value, [&](auto at) { return at(emulation::lane() ^ static_cast<unsigned>(lane_mask)); });
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulation::exchange(mask, value, [&](auto at) { return at(static_cast<unsigned>(from) % emulation::kWarpSize); });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = emulation::lane();
  return emulation::exchange(mask, value, [&](auto at) { return at(lane >= delta ? lane - delta : lane); });
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return emulation::exchange(mask, static_cast<unsigned>(vote), [](auto at) {
    unsigned bits = 0;
    for (unsigned i = 0; i < emulation::kWarpSize; ++i) bits |= at(i) << i;
    return bits;
  });
}
inline float __expf(float x) { return std::exp(x); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

template <typename T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
template <typename T>
T atomicOr(T* address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_SEQ_CST);
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const unsigned threads = config->blockDim.x, blocks = config->gridDim.x;
  if (threads == 0 || threads > 1024 || threads % emulation::kWarpSize != 0 || blocks == 0) return cudaErrorInvalidValue;
  emulation::make_fibers(threads);
  emulation::block->warps.resize(threads / emulation::kWarpSize);
  emulation::block->kernel = [&] { kernel(arguments...); };
  const std::unique_ptr<void, void (*)(void*)> shared(
      config->dynamicSmemBytes ? emulation::aligned(config->dynamicSmemBytes) : nullptr, std::free);
  emulation::block->shared = shared.get();
  emulation::block->shared_bytes = config->dynamicSmemBytes;
  ::blockDim = config->blockDim;
  ::gridDim = config->gridDim;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), emulation::random);
  for (const unsigned b : order) {
    blockIdx = dim3(b);
    emulation::run_block();
  }
  return cudaSuccess;
}
