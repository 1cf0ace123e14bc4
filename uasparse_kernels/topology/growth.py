"""The dense gradient of a sparse layer's weight, in tiles: what growth looks at, and what never exists as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from uasparse_kernels.nn.layers import SparseConv2d, SparseLayer

# A tile's size in entries (4 MiB of float32 on the CPU, 64 MiB on a GPU): a small part of any layer that is worth it,
# large enough for a matmul.
_TILE_ENTRIES = 1 << 20
_GPU_TILES = 16


def tile_entries(device: torch.device) -> int:
    return _TILE_ENTRIES if device.type == "cpu" else _TILE_ENTRIES * _GPU_TILES


class GradientCapture:
    """Keeps a layer's inputs and output gradients while armed, and computes the weight's dense gradient from them.

    Every backward pass between arming and reading counts, so that micro-batches and layers used several times add up.
    It is a forward hook of the layer; a copy or a pickle of the layer carries an idle one.
    """

    def __init__(self) -> None:
        self.armed = False
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, module: SparseLayer, args: tuple, output: Tensor) -> None:
        if self.armed and output.requires_grad:
            input = args[0].detach()
            output.register_hook(lambda grad: self.pairs.append((input, grad.detach())))

    def __deepcopy__(self, memo) -> GradientCapture:
        return GradientCapture()

    def __getstate__(self) -> dict:
        return {"armed": False, "pairs": []}

    def clear(self) -> None:
        self.armed = False
        self.pairs.clear()

    def tiles(self, layer: SparseLayer, group=None) -> Iterator[tuple[int, Tensor]]:
        """Tiles of the dense gradient: ``(first row, gradient [rows, ...])``, ascending, whole rows of blocks each.

        Args:
            group: a process group over which each tile is summed.
        """
        shape = layer.pattern.shape
        rows_of_blocks = max(1, tile_entries(layer.weight.device) // math.prod(shape[1:]) // layer.pattern.block[0])
        rows = rows_of_blocks * layer.pattern.block[0]
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        for first in range(0, shape[0], rows):
            last = min(first + rows, shape[0])
            tile = torch.zeros((last - first, *shape[1:]), dtype=dtype, device=layer.weight.device)
            for input, grad in self.pairs:
                common = torch.promote_types(input.dtype, grad.dtype)
                tile += _weight_gradient(layer, input.to(common), grad.to(common), first, last)
            if group is not None:
                torch.distributed.all_reduce(tile, group=group)
            yield first, tile


def _weight_gradient(layer: SparseLayer, input: Tensor, grad: Tensor, first: int, last: int) -> Tensor:
    """Rows ``[first, last)`` of the gradient of the dense weight."""
    if not isinstance(layer, SparseConv2d):
        return grad.reshape(-1, grad.shape[-1])[:, first:last].T @ input.reshape(-1, input.shape[-1])
    input, padding = layer.padded(input)
    grad = grad.view(input.shape[0], -1, *grad.shape[-2:])
    shape = layer.pattern.shape
    per_group = shape[0] // layer.groups
    parts = []
    for group in range(first // per_group, (last - 1) // per_group + 1):
        low, high = max(first, group * per_group), min(last, (group + 1) * per_group)
        parts.append(
            torch.ops.aten.convolution_backward(
                grad[:, low:high],
                input[:, group * shape[1] : (group + 1) * shape[1]],
                grad.new_empty((high - low, *shape[1:])),
                None,
                layer.stride,
                padding,
                layer.dilation,
                False,
                (0, 0),
                1,
                (False, True, False),
            )[1]
        )
    return torch.cat(parts)
