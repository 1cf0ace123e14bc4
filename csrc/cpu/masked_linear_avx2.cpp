// The kernels of masked_linear for one instruction set (isa.h).

#include "cpu/masked_linear.h"

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>

#define UASPARSE_ISA_AVX2
#include "cpu/isa_begin.h"

#include "cpu/masked_linear_impl.h"

#include "cpu/isa_end.h"
#endif
