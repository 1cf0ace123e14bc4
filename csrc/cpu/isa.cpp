#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace uasparse {
namespace {

bool supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::portable: return true;
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::portable;
}

Isa decide() {
  constexpr Isa all[] = {Isa::avx512, Isa::avx2, Isa::portable};
  const char* forced = std::getenv("UASPARSE_CPU_ISA");
  for (Isa isa : all) {
    if (forced == nullptr || *forced == '\0') {
      if (supported(isa)) return isa;
    } else if (std::string(forced) == isa_name(isa)) {
      if (supported(isa)) return isa;
      throw std::runtime_error(std::string("UASPARSE_CPU_ISA=") + forced +
                               ": this machine lacks it; unset the variable or choose a lower one.");
    }
  }
  throw std::runtime_error(std::string("UASPARSE_CPU_ISA: expected portable, avx2 or avx512, got '") + forced + "'.");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

Isa cpu_isa() {
  static const Isa isa = decide();
  return isa;
}

bool has_bf16_pairs() {
#if defined(__x86_64__)
  static const bool has = cpu_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

}  // namespace uasparse
