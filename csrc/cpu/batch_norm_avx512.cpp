// The channels of batch_norm for one instruction set (isa.h).

#include <utility>

#include "cpu/batch_norm.h"

#if defined(__x86_64__)
#define UASPARSE_ISA_AVX512
#include "cpu/isa_begin.h"

#include "cpu/batch_norm_impl.h"

#include "cpu/isa_end.h"
#endif
