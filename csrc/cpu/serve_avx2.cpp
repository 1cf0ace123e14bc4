// The kernels of inference for one instruction set (isa.h).

#include "cpu/serve.h"

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>

#define UASPARSE_ISA_AVX2
#include "cpu/isa_begin.h"

#include "cpu/serve_impl.h"
#include "cpu/serve_tokens_impl.h"

#include "cpu/isa_end.h"
#endif
