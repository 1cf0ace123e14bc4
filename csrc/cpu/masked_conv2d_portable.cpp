// The kernels of masked_conv2d for one instruction set (isa.h).

#include "cpu/masked_conv2d.h"

#include <utility>

#include "cpu/isa_begin.h"

#include "cpu/masked_conv2d_impl.h"

#include "cpu/isa_end.h"
