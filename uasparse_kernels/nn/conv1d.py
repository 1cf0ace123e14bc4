"""``nn.Conv1d`` with a sparse weight: a two-dimensional convolution of height 1."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from uasparse_kernels import ops
from uasparse_kernels.nn.conv2d import SparseConvolution, check_rows_of_groups, conv_arguments, conv_weight_gradient
from uasparse_kernels.nn.layers import as_leaf, from_dense
from uasparse_kernels.nn.registry import add_kind
from uasparse_kernels.ops._common import check_are_tensors
from uasparse_kernels.pattern import SparsityPattern

IntOrOne = int | tuple[int]


class SparseConv1d(SparseConvolution):
    """``nn.Conv1d`` with a sparse weight.

    The pattern, and a dense-stored ``weight``, are those of a convolution of height 1, ``[out, in / groups, 1, k]``.
    Checkpoints, scores and :meth:`dense_weight` have the shape of ``nn.Conv1d``'s weight, ``[out, in / groups, k]``.

    Args:
        in_channels ... dtype: as for ``nn.Conv1d``.
        sparsity, pattern, block, storage: as for :class:`SparseLinear`; block rows must not cross groups.
    """

    dense_class = nn.Conv1d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrOne,
        stride: IntOrOne = 1,
        padding: str | IntOrOne = 0,
        dilation: IntOrOne = 1,
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
        arguments = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        # The dense layer, on no device, checks the arguments as torch does and works out string paddings.
        template = nn.Conv1d(in_channels, out_channels, *arguments, device="meta")
        self._take_geometry(template)
        check_rows_of_groups(out_channels // groups, pattern, block)
        shape = tuple(self.pattern_view(template.weight).shape)
        self._init_weight(shape, bias, device, dtype, sparsity, pattern, block, storage)

    @classmethod
    def from_dense(
        cls,
        module: nn.Conv1d,
        *,
        sparsity: float | None = None,
        pattern: SparsityPattern | None = None,
        block: Sequence[int] = (1, 1),
        storage: str = "auto",
    ) -> SparseConv1d:
        """A sparse layer with the active weights and the bias of a dense one, as :meth:`SparseLinear.from_dense`."""
        build = partial(cls, *conv_arguments(module))
        return from_dense(module, build, sparsity=sparsity, pattern=pattern, block=block, storage=storage)

    @staticmethod
    def pattern_view(weight: Tensor) -> Tensor:
        return weight.unsqueeze(2)

    @staticmethod
    def dense_view(weight: Tensor) -> Tensor:
        return weight.squeeze(2)

    def _empty_dense(self, options: dict[str, Any]) -> nn.Module:
        return nn.Conv1d(*conv_arguments(self), **options)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return as_leaf(self, input)
        weight, pattern, bias, masked = self._own_tensors()
        batched, padding = self.padded(input)
        geometry = ((1, *self.stride), padding, (1, *self.dilation), self.groups)
        output = ops.masked_conv2d(batched, weight, pattern, bias, *geometry, weight_is_masked=masked).squeeze(2)
        return output.squeeze(0) if input.dim() == 2 else output

    def padded(self, input: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input as ``[N, C, 1, L]``, padded where the op cannot, and the padding that is left for the op."""
        check_are_tensors("SparseConv1d", input=input)
        if input.dim() not in (2, 3) or input.shape[-2] != self.in_channels:
            raise ValueError(
                f"SparseConv1d: expected an input [N, {self.in_channels}, L] or [{self.in_channels}, L], got "
                f"{tuple(input.shape)}."
            )
        if input.dim() == 2:
            input = input.unsqueeze(0)
        left, right = self._pad
        if self.padding_mode == "zeros" and left == right:
            return input.unsqueeze(2), (0, left)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(input, (left, right), mode=mode).unsqueeze(2), (0, 0)

    def weight_gradient(self, input: Tensor, grad_output: Tensor, first: int, last: int) -> Tensor:
        input, padding = self.padded(input)
        grad = grad_output.reshape(input.shape[0], self.out_channels, 1, grad_output.shape[-1])
        geometry = ((1, *self.stride), padding, (1, *self.dilation), self.groups)
        return conv_weight_gradient(input, grad, self.pattern.shape, *geometry, first, last)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0,)), ("dilation", (1,)), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return f"{text}, bias={self.bias is not None}, " + self._sparsity_repr()


add_kind(nn.Conv1d, SparseConv1d, lambda layer: layer.to_dense(nn.Conv1d))
