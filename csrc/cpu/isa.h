// Which instruction set the CPU kernels use, decided once, at run time.
//
// A kernel source <op>_impl.h is compiled once for each instruction set, in the small files <op>_portable.cpp,
// <op>_avx2.cpp and <op>_avx512.cpp, between isa_begin.h and isa_end.h. Such a file includes every other header BEFORE
// isa_begin.h and none of ATen: an inline function of a shared header that is compiled for AVX-512 could be the copy
// that the linker keeps for everyone.
//
// The environment variable UASPARSE_CPU_ISA=portable|avx2|avx512 forces one (CI runs the tests with each); asking for
// one that the machine lacks is an error.
#pragma once

namespace uasparse {

enum class Isa { portable, avx2, avx512 };

// The forced or else the best instruction set. Throws std::runtime_error for a value that is unknown or not supported.
Isa cpu_isa();
// Whether it multiplies pairs of bfloat16 too (AVX512-BF16).
bool has_bf16_pairs();
const char* isa_name(Isa isa);

}  // namespace uasparse
