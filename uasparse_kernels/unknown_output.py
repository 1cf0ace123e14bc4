"""Gives a classifier of K classes the output for "unknown" that the unknown-aware loss trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from uasparse_kernels._keep import check_changeable, check_not_wrapped
from uasparse_kernels._model import Model
from uasparse_kernels.nn.conv2d import SparseConv2d
from uasparse_kernels.nn.delta import SparseDelta
from uasparse_kernels.nn.layers import SparseLayer
from uasparse_kernels.nn.linear import SparseLinear
from uasparse_kernels.ops.topk_indices import topk_indices
from uasparse_kernels.pattern import SparsityPattern


@torch.no_grad()
def add_unknown_output(model: Model, name: str) -> Model:
    """Adds an output for "unknown" to a model's last layer of K outputs, in place; the first K outputs do not change.

    The new output is the mean of the others: its weights and its bias are the means of theirs. So it is never the
    largest, and every prediction is as before; the flatter the others are, the closer it is to the largest. In
    a sparse layer the new row has as many weights as the others on average (rounded), those of largest mean, unscaled;
    the new output is then only close to the mean.

    The layer stays the same object, and its ``out_features`` (``out_channels``) becomes K + 1. Weight and bias are new
    parameters: make the optimiser afterwards. Anything else that holds the number of classes (``num_classes``, a
    config) you have to change yourself.

    Args:
        model: changed in place.
        name: fully qualified name of the layer, an ``nn.Linear``, ``nn.Conv2d`` (such as a segmentation head),
            ``SparseLinear`` or ``SparseConv2d``; "" where the model is the layer.

    Returns:
        The model.

    Raises:
        ValueError: if there is no such layer, its weight is shared, parametrised or sharded, it is a part of a sparse
            delta or of an attention, it is a grouped convolution, or its blocks have more than one row, which does not
            divide K + 1 outputs. The model is then unchanged.
    """
    check_not_wrapped(model)
    modules = dict(model.named_modules())
    layer: Any = modules.get(name)
    owner = layer if isinstance(layer, SparseDelta) else modules.get(str(name).rpartition(".")[0])
    if isinstance(owner, SparseDelta):
        raise ValueError(
            f"{name!r}: the layers of a sparse delta are of one shape; call merge_sparse_deltas(model) first."
        )
    if isinstance(owner, nn.MultiheadAttention) and layer is not owner and layer is not None:
        raise ValueError(f"{name!r}: expected a last layer of K outputs, got a projection of an attention.")
    if not isinstance(layer, nn.Linear | nn.Conv2d | SparseLinear | SparseConv2d):
        found = "nothing" if layer is None else type(layer).__name__
        raise ValueError(
            f"Expected the name of a linear or convolution layer, such as {_last(modules)!r}, got {name!r}: {found}."
        )
    if layer._parameters.get("weight") is None:
        raise ValueError(f"{name!r}: its weight is no parameter of its own; remove the parametrisation first.")
    users = sum(p is layer.weight for module in modules.values() for p in module._parameters.values())
    if users > 1:
        raise ValueError(f"{name!r}: its weight is shared by {users} modules, which would all have one output more.")
    if getattr(layer, "groups", 1) != 1:
        raise ValueError(f"{name!r}: expected a convolution of one group, got {layer.groups}.")
    if isinstance(layer, SparseLayer):
        check_changeable(name, layer)
        if layer.pattern.block != (1, 1):
            raise ValueError(
                f"{name!r}: its blocks {layer.pattern.block} do not fit one row more; give the head 1x1 blocks "
                f"(densify it, or sparsify(..., overrides={{{name!r}: {{'block': (1, 1)}}}}))."
            )
        _add_row_to_sparse(layer)
    else:
        layer.weight = _like(layer.weight, torch.cat([layer.weight, layer.weight.mean(0, keepdim=True)]))
    if layer.bias is not None:
        layer.bias = _like(layer.bias, torch.cat([layer.bias, layer.bias.mean().view(1)]))
    if isinstance(layer, nn.Linear | SparseLinear):
        layer.out_features += 1
    else:
        layer.out_channels += 1
    return model


def _add_row_to_sparse(layer: SparseLayer) -> None:
    pattern, weight = layer.pattern, layer.unpacked_weight()
    rows, columns = pattern.grid
    mean = weight.mean(0, keepdim=True)
    count = min(columns, max(1, round(pattern.num_blocks / rows)))
    new = topk_indices(mean.flatten().float(), count, magnitude=True) + rows * columns
    blocks = torch.cat([pattern.blocks(), new.to(pattern.device)])
    storage = layer.storage
    layer.pattern = SparsityPattern.from_blocks((rows + 1, *pattern.shape[1:]), blocks)
    values = layer.pattern.pack(torch.cat([weight, mean]))
    layer.weight = _like(layer.weight, values if storage == "packed" else layer.pattern.unpack(values))


def _like(old: Tensor, data: Tensor) -> nn.Parameter:
    new = nn.Parameter(data.detach().contiguous(), requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new


def _last(modules: dict[str, nn.Module]) -> str:
    names = [n for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d | SparseLinear | SparseConv2d)]
    return names[-1] if names else ""
