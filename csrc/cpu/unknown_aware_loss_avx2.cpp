// The rows of the loss for avx2.

#include "unknown_aware_loss.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#endif

namespace uasparse::avx2 {
#define LANES 8
#include "unknown_aware_loss_rows.h"
}  // namespace uasparse::avx2
