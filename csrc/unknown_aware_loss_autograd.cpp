// The derivative of unknown_aware_loss, for every device. In C++ because the way through Python costs ~100 us a step, as
// much as the kernels for a hundred classes.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd.h"

namespace uasparse {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<Tensor, Tensor, Tensor> call_forward(const Tensor& logits, const Tensor& target, const Tensor& alpha,
                                                double unknown_weight, int64_t reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("uasparse::unknown_aware_loss", "")
                             .typed<decltype(call_forward)>();
  return op.call(logits, target, alpha, unknown_weight, reduction);
}

Tensor call_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target, const Tensor& alpha,
                     const Tensor& saved, double unknown_weight, int64_t reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("uasparse::unknown_aware_loss_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(grad_loss, logits, target, alpha, saved, unknown_weight, reduction);
}

struct UnknownAwareLoss : torch::autograd::Function<UnknownAwareLoss> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target, const Tensor& alpha,
                               double unknown_weight, int64_t reduction) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, threshold, saved] = call_forward(logits, target, alpha, unknown_weight, reduction);
    ctx->save_for_backward({logits, target, alpha, saved});
    ctx->mark_non_differentiable({threshold, saved});
    ctx->set_materialize_grads(false);
    ctx->saved_data["unknown_weight"] = unknown_weight;
    ctx->saved_data["reduction"] = reduction;
    return {loss, threshold, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(5);
    if (!grads[0].defined() || !ctx->needs_input_grad(0)) return results;
    const variable_list saved = ctx->get_saved_variables();
    results[0] = recorded_if_asked([&] {
      return call_backward(grads[0], saved[0], saved[1], saved[2], saved[3],
                           ctx->saved_data["unknown_weight"].toDouble(), ctx->saved_data["reduction"].toInt());
    });
    return results;
  }
};

std::tuple<Tensor, Tensor, Tensor> unknown_aware_loss_autograd(const Tensor& logits, const Tensor& target,
                                                               const Tensor& alpha, double unknown_weight,
                                                               int64_t reduction) {
  const variable_list results = UnknownAwareLoss::apply(logits, target, alpha, unknown_weight, reduction);
  return {results[0], results[1], results[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, Autograd, m) {
  m.impl("unknown_aware_loss", &unknown_aware_loss_autograd);
}

}  // namespace uasparse
