// The channels of batch_norm for one instruction set (isa.h).

#include <utility>

#include "cpu/batch_norm.h"

#include "cpu/isa_begin.h"

#include "cpu/batch_norm_impl.h"

#include "cpu/isa_end.h"
