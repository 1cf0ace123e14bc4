// The derivatives of batch_norm and batch_norm_relu, for every device, and of a relu_ that comes after one of the former. In
// C++ for the reason that masked_linear's is.

#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/relu.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <exception>

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
                                                              const std::optional<Tensor>& output, const Tensor& saved,
                                                              std::array<bool, 4> output_mask,
                                                              std::optional<double> ceiling) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("uasparse::batch_norm_relu_backward", "")
                             .typed<decltype(call_relu_backward)>();
  return op.call(grad_output, input, weight, output, saved, output_mask, ceiling);
}

std::tuple<Tensor, Tensor, Tensor> call_backward_(const Tensor& grad_output, const Tensor& input,
                                                  const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& output, const Tensor& saved, bool relu,
                                                  std::array<bool, 4> output_mask, std::optional<double> ceiling) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("uasparse::batch_norm_backward_", "")
                             .typed<decltype(call_backward_)>();
  return op.call(grad_output, input, weight, output, saved, relu, output_mask, ceiling);
}

std::optional<Tensor> if_defined(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

// Whether nobody else holds a gradient, so that it may be written over; torch's sums of gradients decide in this way.
bool is_ours(const Tensor& grad) {
  return !at::GradMode::is_enabled() && grad.use_count() == 1 && !at::isTensorSubclassLike(grad) && grad.has_storage() &&
         grad.storage().use_count() == 1 && grad.device().is_cpu() && grad.scalar_type() == at::kFloat &&
         grad.is_contiguous();
}

// The gradients of input, weight, bias and residual, of one batch norm with a ReLU or without.
std::array<Tensor, 4> gradients(const Tensor& grad, const Tensor& input, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& output, const Tensor& saved, bool relu,
                                std::array<bool, 4> mask, std::optional<double> ceiling = std::nullopt) {
  std::array<Tensor, 4> found;
  if ((mask[0] || mask[3]) && is_ours(grad)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    std::tie(found[0], found[1], found[2]) = call_backward_(grad, input, weight, output, saved, relu, mask, ceiling);
    found[mask[3] ? 3 : 0] = grad;
  } else if (relu) {
    std::tie(found[0], found[1], found[2], found[3]) =
        recorded_if_asked([&] { return call_relu_backward(grad, input, weight, output, saved, mask, ceiling); });
  } else {
    std::tie(found[0], found[1], found[2]) =
        recorded_if_asked([&] { return call_backward(grad, input, weight, saved, {mask[0], mask[1], mask[2]}); });
  }
  for (int i = 0; i < 4; ++i)
    if (!mask[i]) found[i] = Tensor();
  return found;
}

struct BatchNorm : torch::autograd::Function<BatchNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, double eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, stats, saved] = call_forward(input, weight, bias, eps);
    ctx->save_for_backward({input, weight.value_or(Tensor()), saved});
    ctx->saved_data["bias"] = bias.has_value();
    ctx->saved_data["hooked"] = at::SavedTensorDefaultHooks::get_hooks().has_value();
    ctx->mark_non_differentiable({stats, saved});
    ctx->set_materialize_grads(false);
    return {output, stats, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(4);
    if (!grads[0].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    const std::array<bool, 3> given = {true, saved[1].defined(), ctx->saved_data["bias"].toBool()};
    std::array<bool, 4> mask = {};
    for (int i = 0, edge = 0; i < 3; ++i)  // what was not given has no edge
      mask[i] = given[i] && ctx->needs_input_grad(edge++);
    auto found = gradients(grads[0], saved[0], if_defined(saved[1]), std::nullopt, saved[2], false, mask);
    std::move(found.begin(), found.begin() + 3, results.begin());
    return results;
  }
};

struct BatchNormRelu : torch::autograd::Function<BatchNormRelu> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, double eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, stats, saved] = call_relu_forward(input, weight, bias, residual, eps);
    ctx->save_for_backward({input, weight.value_or(Tensor()), residual.has_value() ? output : Tensor(), saved});
    ctx->saved_data["bias"] = bias.has_value();
    ctx->mark_non_differentiable({stats, saved});
    ctx->set_materialize_grads(false);
    return {output, stats, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(5);
    if (!grads[0].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    const std::array<bool, 4> given = {true, saved[1].defined(), ctx->saved_data["bias"].toBool(), saved[2].defined()};
    std::array<bool, 4> mask;
    for (int i = 0, edge = 0; i < 4; ++i)  // what was not given has no edge
      mask[i] = given[i] && ctx->needs_input_grad(edge++);
    auto found = gradients(grads[0], saved[0], if_defined(saved[1]), if_defined(saved[2]), saved[3], true, mask);
    std::move(found.begin(), found.end(), results.begin());
    return results;
  }
};

using NodePtr = decltype(torch::autograd::Edge::function);

// What a relu_ takes the place of in the graph: a batch norm, or its sum with a residual.
struct Source {
  variable_list saved;  // by the batch norm
  torch::autograd::edge_list edges;  // to what input, weight, bias and residual come from
};

// Whether a node of the graph has `holders` and no hooks, so that nobody can see the gradients that pass it.
bool is_alone(const NodePtr& node, size_t holders) {
  return static_cast<size_t>(node.use_count()) == holders && node->pre_hooks().empty() && node->post_hooks().empty() &&
         node->tensor_pre_hooks().empty() && node->retains_grad_hooks().empty();
}

// Of y, if its pre-image is nobody's but the graph's. What saved tensors are packed by hooks stays where it is.
std::optional<Source> source_of(const Tensor& y) {
  using torch::autograd::Edge;
  if (!at::GradMode::is_enabled() || !y.requires_grad() || y.is_view() || y.output_nr() != 0) return std::nullopt;
  const NodePtr& last = y.grad_fn();
  if (last == nullptr || !is_alone(last, 1)) return std::nullopt;
  auto* norm = dynamic_cast<torch::autograd::CppNode<BatchNorm>*>(&*last);
  Edge residual;
  const bool adds = norm == nullptr;
  if (adds) {
    // The sum of a batch norm and something, which is scaled and summed as the addition has it.
    if (last->num_outputs() != 2 || last->next_edge(0).function == nullptr || last->name() != "AddBackward0")
      return std::nullopt;
    const NodePtr& first = last->next_edge(0).function;
    norm = dynamic_cast<torch::autograd::CppNode<BatchNorm>*>(&*first);
    if (norm == nullptr || !is_alone(first, 1) || last->next_edge(0).input_nr != 0 || y.scalar_type() != at::kFloat ||
        !norm->input_metadata(0).is_same_shape(y))
      return std::nullopt;
  }
  if (norm->ctx_.saved_data["hooked"].toBool() || at::SavedTensorDefaultHooks::get_hooks().has_value())
    return std::nullopt;
  Source source{{}, torch::autograd::edge_list(4)};
  try {
    source.saved = norm->ctx_.get_saved_variables();
  } catch (const std::exception&) {
    return std::nullopt;  // freed, or changed since: an error for a backward, should there be one
  }
  const std::array<bool, 3> given = {true, source.saved[1].defined(), norm->ctx_.saved_data["bias"].toBool()};
  for (int i = 0, edge = 0; i < 3; ++i)
    if (given[i]) source.edges[i] = norm->next_edge(edge++);
  if (adds && last->next_edge(1).is_valid()) {
    source.edges[3] = Edge(last, 0);
    last->next_edges()[0] = Edge();  // set_next_edge() refuses where somebody, gone since, had read the sum
  }
  return source;
}

Tensor& relu_below(Tensor& y, std::optional<double> ceiling) {
  TORCH_CHECK_VALUE(!ceiling.has_value() || *ceiling > 0, "Expected a positive ceiling, got ", ceiling.value_or(0), ".");
  return ceiling.has_value() ? at::hardtanh_(y, 0, *ceiling) : at::relu_(y);
}

// A ReLU, the addition before it if there is one, and the batch norm before that, as one in the backward. Its gate is the
// ReLU's output, as torch's is: a write that autograd does not see (y.data, no_grad) may have changed what the batch norm gave.
struct ReluAfterBatchNorm : torch::autograd::Function<ReluAfterBatchNorm> {
  static Tensor forward(AutogradContext* ctx, Tensor y, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Source& source, std::optional<double> ceiling) {
    const at::AutoDispatchBelowADInplaceOrView below;
    relu_below(y, ceiling);
    ctx->saved_data["ceiling"] = ceiling;
    ctx->mark_dirty({y});
    ctx->save_for_backward({source.saved[0], source.saved[1], y, source.saved[2]});
    ctx->set_materialize_grads(false);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(7);
    if (!grads[0].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    std::array<bool, 4> mask;
    for (int i = 0; i < 4; ++i) mask[i] = ctx->needs_input_grad(1 + i);
    auto found = gradients(grads[0], saved[0], if_defined(saved[1]), if_defined(saved[2]), saved[3], true, mask,
                           ctx->saved_data["ceiling"].toOptional<double>());
    std::move(found.begin(), found.end(), results.begin() + 1);
    return results;
  }
};

Tensor& relu_autograd_(Tensor& y, std::optional<double> ceiling) {
  const std::optional<Source> source = source_of(y);
  if (!source.has_value()) return relu_below(y, ceiling);
  std::array<Tensor, 4> ends;  // with the edges of input, weight, bias and residual
  for (int i = 0; i < 4; ++i) {
    ends[i] = at::empty({0}, y.options());
    if (source->edges[i].is_valid()) torch::autograd::impl::set_gradient_edge(ends[i], source->edges[i]);
  }
  y.detach_();
  ReluAfterBatchNorm::apply(y, ends[0], ends[1], ends[2], ends[3], *source, ceiling);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_autograd(const Tensor& input, const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& bias, double eps) {
  const variable_list results = BatchNorm::apply(input, weight, bias, eps);
  return {results[0], results[1], results[2]};
}

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
  m.impl("relu_", &relu_autograd_);
}

TORCH_LIBRARY_IMPL(uasparse, CompositeExplicitAutograd, m) { m.impl("relu_", &relu_below); }

}  // namespace uasparse
