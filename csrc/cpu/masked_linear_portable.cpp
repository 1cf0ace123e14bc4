// The kernels of masked_linear for one instruction set (isa.h).

#include "cpu/masked_linear.h"

#include <utility>

#include "cpu/isa_begin.h"

#include "cpu/masked_linear_impl.h"

#include "cpu/isa_end.h"
