// The rows of the loss for portable.

#include "unknown_aware_loss.h"

namespace uasparse::portable {
#define LANES 4
#include "unknown_aware_loss_rows.h"
}  // namespace uasparse::portable
