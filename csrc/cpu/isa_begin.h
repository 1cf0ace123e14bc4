// Opens code compiled for the instruction set named by UASPARSE_ISA_AVX2 or UASPARSE_ISA_AVX512, else for the baseline
// (see isa.h).
// With UASPARSE_ISA_BF16 beside the latter also for products of bfloat16 (avx512bf16).
//   UASPARSE_ISA            the namespace of the kernels, uasparse::UASPARSE_ISA
//   UASPARSE_VECTOR_BYTES   width of a vector

#if defined(UASPARSE_ISA_AVX512) && defined(UASPARSE_ISA_BF16)
#define UASPARSE_ISA avx512bf16
#define UASPARSE_VECTOR_BYTES 64
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif
#elif defined(UASPARSE_ISA_AVX512)
#define UASPARSE_ISA avx512
#define UASPARSE_VECTOR_BYTES 64
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#elif defined(UASPARSE_ISA_AVX2)
#define UASPARSE_ISA avx2
#define UASPARSE_VECTOR_BYTES 32
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#else
#define UASPARSE_ISA portable
#define UASPARSE_VECTOR_BYTES 16
#endif
