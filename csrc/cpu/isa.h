// Which instruction set the CPU kernels use: the best one that this CPU has, or what UASPARSE_CPU_ISA names
// (portable, avx2 or avx512; one that the CPU lacks is not taken).
#pragma once

#include <cstdlib>
#include <cstring>

namespace uasparse {

enum class Isa { portable, avx2, avx512 };

inline Isa cpu_isa() {
  static const Isa chosen = [] {
    Isa best = Isa::portable;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = Isa::avx512;
#endif
    const char* wanted = std::getenv("UASPARSE_CPU_ISA");
    if (wanted == nullptr) return best;
    if (std::strcmp(wanted, "portable") == 0) return Isa::portable;
    if (std::strcmp(wanted, "avx2") == 0 && best == Isa::avx512) return Isa::avx2;
    return best;
  }();
  return chosen;
}

}  // namespace uasparse
