"""``nn.Conv2d`` with a sparse weight, and what sparse convolutions share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from uasparse_kernels import ops
from uasparse_kernels._grid import check_block
from uasparse_kernels.nn.layers import SparseLayer, as_leaf, from_dense
from uasparse_kernels.nn.registry import add_kind
from uasparse_kernels.ops._common import as_pair, check_are_tensors
from uasparse_kernels.pattern import SparsityPattern


class SparseConvolution(SparseLayer):
    """What sparse convolutions share: the attributes of torch's, which are those of its constructor."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def _take_geometry(self, template: Any) -> None:
        """What a dense layer made of its arguments: tuples of numbers, and the amounts of a padding by name."""
        for name in SparseConvolution.__annotations__:
            setattr(self, name, getattr(template, name))
        self._pad = tuple(template._reversed_padding_repeated_twice)  # from the last dimension on; may be uneven


class SparseConv2d(SparseConvolution):
    """``nn.Conv2d`` with a sparse weight.

    Args:
        in_channels ... dtype: as for ``nn.Conv2d``.
        sparsity, pattern, block, storage: as for :class:`SparseLinear`; the pattern's shape is
            ``[out, in / groups, kh, kw]`` and its block rows must not cross groups.
    """

    dense_class = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        sparsity: float | None = None,
        pattern: SparsityPattern | None = None,
        block: Sequence[int] = (1, 1),
        storage: str = "auto",
    ):
        super().__init__()
        self._channels_last = False
        if not isinstance(padding, str):
            padding = as_pair(padding)
        stride, dilation = as_pair(stride), as_pair(dilation)
        # The dense layer, on no device, checks the arguments as torch does and works out string paddings.
        arguments = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        template = nn.Conv2d(in_channels, out_channels, *arguments, device="meta")
        self._take_geometry(template)
        shape = tuple(template.weight.shape)
        check_rows_of_groups(out_channels // groups, pattern, block)
        self._init_weight(shape, bias, device, dtype, sparsity, pattern, block, storage)

    @classmethod
    def from_dense(
        cls,
        module: nn.Conv2d,
        *,
        sparsity: float | None = None,
        pattern: SparsityPattern | None = None,
        block: Sequence[int] = (1, 1),
        storage: str = "auto",
    ) -> SparseConv2d:
        """A sparse layer with the active weights and the bias of a dense one, as :meth:`SparseLinear.from_dense`."""
        build = partial(cls, *conv_arguments(module))
        return from_dense(module, build, sparsity=sparsity, pattern=pattern, block=block, storage=storage)

    def _empty_dense(self, options: dict[str, Any]) -> nn.Module:
        return nn.Conv2d(*conv_arguments(self), **options)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return as_leaf(self, input)
        weight, pattern, bias, masked = self._own_tensors()
        batched, padding = self.padded(input)
        geometry = (self.stride, padding, self.dilation, self.groups)
        output = ops.masked_conv2d(batched, weight, pattern, bias, *geometry, weight_is_masked=masked)
        if self._channels_last:
            output = output.contiguous(memory_format=torch.channels_last)
        return output.squeeze(0) if input.dim() == 3 else output

    def weight_gradient(self, input: Tensor, grad_output: Tensor, first: int, last: int) -> Tensor:
        input, padding = self.padded(input)
        grad = grad_output.view(input.shape[0], self.out_channels, *grad_output.shape[-2:])
        geometry = (self.stride, padding, self.dilation, self.groups)
        return conv_weight_gradient(input, grad, self.pattern.shape, *geometry, first, last)

    def _apply(self, fn, recurse=True):
        """A packed weight has no memory format to remember that the model is channels_last: the layer does."""
        form = torch.channels_last if self._channels_last else torch.contiguous_format
        probe = torch.empty(2, 2, 2, 2, dtype=self.weight.dtype, device=self.weight.device, memory_format=form)
        super()._apply(fn, recurse)
        probe = fn(probe)
        self._channels_last = not probe.is_contiguous()
        return self

    def padded(self, input: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input ``[N, C, H, W]``, padded where the op cannot, and the padding that is left for the op."""
        check_are_tensors("SparseConv2d", input=input)
        if input.dim() == 3:
            input = input.unsqueeze(0)
        left, right, top, bottom = self._pad
        if self.padding_mode == "zeros" and left == right and top == bottom:
            return input, (top, left)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(input, (left, right, top, bottom), mode=mode), (0, 0)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return f"{text}, bias={self.bias is not None}, " + self._sparsity_repr()


def conv_arguments(module: Any) -> Any:
    """Those of a dense or sparse convolution's constructor, up to device and dtype."""
    return (
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.bias is not None,
        module.padding_mode,
    )


def check_rows_of_groups(per_group: int, pattern: SparsityPattern | None, block: Sequence[int]) -> None:
    """Raises ValueError for blocks that reach over the output channels of a group."""
    check_block(block)
    rows = (pattern.block if isinstance(pattern, SparsityPattern) else block)[0]  # no pattern is refused later
    if per_group % rows:
        raise ValueError(f"Expected block rows that divide the {per_group} output channels of a group, got {rows}.")


def conv_weight_gradient(
    input: Tensor, grad: Tensor, shape, stride, padding, dilation, groups: int, first: int, last: int
) -> Tensor:
    """Rows ``[first, last)`` of the gradient of a dense weight ``[out, in / groups, kh, kw]``."""
    per_group = shape[0] // groups
    parts = []
    for group in range(first // per_group, (last - 1) // per_group + 1):
        low, high = max(first, group * per_group), min(last, (group + 1) * per_group)
        parts.append(
            torch.ops.aten.convolution_backward(
                grad[:, low:high],
                input[:, group * shape[1] : (group + 1) * shape[1]],
                grad.new_empty((high - low, *shape[1:])),
                None,
                stride,
                padding,
                dilation,
                False,
                (0, 0),
                1,
                (False, True, False),
            )[1]
        )
    return torch.cat(parts)


add_kind(nn.Conv2d, SparseConv2d, lambda layer: layer.to_dense(nn.Conv2d))
