// The derivative of max_pool2d: torch's, from the indices of what was taken.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/max_pool2d_with_indices_backward.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace uasparse {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<Tensor, Tensor> call_forward(const Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride,
                                        at::IntArrayRef padding) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("uasparse::max_pool2d", "").typed<decltype(call_forward)>();
  return op.call(input, kernel, stride, padding);
}

struct MaxPool2d : torch::autograd::Function<MaxPool2d> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride,
                               at::IntArrayRef padding) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, indices] = call_forward(input, kernel, stride, padding);
    ctx->save_for_backward({input, indices});
    ctx->saved_data["kernel"] = kernel;
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->mark_non_differentiable({indices});
    ctx->set_materialize_grads(false);
    return {output, indices};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(4);
    if (!grads[0].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    const auto pair = [&](const char* name) { return ctx->saved_data[name].toIntVector(); };
    results[0] = at::max_pool2d_with_indices_backward(grads[0], saved[0], pair("kernel"), pair("stride"), pair("padding"),
                                                      {1, 1}, false, saved[1]);
    return results;
  }
};

std::tuple<Tensor, Tensor> max_pool2d_autograd(const Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride,
                                               at::IntArrayRef padding) {
  const variable_list results = MaxPool2d::apply(input, kernel, stride, padding);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, Autograd, m) { m.impl("max_pool2d", &max_pool2d_autograd); }

}  // namespace uasparse
