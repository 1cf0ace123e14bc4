// The derivatives of batch_norm and batch_norm_relu, for every device. In C++ for the reason that masked_linear's is.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd.h"

namespace uasparse {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<Tensor, Tensor, Tensor> call_forward(const Tensor& input, const std::optional<Tensor>& weight,
                                                const std::optional<Tensor>& bias, double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("uasparse::batch_norm", "").typed<decltype(call_forward)>();
  return op.call(input, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> call_backward(const Tensor& grad_output, const Tensor& input,
                                                 const std::optional<Tensor>& weight, const Tensor& saved,
                                                 std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("uasparse::batch_norm_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(grad_output, input, weight, saved, output_mask);
}

struct BatchNorm : torch::autograd::Function<BatchNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, double eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, stats, saved] = call_forward(input, weight, bias, eps);
    ctx->save_for_backward({input, weight.value_or(Tensor()), saved});
    ctx->saved_data["bias"] = bias.has_value();
    ctx->mark_non_differentiable({stats, saved});
    ctx->set_materialize_grads(false);
    return {output, stats, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(4);
    if (!grads[0].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    const std::optional<Tensor> weight = saved[1].defined() ? std::optional<Tensor>(saved[1]) : std::nullopt;
    const std::array<bool, 3> given = {true, weight.has_value(), ctx->saved_data["bias"].toBool()};
    std::array<bool, 3> mask;
    for (int i = 0, edge = 0; i < 3; ++i)  // what was not given has no edge
      mask[i] = given[i] && ctx->needs_input_grad(edge++);
    auto [grad_input, grad_weight, grad_bias] =
        recorded_if_asked([&] { return call_backward(grads[0], saved[0], weight, saved[2], mask); });
    if (mask[0]) results[0] = std::move(grad_input);
    if (mask[1]) results[1] = std::move(grad_weight);
    if (mask[2]) results[2] = std::move(grad_bias);
    return results;
  }
};

std::tuple<Tensor, Tensor, Tensor> batch_norm_autograd(const Tensor& input, const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& bias, double eps) {
  const variable_list results = BatchNorm::apply(input, weight, bias, eps);
  return {results[0], results[1], results[2]};
}

std::tuple<Tensor, Tensor, Tensor> call_relu_forward(const Tensor& input, const std::optional<Tensor>& weight,
                                                     const std::optional<Tensor>& bias,
                                                     const std::optional<Tensor>& residual, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("uasparse::batch_norm_relu", "")
                             .typed<decltype(call_relu_forward)>();
  return op.call(input, weight, bias, residual, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> call_relu_backward(const Tensor& grad_output, const Tensor& input,
                                                              const std::optional<Tensor>& weight,
                                                              const std::optional<Tensor>& bias,
                                                              const std::optional<Tensor>& output, const Tensor& saved,
                                                              std::array<bool, 4> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("uasparse::batch_norm_relu_backward", "")
                             .typed<decltype(call_relu_backward)>();
  return op.call(grad_output, input, weight, bias, output, saved, output_mask);
}

std::optional<Tensor> if_defined(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

struct BatchNormRelu : torch::autograd::Function<BatchNormRelu> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, double eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, stats, saved] = call_relu_forward(input, weight, bias, residual, eps);
    ctx->save_for_backward({input, weight.value_or(Tensor()), bias.value_or(Tensor()),
                            residual.has_value() ? output : Tensor(), saved});
    ctx->mark_non_differentiable({stats, saved});
    ctx->set_materialize_grads(false);
    return {output, stats, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(5);
    if (!grads[0].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    std::array<bool, 4> mask;
    for (int i = 0, edge = 0; i < 4; ++i)  // what was not given has no edge
      mask[i] = saved[i].defined() && ctx->needs_input_grad(edge++);
    auto [grad_input, grad_weight, grad_bias, grad_residual] = recorded_if_asked([&] {
      return call_relu_backward(grads[0], saved[0], if_defined(saved[1]), if_defined(saved[2]), if_defined(saved[3]),
                                saved[4], mask);
    });
    if (mask[0]) results[0] = std::move(grad_input);
    if (mask[1]) results[1] = std::move(grad_weight);
    if (mask[2]) results[2] = std::move(grad_bias);
    if (mask[3]) results[3] = std::move(grad_residual);
    return results;
  }
};

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_autograd(const Tensor& input, const std::optional<Tensor>& weight,
                                                            const std::optional<Tensor>& bias,
                                                            const std::optional<Tensor>& residual, double eps) {
  const variable_list results = BatchNormRelu::apply(input, weight, bias, residual, eps);
  return {results[0], results[1], results[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, Autograd, m) {
  m.impl("batch_norm", &batch_norm_autograd);
  m.impl("batch_norm_relu", &batch_norm_relu_autograd);
}

}  // namespace uasparse
