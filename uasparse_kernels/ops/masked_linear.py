"""``input @ (weight * mask).T + bias`` for a weight that has a sparsity pattern, in the work of its active entries."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from uasparse_kernels import _library
from uasparse_kernels.ops._common import (
    Choice,
    announce,
    autocast,
    check_layer_arguments,
    dense_form,
    packed_form,
    pattern_tensors,
    reference_weight,
)
from uasparse_kernels.ops._cpu import choose_cpu
from uasparse_kernels.ops._cuda import choose_cuda
from uasparse_kernels.pattern import SparsityPattern


def masked_linear(input: Tensor, weight: Tensor, pattern: SparsityPattern, bias: Tensor | None = None) -> Tensor:
    """Linear layer with a sparse weight.

    Args:
        input: ``[..., in]``, any floating-point dtype; accumulation is in float32 for bfloat16 and float16.
        weight: dense-stored (``[out, in]``, inactive entries zero: the layers keep them so) or packed
            (``pattern.packed_shape``). Its gradient has the same storage.
        pattern: of shape ``[out, in]``.
        bias: ``[out]``.

    Returns:
        ``[..., out]`` of the input's dtype.

    Raises:
        ValueError, TypeError: if shapes, dtypes or devices do not fit.
    """
    input, weight, bias = autocast(input, weight, bias)
    _check(input, weight, pattern, bias)
    choice = choose(input.shape, input.dtype, input.device.type, pattern, packed=pattern.is_packed(weight))
    kernel = announce("masked_linear", choice)
    if kernel == "reference":
        return masked_linear_reference(input, weight, pattern, bias)
    if kernel == "dense":
        return F.linear(input, dense_form(weight, pattern), bias)
    if kernel in ("triton", "cuda"):
        weight = packed_form(weight, pattern)
    return torch.ops.uasparse.masked_linear(
        input, weight, bias, *pattern_tensors(pattern), pattern.shape, pattern.block
    )


def masked_linear_reference(
    input: Tensor, weight: Tensor, pattern: SparsityPattern, bias: Tensor | None = None
) -> Tensor:
    """What :func:`masked_linear` computes, in plain torch."""
    return F.linear(input, reference_weight(weight, pattern), bias)


def choose(
    input_shape: tuple[int, ...], dtype: torch.dtype, device_type: str, pattern: SparsityPattern, *, packed: bool
) -> Choice:
    """The kernel for a call: "cpu" (compiled, sparse), "triton" (blocks on a GPU), "cuda" (unstructured on a GPU),
    "dense" (the vendor's, on the dense form) or "reference".
    """
    if not _library.has_kernel_for("masked_linear", device_type):
        return Choice("reference", f"no compiled kernel for {device_type}")
    if device_type == "cuda":
        work = math.prod(input_shape[:-1]) * math.prod(pattern.shape)
        return choose_cuda("masked_linear", dtype, pattern, work, packed=packed)
    return choose_cpu("masked_linear", dtype, pattern, math.prod(input_shape[:-1]), packed=packed)


def _check(input: Tensor, weight: Tensor, pattern: SparsityPattern, bias: Tensor | None) -> None:
    if len(pattern.shape) != 2:
        raise ValueError(f"masked_linear: expected a pattern of shape [out, in], got {pattern.shape}.")
    if input.dim() < 1 or input.shape[-1] != pattern.shape[1]:
        raise ValueError(
            f"masked_linear: expected an input [..., {pattern.shape[1]}] for a weight of shape {pattern.shape}, "
            f"got {tuple(input.shape)}."
        )
    check_layer_arguments("masked_linear", input, weight, pattern, bias)


@_library.register_fake("masked_linear")
def _fake(input, weight, bias, crow, col, ccol, row, perm, shape, block):
    return input.new_empty((*input.shape[:-1], shape[0]))


@_library.register_fake("masked_linear_backward")
def _backward_fake(grad_output, input, weight, crow, col, ccol, row, perm, shape, block, output_mask):
    sizes = (input.shape, weight.shape, (shape[0],))
    return tuple(input.new_empty(s if wanted else (0,)) for s, wanted in zip(sizes, output_mask, strict=True))
