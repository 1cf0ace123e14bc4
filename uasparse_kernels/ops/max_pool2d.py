"""Max pooling, with a kernel for contiguous float32 maps on a CPU, where torch's is scalar."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uasparse_kernels import _library
from uasparse_kernels.ops._common import as_pair, transformed

IntPair = int | tuple[int, int]


def max_pool2d(
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``F.max_pool2d``: the same values and gradients; of equal numbers the first counts, of NaN the last.

    Our kernel serves contiguous float32 ``[N, C, H, W]`` on a CPU, without dilation and ``ceil_mode``; torch's serves
    the rest.

    Raises:
        ValueError, RuntimeError: if sizes do not fit.
    """
    kernel, pads, spread = as_pair(kernel_size), as_pair(padding), as_pair(dilation)
    steps = kernel if stride is None else as_pair(stride)
    ours = (
        isinstance(input, Tensor)  # torch says so where it is none
        and input.device.type == "cpu"
        and input.dim() == 4
        and input.dtype == torch.float32
        and input.numel() > 0
        and input.is_contiguous()
        and spread == (1, 1)
        and not ceil_mode
        and transformed() is None
        and _library.has_kernel("max_pool2d", input)
    )
    if not ours:
        return F.max_pool2d(input, kernel, steps, pads, spread, ceil_mode)
    return torch.ops.uasparse.max_pool2d.default(input, kernel, steps, pads)[0]


@_library.register_fake("max_pool2d")
def _fake(input, kernel, stride, padding):
    if min(*kernel, *stride) < 1:
        raise ValueError(f"max_pool2d: expected kernel and stride of at least one, got {kernel} and {stride}.")
    size = [(input.shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
    shape = (*input.shape[:2], *size)
    return input.new_empty(shape), input.new_empty(shape, dtype=torch.int64)
