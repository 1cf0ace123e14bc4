"""Dense linear layers on a CPU by the quicker of the libraries that torch has."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from uasparse_kernels import _library

_WORTH = 2**22  # multiply-adds: under that a call of oneDNN costs more than it saves
_ROWS = 16  # fewer are bound by reading the weight, whoever reads it


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, by oneDNN where it is twice as fast as what torch takes.

    In float32 torch takes MKL, which leaves AVX-512 alone on AMD's processors.

    Args:
        input: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]``.
    """
    if _is_quicker_by_onednn(input, weight):
        rows = input.reshape(-1, input.shape[-1])
        output = _OneDnn.apply(rows, weight, bias)
        return output if input.dim() == 2 else output.view(*input.shape[:-1], weight.shape[0])
    return F.linear(input, weight, bias)


def _is_quicker_by_onednn(input: Tensor, weight: Tensor) -> bool:
    columns = weight.shape[1]
    return (
        not torch.compiler.is_compiling()
        and input.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and input.numel() >= _ROWS * columns
        and input.numel() * weight.shape[0] >= _WORTH
        and _has_slow_mkl()
        and torch._C._get_mkldnn_enabled()
        and not torch.jit.is_tracing()
    )


@functools.cache
def _has_slow_mkl() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch has oneDNN beside MKL."""
    if _library.compiled is None or _library.compiled.cpu_isa() != "avx512" or not torch.backends.mkl.is_available():
        return False
    try:
        is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except (OSError, UnicodeDecodeError):
        return False
    return is_amd and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _plain(matrix: Tensor) -> Tensor:
    """Itself where its rows or its columns are in memory one by one; oneDNN refuses others, such as sliding windows."""
    (rows, columns), (down, along) = matrix.shape, matrix.stride()
    is_plain = (along == 1 and down >= columns) or (down == 1 and along >= rows)
    return matrix if is_plain else matrix.contiguous()


class _OneDnn(torch.autograd.Function):
    """``rows @ weight.T + bias``; strides may be any."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        if bias is not None:
            bias = bias.contiguous()  # its strides are not looked at
        return torch.ops.mkldnn._linear_pointwise.default(_plain(rows), _plain(weight), bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            _OneDnn.apply(grad, weight.t(), None) if of_rows else None,
            _OneDnn.apply(grad.t(), rows.t(), None) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )
