// The rows of the loss for avx512.

#include "unknown_aware_loss.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

namespace uasparse::avx512 {
#define LANES 16
#include "unknown_aware_loss_rows.h"
}  // namespace uasparse::avx512
