// What the ops' derivatives in C++ share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>

namespace uasparse {

// Calls an op, past autograd where no graph is recorded: under no_grad, and for the gradients of a backward pass unless
// they are to have gradients of their own (create_graph), whose formulas uasparse_kernels/ops/_second.py registers.
template <typename Call>
auto recorded_if_asked(Call call) {
  if (at::GradMode::is_enabled()) return call();
  const at::AutoDispatchBelowADInplaceOrView below;
  return call();
}

}  // namespace uasparse
