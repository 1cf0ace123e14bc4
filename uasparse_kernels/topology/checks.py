"""What DynamicSparsity asks of a model, its layers and a method before it changes anything."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from uasparse_kernels.nn.layers import SparseLayer
from uasparse_kernels.topology.methods import Method
from uasparse_kernels.topology.processes import is_fully_sharded, is_sharded
from uasparse_kernels.topology.schedule import CosineSchedule
from uasparse_kernels.topology.states import OptimizerStates


def why_unowned(layer: SparseLayer) -> str | None:
    """Why an update cannot write to a layer's weight."""
    weight: Any = layer.weight
    way_out = 'Use DistributedDataParallel or fully_shard, or method="static", which changes nothing.'
    if is_sharded(weight):
        if not is_fully_sharded(layer):
            return f"its weight is sharded (a DTensor), but not by fully_shard (tensor parallelism?). {way_out}"
        if weight.device.type != layer.pattern.device.type:
            return f"its weight is offloaded to {weight.device}, its pattern is on {layer.pattern.device}. {way_out}"
        return None
    if hasattr(layer, "parametrizations"):
        return "its weight is parametrised; leave the layer dense (sparsify(..., exempt=...))."
    flattened = hasattr(weight, "_fsdp_flattened")
    if flattened or layer._parameters.get("weight") is not weight or not weight.is_leaf:
        return (
            "its weight is not a parameter of its own, as FullyShardedDataParallel (use_orig_params=True does not "
            f"help), weight_norm and functional calls make it. {way_out}"
        )
    if tuple(weight.shape) not in (layer.pattern.shape, layer.pattern.packed_shape):
        return (
            f"expected a weight of shape {layer.pattern.shape} (dense-stored) or {layer.pattern.packed_shape} "
            f"(packed), got {tuple(weight.shape)}: a part of it, or another pattern's."
        )
    if not weight.is_meta and weight.layout == torch.strided:
        needed = (weight.storage_offset() + weight.numel()) * weight.element_size()
        if weight.untyped_storage().nbytes() < needed:
            return f"the memory of its weight was freed (as FullyShardedDataParallel does). {way_out}"
    return None


def check_owned(layers: dict[str, SparseLayer], states: OptimizerStates, *, changes: bool) -> None:
    """Raises ValueError for weights that an update cannot write to, or that the optimiser does not hold."""
    for name, layer in layers.items():
        if (reason := why_unowned(layer)) is not None:
            raise ValueError(f"{name or type(layer).__name__}: {reason}")
    for what in ("weight", "pattern"):
        if len({id(getattr(layer, what)) for layer in layers.values()}) < len(layers):
            raise ValueError(f"Expected every sparse layer to have a {what} of its own, got one that layers share.")
    states.check_holds(layers)
    if changes:
        states.check_keeps_nothing_aside(layers)


def check_same_layers(layers: dict[str, SparseLayer], model: nn.Module | None) -> None:
    """Raises ValueError if sparse layers came into the model or left it."""
    if model is None:  # what was given then was a wrapper that is gone
        return
    now = {id(module): name for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    before = {id(layer): name for name, layer in layers.items()}
    lists = {"new": [now[i] for i in now.keys() - before.keys()]}
    lists["gone"] = [before[i] for i in before.keys() - now.keys()]
    said = [f"{what} {', '.join(sorted(map(repr, names)))}" for what, names in lists.items() if names]
    if said:
        raise ValueError(
            "The model's sparse layers are not those that this DynamicSparsity was made for: "
            f"{'; '.join(said)}. Make another one after a change of the model, with the steps that are left."
        )


def check_patterns(method: Method, layers: dict[str, SparseLayer], checked: dict[str, int]) -> None:
    """Raises ValueError for patterns that others made (at first, or by loading), and the method cannot keep to;
    ``checked`` has the states of those that are known to be fit."""
    for name, layer in layers.items():
        if checked.get(name) == layer.pattern.changes:
            continue
        try:
            method.check(layer.pattern)
        except ValueError as error:
            raise ValueError(f"{name or type(layer).__name__}: {error}") from error
        checked[name] = layer.pattern.changes


def check_method(
    method: Method, layers: dict[str, SparseLayer], schedule: CosineSchedule, *, in_processes: bool
) -> None:
    """Raises ValueError for layers that a method cannot keep to, and warns where it would change nothing."""
    for name, layer in layers.items():
        fixed = in_processes or is_sharded(layer.weight)
        if method.resizes and fixed and layer.storage == "packed":
            raise ValueError(
                f"{name}: expected dense storage under DistributedDataParallel and fully_shard, whose buffers have "
                "fixed sizes, for a method that changes the number of active weights; call "
                'sparsify(..., storage="dense").'
            )
    if method.scope == "global" and len({layer.pattern.block for layer in layers.values()}) > 1:
        raise ValueError('Expected one block size in all layers for scope "global", whose norms it compares.')
    if schedule.is_over(0):
        text = f"Expected an update every {schedule.delta_t} steps before step {schedule.end}, got none: "
        if method.final_sparsity is not None:
            raise ValueError(text + "gradual pruning would never begin; give a smaller delta_t.")
        warnings.warn(text + "the topology will never change; give a smaller delta_t.", stacklevel=3)
    if method.final_sparsity is not None and _leaves_nothing_to_prune(method, layers):
        warnings.warn(
            f"Expected layers denser than the final_sparsity of {method.final_sparsity:g}, got none: nothing will "
            "be pruned. Start from sparsify(model, 0.0, include_dense=True), or a lower sparsity.",
            stacklevel=3,
        )


def _leaves_nothing_to_prune(method: Method, layers: dict[str, SparseLayer]) -> bool:
    assert method.final_sparsity is not None
    counts = [(layer.pattern.num_blocks, math.prod(layer.pattern.grid)) for layer in layers.values()]
    if method.scope == "global":
        counts = [(sum(held for held, _ in counts), sum(size for _, size in counts))]
    ends = [max(1, round(size * (1 - method.final_sparsity))) for _, size in counts]
    over = [held - end for (held, _), end in zip(counts, ends, strict=True)]
    return max(over) <= 0 and min(over) < 0  # all equal: it was resumed after the last update
