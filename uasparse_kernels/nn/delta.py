"""Sparse fine-tuning: packed trainable weights that are added to a frozen dense layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uasparse_kernels._model import Model, check_model
from uasparse_kernels.nn.conv2d import SparseConv2d
from uasparse_kernels.nn.layers import SparseLayer
from uasparse_kernels.nn.linear import SparseLinear
from uasparse_kernels.ops._common import dense_form
from uasparse_kernels.pattern import SparsityPattern


class SparseDelta(nn.Module):
    """A frozen dense layer, ``base``, plus a sparse one of the same shape, ``delta``, that is trained.

    The output is ``base(x) + delta(x)``. The delta starts at zero, so that the layer does at first what its base does.
    Only the delta has a gradient: that of the sum at the active places (an SDDMM), and the memory of gradients and
    optimiser state is that of the active weights. ``DynamicSparsity`` moves the delta's pattern as that of any sparse
    layer: RigL grows where the gradient of the sum is largest.

    Source: sparse fine-tuning of frozen networks: Guo et al., "Diff pruning", arXiv 2012.07463; Ansell et al., "Scaling
    Sparse Fine-Tuning to Large Language Models", arXiv 2401.16405 (patterns that move); Nikdan et al., "RoSA", arXiv
    2401.04679 (patterns by gradients).

    Args:
        layer: an ``nn.Linear`` or ``nn.Conv2d``; it becomes ``base``, frozen: weight and bias require no gradient.
        density: share of trained weights, in (0, 1]; a random pattern with an exact count is drawn.
        pattern: the pattern itself (instead of ``density``), such as one of largest gradients.
        block: block of the random pattern.

    Raises:
        ValueError: if both or neither of density and pattern are given, or they do not fit the layer.
        TypeError: for another layer.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        density: float | None = None,
        *,
        pattern: SparsityPattern | None = None,
        block: Sequence[int] = (1, 1),
    ):
        super().__init__()
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise TypeError(f"Expected an nn.Linear or nn.Conv2d, got {type(layer).__name__}.")
        if (density is None) == (pattern is None):
            raise ValueError("Expected one of density and pattern=, got " + ("none." if pattern is None else "both."))
        weight = layer.weight
        if density is not None:
            shape = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else weight.shape
            pattern = SparsityPattern.random(shape, density, block=block)
        options: dict[str, Any] = {
            "device": weight.device,
            # Of a quantised layer: that of its results.
            "dtype": weight.dtype if weight.is_floating_point() else None,
            "bias": False,
            "pattern": pattern,
            "storage": "packed",
        }
        delta: SparseLayer
        if isinstance(layer, nn.Linear):
            delta = SparseLinear(layer.in_features, layer.out_features, **options)
        else:
            delta = SparseConv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                layer.dilation,  # type: ignore[arg-type]
                layer.groups,
                padding_mode=layer.padding_mode,  # type: ignore[arg-type]
                **options,
            )
        nn.init.zeros_(delta.weight)
        self.base, self.delta = layer.requires_grad_(False), delta
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The sum as a dense tensor, for code that reads a layer's weight; its gradient reaches the delta alone."""
        return self.base.weight + dense_form(self.delta.weight, self.delta.pattern)

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base.bias

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + self.delta(input)

    @torch.no_grad()
    def merge(self) -> nn.Linear | nn.Conv2d:
        """Adds the delta to the base's weight, in place, and returns the base; the delta is zero then, so that the
        layer goes on doing the same.

        Raises:
            ValueError: if the base's weight takes no sum: a quantised or a parametrised one.
        """
        self.check_can_merge()
        self.base.weight.add_(self.delta.dense_weight())
        self.delta.weight.zero_()
        return self.base

    def check_can_merge(self) -> None:
        """Raises ValueError if :meth:`merge` would."""
        weight = self.base.weight
        if not weight.is_floating_point() or self.base._parameters.get("weight") is not weight:
            raise ValueError(
                f"Expected a base with a floating-point weight of its own to merge into, got {weight.dtype}, of "
                f"{type(self.base).__name__}."
            )

    def extra_repr(self) -> str:
        return f"density={self.delta.pattern.density:.4g}"


def merge_sparse_deltas(model: Model) -> Model:
    """Replaces all sparse deltas by dense layers whose weights are the sums (in place; of a lone delta the base is
    returned). Parameters stay frozen or not as they are.

    Raises:
        ValueError: if a base takes no sum; nothing is changed then.
    """
    check_model(model)
    deltas = [module for module in model.modules() if isinstance(module, SparseDelta)]
    for delta in deltas:
        delta.check_can_merge()
    return put_in_place(model, {id(delta): delta.merge() for delta in deltas})


def put_in_place(model: Model, new: Mapping[int, Any]) -> Model:
    """Modules in the place of others, which are given by id, under every name; a lone one is returned."""
    if id(model) in new:
        return new[id(model)]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new and new[id(child)] is not parent:
                setattr(parent, name, new[id(child)])
    return model
