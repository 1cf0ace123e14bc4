"""Batch norm of ``[N, C, ...]``, with a kernel for training on a CPU of contiguous float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uasparse_kernels import _library
from uasparse_kernels.ops._common import Choice, announce, transformed
from uasparse_kernels.ops._second import register_recomputed


def batch_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm``, its arguments in the order of ``torch.batch_norm``.

    In training ``y = weight * (x - mean) / sqrt(var + eps) + bias``, mean and (biased) variance taken for each channel
    over images and pixels; ``running += momentum * (batch - running)`` for both, of the unbiased variance. In
    evaluation the running statistics take their place.

    Args:
        input: ``[N, C, ...]``.
        weight, bias: ``[C]``, or None: ones and zeros.
        running_mean, running_var: ``[C]``, updated in place in training, or None; both or none.

    Raises:
        ValueError: in training, for one value per channel.
        RuntimeError: if shapes or dtypes do not fit.
    """
    # A bad eps is torch's to refuse.
    choice = choose(input, weight, bias, running_mean, running_var) if training and eps > 0 else None
    kernel = "torch" if choice is None else announce("batch_norm", choice)
    if kernel == "reference":
        return batch_norm_reference(input, weight, bias, running_mean, running_var, training, momentum, eps)
    if kernel != "cpu":
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    output, stats, _ = torch.ops.uasparse.batch_norm.default(input, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        torch._foreach_lerp_([running_mean, running_var], list(stats.unbind()), momentum)
    return output


def batch_norm_relu(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """``relu(batch_norm(input, ...) + residual)`` in the passes over memory of a batch norm alone.

    The backward gates the gradient while it takes its sums, so no map is read or written for the ReLU; with a residual
    its gradient is written on the way. Where our kernel does not serve, torch's do the same.

    Args:
        input ... eps: as of :func:`batch_norm`.
        residual: of the input's shape, added before the ReLU.

    Raises:
        ValueError: in training, for one value per channel; for a residual of another shape.
        RuntimeError: as :func:`batch_norm`.
    """
    if residual is not None and residual.shape != input.shape:
        raise ValueError(
            f"batch_norm_relu: expected a residual of the input's shape {tuple(input.shape)}, got "
            f"{tuple(residual.shape)}; expand or project it first."
        )
    choice = choose(input, weight, bias, running_mean, running_var) if training else None
    fits = residual is None or (residual.dtype == torch.float32 and residual.device == input.device)
    if choice is None or choice.kernel != "cpu" or not fits or announce("batch_norm", choice) != "cpu":
        output = batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)
        return F.relu(output if residual is None else output + residual)
    output, stats, _ = torch.ops.uasparse.batch_norm_relu.default(input, weight, bias, residual, eps)
    if running_mean is not None and running_var is not None:
        torch._foreach_lerp_([running_mean, running_var], list(stats.unbind()), momentum)
    return output


def batch_norm_reference(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """What :func:`batch_norm` computes, in plain torch; differentiable."""
    dims = [0, *range(2, input.dim())]
    shape = [1, -1] + [1] * (input.dim() - 2)
    if training:
        mean, var = input.mean(dims), input.var(dims, correction=0)
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean, momentum)
            if running_var is not None:
                running_var.lerp_(input.var(dims), momentum)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean, running_var
    output = (input - mean.view(shape)) / (var.view(shape) + eps).sqrt()
    if weight is not None:
        output = output * weight.view(shape)
    return output if bias is None else output + bias.view(shape)


def choose(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> Choice:
    """The kernel for a call in training: "cpu" (compiled) or "torch"."""
    if input.device.type != "cpu" or not _library.has_kernel("batch_norm", input):
        return Choice("torch", f"no compiled kernel for {input.device.type}")
    if transformed() is not None:
        return Choice("torch", "inside a torch.func transform or forward-mode AD")
    if input.dim() < 2 or input.numel() <= input.shape[1]:
        return Choice("torch", "no more than one value per channel")
    if input.numel() == input.shape[0] * input.shape[1]:
        return Choice("torch", "one pixel: contiguous is channels_last, where torch is fast")
    if (running_mean is None) != (running_var is None):
        return Choice("torch", "one of two running statistics")
    for tensor in (input, weight, bias, running_mean, running_var):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32:
            return Choice("torch", f"no kernel for {tensor.dtype}")
        if not tensor.is_contiguous():
            return Choice("torch", "not contiguous: torch is as fast in channels_last")
        if tensor is not input and (tensor.shape != input.shape[1:2] or tensor.device != input.device):
            return Choice("torch", "parameters that do not fit: torch says how")
    return Choice("cpu", "contiguous float32")


@_library.register_fake("batch_norm")
def _fake(input, weight, bias, eps):
    channels = input.shape[1]
    return (
        torch.empty_like(input, memory_format=torch.contiguous_format),
        input.new_empty((2, channels)),
        input.new_empty((3, channels), dtype=torch.float64),
    )


@_library.register_fake("batch_norm_backward")
def _backward_fake(grad_output, input, weight, saved, output_mask):
    sizes = (input.shape, input.shape[1:2], input.shape[1:2])
    return tuple(input.new_empty(s if wanted else (0,)) for s, wanted in zip(sizes, output_mask, strict=True))


@_library.register_fake("batch_norm_relu")
def _relu_fake(input, weight, bias, residual, eps):
    return _fake(input, weight, bias, eps)


@_library.register_fake("batch_norm_relu_backward")
def _relu_backward_fake(grad_output, input, weight, output, saved, output_mask, ceiling=None):
    sizes = (input.shape, input.shape[1:2], input.shape[1:2], input.shape)
    return tuple(input.new_empty(s if wanted else (0,)) for s, wanted in zip(sizes, output_mask, strict=True))


@_library.register_fake("batch_norm_backward_")
def _backward_in_place_fake(grad_output, input, weight, output, saved, relu, output_mask, ceiling=None):
    sizes = (input.shape, input.shape[1:2], input.shape[1:2])
    asked = (output_mask[0] and output_mask[3], *output_mask[1:3])
    return tuple(input.new_empty(s if wanted else (0,)) for s, wanted in zip(sizes, asked, strict=True))


def _gradients(grad_output, input, weight, saved, output_mask):
    """What batch_norm_backward gives, in differentiable torch and float64."""
    return _gradients_of(grad_output.double(), input, weight, saved)[:3]


def _relu_gradients(grad_output, input, weight, output, saved, output_mask, ceiling=None):
    """What batch_norm_relu_backward gives. Where a gradient passes does not depend on anything, up to a set of measure
    zero."""
    with torch.no_grad():
        if output is None:
            output = _normal(input, saved)
            shape = [1, -1] + [1] * (input.dim() - 2)
            output = output if weight is None else output * weight.view(shape)
            output = output + saved[2].view(shape)
    closed = output <= 0 if ceiling is None else (output <= 0) | (output >= ceiling)
    gated = torch.where(closed, 0, grad_output.double())
    return *_gradients_of(gated, input, weight, saved)[:3], gated.to(input.dtype)


def _gradients_of(grad_output, input, weight, saved):
    shape = [1, -1] + [1] * (input.dim() - 2)
    dims = [0, *range(2, input.dim())]
    output = normal = _normal(input, saved)
    wanted = [input]
    if weight is not None:
        output = normal * weight.view(shape)
        wanted.append(weight)
    grads = torch.autograd.grad(output, wanted, grad_output, create_graph=True)
    grad_weight = grads[1] if weight is not None else None
    return grads[0], grad_weight, grad_output.sum(dims).to(input.dtype)


def _normal(input, saved):
    """The input of mean 0 and variance 1, differentiable; ``eps`` is what the saved deviation has over the variance."""
    shape = [1, -1] + [1] * (input.dim() - 2)
    dims = [0, *range(2, input.dim())]
    input = input.double()
    var = input.var(dims, correction=0)
    eps = saved[1].detach().pow(-2) - var.detach()
    return (input - input.mean(dims).view(shape)) * (var + eps).rsqrt().view(shape)


register_recomputed("batch_norm_backward", _gradients)
register_recomputed("batch_norm_relu_backward", _relu_gradients)
