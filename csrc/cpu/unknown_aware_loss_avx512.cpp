// The rows of unknown_aware_loss for one instruction set (isa.h).

#include "cpu/unknown_aware_loss.h"

#if defined(__x86_64__)
#define UASPARSE_ISA_AVX512
#include "cpu/isa_begin.h"

#include "cpu/unknown_aware_loss_impl.h"

#include "cpu/isa_end.h"
#endif
