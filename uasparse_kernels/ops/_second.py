"""Derivatives of the ops' backward ops: what Hessians and gradient penalties need.

A backward pass comes here only if its gradients are to have gradients (``create_graph=True``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uasparse_kernels import _library


def register_bilinear(op: str, channel: int) -> None:
    """Of a product ``y = op(x, w, bias, ...)``, linear in x and in w.

    Its derivatives are the same three products again. With cotangents X, W, B of the gradients of x, w and the bias:
    that of dy is ``op(X, w) + op(x, W) + B``, that of x the input's gradient for dy and W, that of w the weight's
    gradient for dy and X.

    Args:
        channel: the dimension of ``y`` that the bias is added along.
    """

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:8])
        ctx.options = inputs[8:-1]

    def backward(ctx, of_input, of_weight, of_bias):
        grad_output, input, weight, *index = ctx.saved_tensors
        product, products = getattr(torch.ops.uasparse, op), getattr(torch.ops.uasparse, f"{op}_backward")
        rest = (*index, *ctx.options)
        wants_grad_output, wants_input, wants_weight = ctx.needs_input_grad[:3]
        terms, results = [], [None, None, None]
        if wants_grad_output:
            if of_input is not None:
                terms.append(product(of_input, weight, None, *rest))
            if of_weight is not None:
                terms.append(product(input, of_weight, None, *rest))
            if of_bias is not None:
                terms.append(of_bias.view(-1, *[1] * (-1 - channel)).expand_as(grad_output))
            results[0] = sum(terms[1:], start=terms[0]) if terms else None
        if wants_input and of_weight is not None:
            results[1] = products(grad_output, input, of_weight, *rest, [True, False, False])[0]
        if wants_weight and of_input is not None:
            results[2] = products(grad_output, of_input, weight, *rest, [False, True, False])[1]
        return (*results, *[None] * (6 + len(ctx.options)))

    _library.register_autograd(f"{op}_backward", backward, setup)


def register_recomputed(op: str, gradients: Callable[..., tuple[Tensor | None, ...]]) -> None:
    """Of a backward op whose results ``gradients``, of the same arguments, computes in differentiable torch.

    ``gradients`` may take derivatives itself: its floating-point tensors require gradients, and depend on nothing.
    """

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.others = [value for value in inputs if not isinstance(value, Tensor)]

    def backward(ctx, *cotangents):
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        inputs: list[Any] = [next(tensors if is_tensor else others) for is_tensor in ctx.is_tensor]
        with torch.enable_grad():
            # Aliases: a gradient must not flow from one argument on into another that it came from.
            inputs = [_alias(value) if _is_differentiable(value) else value for value in inputs]
            results = gradients(*inputs)
        pairs = [
            (result, cotangent)
            for result, cotangent in zip(results, cotangents, strict=True)
            if result is not None and cotangent is not None and result.requires_grad
        ]
        wanted = [place for place, wants in enumerate(ctx.needs_input_grad) if wants]
        found: list[Tensor | None] = [None] * len(inputs)
        if pairs:
            outputs, grads = zip(*pairs, strict=True)
            sources = [inputs[place] for place in wanted]
            graph = torch.is_grad_enabled()
            parts = torch.autograd.grad(outputs, sources, grads, create_graph=graph, allow_unused=True)
            for place, part in zip(wanted, parts, strict=True):
                found[place] = part
        return tuple(found)

    _library.register_autograd(op, backward, setup)


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
