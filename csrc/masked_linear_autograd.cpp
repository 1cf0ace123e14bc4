// The derivative of masked_linear, for every device. In C++ because the way through Python costs ~100 us a step, as much
// as the kernels at 99 % sparsity, and makes autograd copy the gradients that it could take over.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd.h"

namespace uasparse {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor call_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& crow,
                    const Tensor& col, const Tensor& ccol, const Tensor& row, const Tensor& perm,
                    at::IntArrayRef shape, at::IntArrayRef block) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("uasparse::masked_linear", "")
                             .typed<decltype(call_forward)>();
  return op.call(input, weight, bias, crow, col, ccol, row, perm, shape, block);
}

std::tuple<Tensor, Tensor, Tensor> call_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                 const Tensor& crow, const Tensor& col, const Tensor& ccol,
                                                 const Tensor& row, const Tensor& perm, at::IntArrayRef shape,
                                                 at::IntArrayRef block, std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("uasparse::masked_linear_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(grad_output, input, weight, crow, col, ccol, row, perm, shape, block, output_mask);
}

// A tensor of the input's shape, the sizes symbolic in a graph that is to serve all of them.
Tensor stand_in(const Tensor& grad_output, int64_t channels) {
  auto shape = grad_output.sym_sizes().vec();
  shape.back() = channels;
  return grad_output.new_empty({1}).expand_symint(shape);
}

struct MaskedLinear : torch::autograd::Function<MaskedLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Tensor& crow, const Tensor& col, const Tensor& ccol,
                        const Tensor& row, const Tensor& perm, std::vector<int64_t> shape,
                        std::vector<int64_t> block) {
    const at::AutoDispatchBelowADInplaceOrView below;
    // Only what some gradient needs is kept alive: the input for the weight's, not for its own.
    ctx->save_for_backward({weight.requires_grad() ? input : Tensor(), weight, crow, col, ccol, row, perm});
    ctx->saved_data["shape"] = shape;
    ctx->saved_data["block"] = block;
    ctx->saved_data["bias"] = bias.has_value();
    return call_forward(input, weight, bias, crow, col, ccol, row, perm, shape, block);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto shape = ctx->saved_data["shape"].toIntVector(), block = ctx->saved_data["block"].toIntVector();
    const std::array<bool, 3> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                      ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)};
    const Tensor input = saved[0].defined() ? saved[0] : stand_in(grads[0], shape[1]);
    auto [grad_input, grad_weight, grad_bias] = recorded_if_asked([&] {
      return call_backward(grads[0], input, saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], shape, block,
                           mask);
    });
    variable_list results(10);
    if (mask[0]) results[0] = std::move(grad_input);
    if (mask[1]) results[1] = std::move(grad_weight);
    if (mask[2]) results[2] = std::move(grad_bias);
    return results;
  }
};

Tensor masked_linear_autograd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                              const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                              const Tensor& perm, at::IntArrayRef shape, at::IntArrayRef block) {
  if (!at::GradMode::is_enabled())
    return recorded_if_asked(
        [&] { return call_forward(input, weight, bias, crow, col, ccol, row, perm, shape, block); });
  return MaskedLinear::apply(input, weight, bias, crow, col, ccol, row, perm, shape.vec(), block.vec());
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, Autograd, m) {
  m.impl("masked_linear", &masked_linear_autograd);
}

}  // namespace uasparse
