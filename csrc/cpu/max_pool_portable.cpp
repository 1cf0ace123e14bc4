// The channels of max_pool for one instruction set (isa.h).

#include <utility>

#include "cpu/max_pool.h"

#include "cpu/isa_begin.h"

#include "cpu/max_pool_impl.h"

#include "cpu/isa_end.h"
