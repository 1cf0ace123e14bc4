// The channels of max_pool for one instruction set (isa.h).

#include <utility>

#include "cpu/max_pool.h"

#if defined(__x86_64__)
#define UASPARSE_ISA_AVX512
#include "cpu/isa_begin.h"

#include "cpu/max_pool_impl.h"

#include "cpu/isa_end.h"
#endif
