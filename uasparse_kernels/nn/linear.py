"""``nn.Linear`` with a sparse weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from uasparse_kernels import ops
from uasparse_kernels.nn.layers import SparseLayer, as_leaf, from_dense
from uasparse_kernels.nn.registry import add_kind
from uasparse_kernels.pattern import SparsityPattern


class SparseLinear(SparseLayer):
    """``nn.Linear`` with a sparse weight.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        sparsity: share of absent weights in [0, 1); a uniformly random pattern with an exact count is drawn.
        pattern: the pattern itself, of shape ``[out, in]`` (instead of ``sparsity``); it is copied.
        block: block of the random pattern, (1, 1), (r, 1) or (b, b).
        storage: "packed", "dense", or "auto". On the CPU, auto is packed up to the density at which the dense kernel
            becomes faster (:func:`uasparse_kernels.tune`); on a GPU it is packed for blocks, and for unstructured
            weights of so few entries that a sparse kernel beats tensor cores (about 1 %).

    Raises:
        ValueError: if both or neither of sparsity and pattern are given, or they do not fit the layer.
    """

    dense_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        sparsity: float | None = None,
        pattern: SparsityPattern | None = None,
        block: Sequence[int] = (1, 1),
        storage: str = "auto",
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._init_weight((out_features, in_features), bias, device, dtype, sparsity, pattern, block, storage)

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        sparsity: float | None = None,
        pattern: SparsityPattern | None = None,
        block: Sequence[int] = (1, 1),
        storage: str = "auto",
    ) -> SparseLinear:
        """A sparse layer with the active weights and the bias of a dense one (copied).

        With ``sparsity`` the pattern is random, for training from scratch, and each output's weights are scaled up for
        the inputs that it lost (:meth:`scale_to_fan_in_`). With a ``pattern`` the values are not changed: to prune a
        trained layer by magnitude, pass ``SparsityPattern.from_mask(...)``.
        """
        build = partial(cls, module.in_features, module.out_features, module.bias is not None)
        return from_dense(module, build, sparsity=sparsity, pattern=pattern, block=block, storage=storage)

    def _empty_dense(self, options: dict[str, Any]) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, **options)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return as_leaf(self, input)
        weight, pattern, bias, masked = self._own_tensors()
        return ops.masked_linear(input, weight, pattern, bias, weight_is_masked=masked)

    def weight_gradient(self, input: Tensor, grad_output: Tensor, first: int, last: int) -> Tensor:
        return grad_output.reshape(-1, grad_output.shape[-1])[:, first:last].T @ input.reshape(-1, input.shape[-1])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            + self._sparsity_repr()
        )


add_kind(nn.Linear, SparseLinear, lambda layer: layer.to_dense(nn.Linear))
