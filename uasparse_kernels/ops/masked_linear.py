"""``input @ (weight * mask).T + bias`` for a weight that has a sparsity pattern, in the work of its active entries."""

from __future__ import annotations

import math
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from uasparse_kernels import _library
from uasparse_kernels.ops._common import (
    Choice,
    announce,
    autocast,
    check_layer_arguments,
    check_sparse_product,
    dense_form,
    packed_form,
    pattern_tensors,
    reference_weight,
    transformed,
)
from uasparse_kernels.ops._cpu import choose_cpu
from uasparse_kernels.ops._cuda import choose_cuda
from uasparse_kernels.ops._dense import linear
from uasparse_kernels.ops._second import register_bilinear
from uasparse_kernels.pattern import SparsityPattern

SHORT_BATCH, SHORT_COLUMNS = 8, 2**16  # what the CPU's kernel for few inputs takes, and takes with 16-bit columns


def masked_linear(
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    bias: Tensor | None = None,
    *,
    weight_is_masked: bool = False,
) -> Tensor:
    """Linear layer with a sparse weight.

    Args:
        input: ``[..., in]``, any floating-point dtype; accumulation is in float32 for bfloat16 and float16.
        weight: dense-stored (``[out, in]``; inactive entries do not count) or packed (``pattern.packed_shape``). Its
            gradient has the same storage, zero at inactive entries.
        pattern: of shape ``[out, in]``.
        bias: ``[out]``.
        weight_is_masked: says that inactive entries of a dense-stored weight are zero, which spares a pass over it. The
            layers see to it.

    Returns:
        ``[..., out]`` of the input's dtype.

    Raises:
        ValueError, TypeError: if shapes, dtypes or devices do not fit.
    """
    check_sparse_product("masked_linear", input, weight, pattern)
    input, weight, bias = autocast(input, weight, bias)
    packed = _check(input, weight, pattern, bias)
    crow, col, *transposed = pattern_tensors(pattern)
    choice = transformed() or choose(input.shape, input.dtype, input.device.type, pattern, packed=packed)
    kernel = announce("masked_linear", choice)
    if kernel == "reference":
        return masked_linear_reference(input, weight, pattern, bias)
    if kernel == "dense":
        return linear(input, dense_form(weight, pattern, weight_is_masked), bias)
    if kernel in ("triton", "cuda"):
        weight = packed_form(weight, pattern)
    if kernel == "cpu" and not torch.is_grad_enabled() and _is_bound_by_indices(input, weight, pattern):
        col = _short_columns(pattern, col)
    return torch.ops.uasparse.masked_linear.default(
        input, weight, bias, crow, col, *transposed, pattern.shape, pattern.block
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
    if 0 in pattern.shape:
        return Choice("reference", "a weight without entries")
    if device_type == "cuda":
        work = math.prod(input_shape[:-1]) * math.prod(pattern.shape)
        return choose_cuda("masked_linear", dtype, pattern, work, packed=packed)
    return choose_cpu("masked_linear", dtype, pattern, math.prod(input_shape[:-1]), packed=packed)


def _is_bound_by_indices(input: Tensor, weight: Tensor, pattern: SparsityPattern) -> bool:
    """Whether reading values and indices takes most of the time, and columns of 16 bits will do."""
    return (
        not torch.compiler.is_compiling()
        and input.numel() <= SHORT_BATCH * input.shape[-1]
        and pattern.shape[1] <= SHORT_COLUMNS
        and pattern.block == (1, 1)
        and weight.shape != pattern.shape
        and input.dtype in (torch.float32, torch.float64)
        and not torch.jit.is_tracing()
    )


# Per pattern: its `col`, that tensor's version when it was copied, and the low 16 bits of each column. Not kept on the
# pattern, so that it is neither copied nor saved with it.
_short: weakref.WeakKeyDictionary[SparsityPattern, tuple[weakref.ref[Tensor], int, Tensor]] = (
    weakref.WeakKeyDictionary()
)


def _short_columns(pattern: SparsityPattern, col: Tensor) -> Tensor:
    if col.is_inference():  # has no version
        return col
    of, version, short = _short.get(pattern, (None, -1, col))
    if of is None or of() is not col or version != col._version:
        with torch.inference_mode(
            False
        ):  # an inference tensor has no version: its contents would be checked at every call
            short = col.to(torch.int16)
        _short[pattern] = weakref.ref(col), col._version, short
    return short


def _check(input: Tensor, weight: Tensor, pattern: SparsityPattern, bias: Tensor | None) -> bool:
    if len(pattern.shape) != 2:
        raise ValueError(f"masked_linear: expected a pattern of shape [out, in], got {pattern.shape}.")
    if input.dim() < 1 or input.shape[-1] != pattern.shape[1]:
        raise ValueError(
            f"masked_linear: expected an input [..., {pattern.shape[1]}] for a weight of shape {pattern.shape}, "
            f"got {tuple(input.shape)}."
        )
    return check_layer_arguments("masked_linear", input, weight, pattern, bias)


@_library.register_fake("masked_linear")
def _fake(input, weight, bias, crow, col, ccol, row, perm, shape, block):
    return input.new_empty((*input.shape[:-1], shape[0]))


@_library.register_fake("masked_linear_backward")
def _backward_fake(grad_output, input, weight, crow, col, ccol, row, perm, shape, block, output_mask):
    sizes = (input.shape, weight.shape, (shape[0],))
    return tuple(input.new_empty(s if wanted else (0,)) for s, wanted in zip(sizes, output_mask, strict=True))


register_bilinear("masked_linear", channel=-1)
