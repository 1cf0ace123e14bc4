// Closes what isa_begin.h opened.

#if defined(UASPARSE_ISA_AVX512) || defined(UASPARSE_ISA_AVX2)
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#undef UASPARSE_ISA
#undef UASPARSE_VECTOR_BYTES
