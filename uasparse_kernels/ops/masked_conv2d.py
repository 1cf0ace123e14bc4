"""2-D convolution with a weight that has a sparsity pattern, in the work of its active entries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from uasparse_kernels import _library
from uasparse_kernels.ops._common import (
    Choice,
    announce,
    as_pair,
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
from uasparse_kernels.ops._second import register_bilinear
from uasparse_kernels.pattern import SparsityPattern

IntPair = int | Sequence[int]


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    weight_is_masked: bool = False,
) -> Tensor:
    """Convolution with a sparse weight; the arguments are those of ``torch.nn.functional.conv2d``.

    Args:
        input: ``[N, C, H, W]`` (contiguous or channels_last) or ``[C, H, W]``, any floating-point dtype; accumulation
            is in float32 for bfloat16 and float16.
        weight: dense-stored (``[out, C / groups, kh, kw]``; inactive entries do not count) or packed
            (``pattern.packed_shape``). Its gradient has the same storage, zero at inactive entries.
        pattern: of shape ``[out, C / groups, kh, kw]``; its block rows must not cross groups.
        bias: ``[out]``.
        stride, dilation: a number, or one for height and width. padding: likewise, or "same" or "valid".
        weight_is_masked: as for ``masked_linear``.

    Returns:
        ``[N, out, H', W']`` (``[out, H', W']``) of the input's dtype.

    Raises:
        ValueError, TypeError: if shapes, dtypes or devices do not fit.
    """
    check_sparse_product("masked_conv2d", input, weight, pattern)
    input, weight, bias = autocast(input, weight, bias)
    stride, dilation = as_pair(stride), as_pair(dilation)
    if isinstance(padding, str):
        input, padding = _pad_by_name(input, padding, pattern.shape, stride, dilation)
    padding = as_pair(padding)
    if input.dim() == 3:
        options = {"weight_is_masked": weight_is_masked}
        batch = input.unsqueeze(0)
        return masked_conv2d(batch, weight, pattern, bias, stride, padding, dilation, groups, **options).squeeze(0)
    _check(input, weight, pattern, bias, stride, padding, dilation, groups)
    tensors = pattern_tensors(pattern)
    choice = transformed() or choose(
        input.shape,
        input.dtype,
        input.device.type,
        pattern,
        packed=pattern.is_packed(weight),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    kernel = announce("masked_conv2d", choice)
    if kernel == "reference":
        return masked_conv2d_reference(input, weight, pattern, bias, stride, padding, dilation, groups)
    if kernel == "dense":
        if _is_quicker_dilated(input, pattern):
            dilation = (2, 2)
        return F.conv2d(input, dense_form(weight, pattern, weight_is_masked), bias, stride, padding, dilation, groups)
    if kernel in ("triton", "cuda"):
        weight = packed_form(weight, pattern)
    return torch.ops.uasparse.masked_conv2d.default(
        input,
        weight,
        bias,
        *tensors,
        pattern.shape,
        pattern.block,
        stride,
        padding,
        dilation,
        groups,
    )


def masked_conv2d_reference(
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """What :func:`masked_conv2d` computes, in plain torch."""
    return F.conv2d(input, reference_weight(weight, pattern), bias, stride, padding, dilation, groups)


def choose(
    input_shape: tuple[int, ...],
    dtype: torch.dtype,
    device_type: str,
    pattern: SparsityPattern,
    *,
    packed: bool,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Choice:
    """The kernel for a call: "cpu" (compiled, sparse), "triton" (blocks on a GPU), "cuda" (unstructured 1x1 kernels on
    a GPU), "dense" (the vendor's, on the dense form) or "reference".
    """
    if not _library.has_kernel_for("masked_conv2d", device_type):
        return Choice("reference", f"no compiled kernel for {device_type}")
    if 0 in pattern.shape:
        return Choice("reference", "a weight without entries")
    if device_type == "cuda" and groups != 1:
        return Choice("dense", "no sparse kernel for groups")
    pixels = input_shape[0] * math.prod(output_size(input_shape, pattern.shape, stride, padding, dilation))
    if device_type == "cuda":
        work = pixels * math.prod(pattern.shape)
        linear = pattern.shape[2:] == (1, 1) and stride == (1, 1) and padding == (0, 0)
        return choose_cuda("masked_conv2d", dtype, pattern, work, packed=packed, linear=linear)
    return choose_cpu("masked_conv2d", dtype, pattern, pixels, packed=packed)


def _is_quicker_dilated(input: Tensor, pattern: SparsityPattern) -> bool:
    """Whether a 1x1 kernel is to be called dilated, which changes nothing that it computes: on one thread and for fewer
    than 16 images torch takes 1x1 kernels from oneDNN for a loop over matmuls, unless dilated. With AVX-512 that is
    half as fast from 64 channels on; with fewer, and with AVX2, it is the faster one."""
    return (
        input.device.type == "cpu"
        and pattern.shape[2:] == (1, 1)
        and min(pattern.shape[:2]) >= 64
        and _library.compiled is not None
        and _library.compiled.cpu_isa() == "avx512"
        and input.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and input.numel() > 20480  # below that torch never takes oneDNN for one image
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
    )


def _pad_by_name(input: Tensor, padding: str, shape, stride, dilation) -> tuple[Tensor, tuple[int, int]]:
    """The input padded where "same" is uneven, and the padding that is left (torch.nn.functional.conv2d)."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same" or stride != (1, 1):
        raise ValueError(
            f'masked_conv2d: expected padding to be numbers, "valid", or "same" with stride 1, got {padding!r} with '
            f"stride {stride}."
        )
    totals = [d * (k - 1) for d, k in zip(dilation, shape[2:], strict=True)]
    uneven = [total % 2 for total in totals]
    if any(uneven):  # torch pads the right and the bottom by one more
        input = F.pad(input, (0, uneven[1], 0, uneven[0]))
    return input, (totals[0] // 2, totals[1] // 2)


def output_size(input_shape, weight_shape, stride, padding, dilation) -> tuple[int, int]:
    """Height and width of a convolution's output (torch.nn.Conv2d, "Shape")."""
    height, width = (
        (input_shape[2 + i] + 2 * padding[i] - dilation[i] * (weight_shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return height, width


def _check(input, weight, pattern, bias, stride, padding, dilation, groups) -> None:
    shape, block = pattern.shape, pattern.block
    if len(shape) != 4:
        raise ValueError(f"masked_conv2d: expected a pattern of shape [out, in / groups, kh, kw], got {shape}.")
    if groups < 1 or shape[0] % groups or (shape[0] // groups) % block[0]:
        raise ValueError(
            f"masked_conv2d: expected groups that divide the output size {shape[0]} into whole blocks of {block[0]} "
            f"rows, got {groups}."
        )
    if input.dim() != 4 or input.shape[1] != shape[1] * groups:
        raise ValueError(
            f"masked_conv2d: expected an input [N, {shape[1] * groups}, H, W] for a weight of shape {shape} and "
            f"{groups} groups, got {tuple(input.shape)}."
        )
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"masked_conv2d: expected stride and dilation >= 1 and padding >= 0, got {stride}, {dilation}, {padding}."
        )
    check_layer_arguments("masked_conv2d", input, weight, pattern, bias)
    if min(output_size(input.shape, shape, stride, padding, dilation)) < 1:
        raise ValueError(
            f"masked_conv2d: the kernel {shape[2:]} with dilation {dilation} is larger than the padded input "
            f"{tuple(s + 2 * p for s, p in zip(input.shape[2:], padding, strict=True))}."
        )


@_library.register_fake("masked_conv2d")
def _fake(input, weight, bias, crow, col, ccol, row, perm, shape, block, stride, padding, dilation, groups):
    height, width = output_size(input.shape, shape, stride, padding, dilation)
    return _empty_like(input, (input.shape[0], shape[0], height, width))


@_library.register_fake("masked_conv2d_backward")
def _backward_fake(
    grad_output, input, weight, crow, col, ccol, row, perm, shape, block, stride, padding, dilation, groups, output_mask
):
    grad_input = _empty_like(input, input.shape) if output_mask[0] else input.new_empty(0)
    sizes = (weight.shape, (shape[0],))
    grads = (input.new_empty(s if wanted else (0,)) for s, wanted in zip(sizes, output_mask[1:], strict=True))
    return grad_input, *grads


def _empty_like(input, size):
    """In the memory format of ``input``: contiguous or channels_last, as the kernels write it."""
    return torch.empty(
        size, dtype=input.dtype, device=input.device, memory_format=torch._prims_common.suggest_memory_format(input)
    )


register_bilinear("masked_conv2d", channel=-3)
