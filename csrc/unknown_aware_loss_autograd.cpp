// The derivative of unknown_aware_loss, for every device. In C++ because the way through Python costs ~100 us a step, as
// much as the kernels for a hundred classes.
//
// Where a device has unknown_aware_loss_at_once, the forward makes the gradient, for the gradient of the loss that is
// likely, and the first backward puts it right; another backward of the same graph makes its own.

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
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

std::tuple<Tensor, Tensor, Tensor, Tensor> call_at_once(const Tensor& logits, const Tensor& target, const Tensor& alpha,
                                                        double unknown_weight, int64_t reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("uasparse::unknown_aware_loss_at_once", "")
                             .typed<decltype(call_at_once)>();
  return op.call(logits, target, alpha, unknown_weight, reduction);
}

void call_put_right(Tensor grad, const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                    const Tensor& alpha, const Tensor& saved, double unknown_weight, int64_t reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("uasparse::unknown_aware_loss_put_right_", "")
                             .typed<decltype(call_put_right)>();
  op.call(grad, grad_loss, logits, target, alpha, saved, unknown_weight, reduction);
}

// Whether the gradient is made with the loss. What is traced, for a compiler say, stays two ops without side effects.
bool is_made_at_once(const Tensor& logits, int64_t reduction) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("uasparse::unknown_aware_loss_at_once", "");
  return reduction != 0 && logits.requires_grad() && at::GradMode::is_enabled() &&
         op.hasKernelForDispatchKey(logits.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU) &&
         !logits.key_set().has(c10::DispatchKey::Python) && !c10::impl::dispatch_mode_enabled();
}

struct UnknownAwareLoss : torch::autograd::Function<UnknownAwareLoss> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target, const Tensor& alpha,
                               double unknown_weight, int64_t reduction, bool at_once) {
    const at::AutoDispatchBelowADInplaceOrView below;
    Tensor loss, threshold, saved, grad;
    if (at_once) {
      std::tie(loss, threshold, saved, grad) = call_at_once(logits, target, alpha, unknown_weight, reduction);
      ctx->saved_data["grad"] = grad;
    } else {
      std::tie(loss, threshold, saved) = call_forward(logits, target, alpha, unknown_weight, reduction);
    }
    ctx->save_for_backward({logits, target, alpha, saved});
    ctx->mark_non_differentiable({threshold, saved});
    ctx->set_materialize_grads(false);
    ctx->saved_data["unknown_weight"] = unknown_weight;
    ctx->saved_data["reduction"] = reduction;
    return {loss, threshold, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(6);
    if (!grads[0].defined() || !ctx->needs_input_grad(0)) return results;
    const variable_list saved = ctx->get_saved_variables();
    const double unknown_weight = ctx->saved_data["unknown_weight"].toDouble();
    const int64_t reduction = ctx->saved_data["reduction"].toInt();
    const auto made = ctx->saved_data.find("grad");
    if (made != ctx->saved_data.end() && !at::GradMode::is_enabled() && !at::isTensorSubclassLike(grads[0])) {
      results[0] = made->second.toTensor();
      ctx->saved_data.erase(made);  // the next owner may write to it
      const at::AutoDispatchBelowADInplaceOrView below;
      call_put_right(results[0], grads[0], saved[0], saved[1], saved[2], saved[3], unknown_weight, reduction);
      return results;
    }
    const Tensor of_rows = saved[3].size(1) == 2 ? saved[3] : saved[3].narrow(1, 0, 2);
    results[0] = recorded_if_asked([&] {
      return call_backward(grads[0], saved[0], saved[1], saved[2], of_rows, unknown_weight, reduction);
    });
    return results;
  }
};

std::tuple<Tensor, Tensor, Tensor> unknown_aware_loss_autograd(const Tensor& logits, const Tensor& target,
                                                               const Tensor& alpha, double unknown_weight,
                                                               int64_t reduction) {
  const bool at_once = is_made_at_once(logits, reduction);
  const variable_list results = UnknownAwareLoss::apply(logits, target, alpha, unknown_weight, reduction, at_once);
  return {results[0], results[1], results[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, Autograd, m) {
  m.impl("unknown_aware_loss", &unknown_aware_loss_autograd);
}

}  // namespace uasparse
