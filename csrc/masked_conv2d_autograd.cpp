// The derivative of masked_conv2d, for every device. In C++ for the reasons of masked_linear_autograd.cpp.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd.h"

namespace uasparse {
namespace {

using at::IntArrayRef;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor call_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& crow,
                    const Tensor& col, const Tensor& ccol, const Tensor& row, const Tensor& perm, IntArrayRef shape,
                    IntArrayRef block, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("uasparse::masked_conv2d", "")
                             .typed<decltype(call_forward)>();
  return op.call(input, weight, bias, crow, col, ccol, row, perm, shape, block, stride, padding, dilation, groups);
}

std::tuple<Tensor, Tensor, Tensor> call_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                 const Tensor& crow, const Tensor& col, const Tensor& ccol,
                                                 const Tensor& row, const Tensor& perm, IntArrayRef shape,
                                                 IntArrayRef block, IntArrayRef stride, IntArrayRef padding,
                                                 IntArrayRef dilation, int64_t groups,
                                                 std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("uasparse::masked_conv2d_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(grad_output, input, weight, crow, col, ccol, row, perm, shape, block, stride, padding, dilation,
                 groups, output_mask);
}

struct MaskedConv2d : torch::autograd::Function<MaskedConv2d> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Tensor& crow, const Tensor& col, const Tensor& ccol,
                        const Tensor& row, const Tensor& perm, std::vector<int64_t> shape, std::vector<int64_t> block,
                        std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                        int64_t groups) {
    const at::AutoDispatchBelowADInplaceOrView below;
    // Only what some gradient needs is kept alive: the input for the weight's, but its shape and format for its own.
    ctx->save_for_backward({weight.requires_grad() ? input : Tensor(), weight, crow, col, ccol, row, perm});
    ctx->saved_data["input_shape"] = input.sym_sizes();  // symbolic in a graph that is to serve all sizes
    ctx->saved_data["input_format"] = static_cast<int64_t>(input.suggest_memory_format());
    ctx->saved_data["shape"] = shape;
    ctx->saved_data["block"] = block;
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["bias"] = bias.has_value();
    return call_forward(input, weight, bias, crow, col, ccol, row, perm, shape, block, stride, padding, dilation,
                        groups);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto numbers = [&](const char* name) { return ctx->saved_data[name].toIntVector(); };
    const std::array<bool, 3> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                      ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)};
    const Tensor input =
        saved[0].defined()
            ? saved[0]
            : grads[0].new_empty({1}).expand_symint(ctx->saved_data["input_shape"].toSymIntVector());
    auto [grad_input, grad_weight, grad_bias] = recorded_if_asked([&] {
      return call_backward(grads[0], input, saved[1], saved[2], saved[3], saved[4], saved[5], saved[6],
                           numbers("shape"), numbers("block"), numbers("stride"), numbers("padding"),
                           numbers("dilation"), ctx->saved_data["groups"].toInt(), mask);
    });
    variable_list results(14);
    const auto format = static_cast<at::MemoryFormat>(ctx->saved_data["input_format"].toInt());
    if (mask[0]) results[0] = grad_input.contiguous(format);  // copied only where a stand-in could not say it
    if (mask[1]) results[1] = std::move(grad_weight);
    if (mask[2]) results[2] = std::move(grad_bias);
    return results;
  }
};

Tensor masked_conv2d_autograd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                              const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                              const Tensor& perm, IntArrayRef shape, IntArrayRef block, IntArrayRef stride,
                              IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  if (!at::GradMode::is_enabled())
    return recorded_if_asked([&] {
      return call_forward(input, weight, bias, crow, col, ccol, row, perm, shape, block, stride, padding, dilation,
                          groups);
    });
  return MaskedConv2d::apply(input, weight, bias, crow, col, ccol, row, perm, shape.vec(), block.vec(), stride.vec(),
                             padding.vec(), dilation.vec(), groups);
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, Autograd, m) {
  m.impl("masked_conv2d", &masked_conv2d_autograd);
}

}  // namespace uasparse
