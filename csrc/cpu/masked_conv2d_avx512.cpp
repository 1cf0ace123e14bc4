// The kernels of masked_conv2d for one instruction set (isa.h).

#include "cpu/masked_conv2d.h"

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>

#define UASPARSE_ISA_AVX512
#include "cpu/isa_begin.h"

#include "cpu/masked_conv2d_impl.h"

#include "cpu/isa_end.h"
#endif
