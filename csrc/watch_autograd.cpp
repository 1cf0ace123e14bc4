// watch: how growth sees an output's gradient inside a compiled graph, which takes no hooks.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/alias.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace uasparse {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void call_capture(const Tensor& mark, const Tensor& input, const Tensor& grad_output) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("uasparse::capture_", "")
                             .typed<void(const Tensor&, const Tensor&, const Tensor&)>();
  op.call(mark, input, grad_output);
}

struct Watch : torch::autograd::Function<Watch> {
  static Tensor forward(AutogradContext* ctx, const Tensor& output, const Tensor& input, const Tensor& mark) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({input, mark});
    return at::alias(output);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::AutoDispatchBelowADInplaceOrView below;
    call_capture(saved[1], saved[0], grads[0]);
    return {grads[0], Tensor(), Tensor()};
  }
};

Tensor watch_autograd(const Tensor& output, const Tensor& input, const Tensor& mark) {
  return Watch::apply(output, input, mark);
}

Tensor watch(const Tensor& output, const Tensor&, const Tensor&) { return at::alias(output); }

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, Autograd, m) { m.impl("watch", &watch_autograd); }
TORCH_LIBRARY_IMPL(uasparse, CompositeExplicitAutograd, m) { m.impl("watch", &watch); }

}  // namespace uasparse
