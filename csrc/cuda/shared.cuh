// Shared memory of a size that the launch gives, and reads of it by 32-bit addresses: through pointers, nvcc works the
// window of shared memory out anew for every read. The emulation (python_tests/cuda_emulation) has pointers only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace uasparse {

// N neighbouring words, read at once.
template <int N>
struct alignas(4 * N) Words {
  uint32_t at[N];
};

#ifdef __CUDACC__

#define UASPARSE_DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) type name[]

using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* at) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(at));
}

template <int N>
__device__ __forceinline__ Words<N> read_shared(SharedAddress at) {
  Words<N> w;
  if constexpr (N == 4)
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3])
                 : "r"(at)
                 : "memory");
  else if constexpr (N == 2)
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(w.at[0]), "=r"(w.at[1]) : "r"(at) : "memory");
  else
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w.at[0]) : "r"(at) : "memory");
  return w;
}

#else

#define UASPARSE_DYNAMIC_SHARED(type, name) type* const name = emulation::dynamic_shared<type>()

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* at) { return reinterpret_cast<SharedAddress>(at); }

template <int N>
Words<N> read_shared(SharedAddress at) {
  return *reinterpret_cast<const Words<N>*>(at);
}

#endif

}  // namespace uasparse
