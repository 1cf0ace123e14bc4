// A small CUDA on the host, so that the tests execute csrc/cuda/*.cu without a GPU, under the sanitizers of g++.
//
// Compile a .cu file as C++ (-x c++ -std=c++20 -pthread) with this folder before CUDA's own on the include path. One
// std::thread runs for each thread of a block, so that ThreadSanitizer sees every access that no barrier, shuffle or
// atomic orders. Blocks run one after another, in a random order that results must not depend on (races between blocks
// are not seen). __shared__ variables are static, between redzones of AddressSanitizer, and keep what the last block
// left. Warps are 32 threads, and warp operations need all of them. What a kernel may use is what is written below: add
// what a new kernel needs.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

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

namespace emulation {

constexpr unsigned kWarpSize = 32;

struct Warp {
  std::barrier<> barrier{kWarpSize};
  uint64_t slots[kWarpSize];
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads), warps(threads / kWarpSize) {}
  std::barrier<> barrier;
  std::vector<Warp> warps;
};

inline thread_local Block* block = nullptr;
inline thread_local unsigned thread = 0;

inline Warp& warp() { return block->warps[thread / kWarpSize]; }
inline unsigned lane() { return thread % kWarpSize; }

// Gives every lane the values of all: read(slots) between two barriers.
template <typename T, typename Read>
auto exchange(unsigned mask, T value, Read read) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) {
    std::fprintf(stderr, "cuda_emulation: a warp operation needs the full mask\n");
    std::abort();
  }
  Warp& w = warp();
  std::memcpy(&w.slots[lane()], &value, sizeof value);
  w.barrier.arrive_and_wait();
  auto result = read([&w](unsigned from) {
    T got;
    std::memcpy(&got, &w.slots[from], sizeof got);
    return got;
  });
  w.barrier.arrive_and_wait();
  return result;
}

}  // namespace emulation

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { emulation::block->barrier.arrive_and_wait(); }
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

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const unsigned threads = config->blockDim.x, blocks = config->gridDim.x;
  if (threads == 0 || threads > 1024 || threads % emulation::kWarpSize != 0 || blocks == 0) return cudaErrorInvalidValue;
  static std::mt19937 random(1);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  const auto shared = std::make_unique<emulation::Block>(threads);
  std::vector<std::thread> team;
  for (unsigned t = 0; t < threads; ++t) {
    team.emplace_back([&, t] {
      emulation::block = shared.get();
      emulation::thread = t;
      threadIdx = dim3(t);
      threadIdx.y = threadIdx.z = 0;
      blockDim = config->blockDim;
      gridDim = config->gridDim;
      for (const unsigned b : order) {
        blockIdx = dim3(b);
        blockIdx.y = blockIdx.z = 0;
        kernel(arguments...);
        __syncthreads();  // the next block gets the shared memory
      }
    });
  }
  for (std::thread& one : team) one.join();
  return cudaSuccess;
}
