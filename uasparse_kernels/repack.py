"""Gives each sparse layer the storage that suits its density now."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from uasparse_kernels._keep import Change, check_not_wrapped, warn_of_outdated
from uasparse_kernels._model import Model
from uasparse_kernels.nn.layers import SparseLayer, resolve_storage
from uasparse_kernels.topology.checks import why_unowned
from uasparse_kernels.topology.states import OptimizerStates


def repack(
    model: Model,
    *,
    storage: str = "auto",
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
) -> Model:
    """Changes the storage of a model's sparse layers, packed or dense, in place to what suits their density now.

    Use it after gradual pruning (GMP, GraNet): layers that started dense-stored are then sparse enough to be packed,
    which saves memory and lets the sparse kernels serve them. Modules and parameters stay the same objects and the
    weights keep their values; the parameters change their shape. A model in DistributedDataParallel, whose buckets have
    fixed sizes, is refused: take it out and wrap it again.

    Args:
        storage: "auto", as a new layer of the same density would have it, or "packed" or "dense" for all.
        optimizer: its state changes with the weights; several as a sequence. Without it, an optimiser that has state
            (momentum) has to be made again, and that is logged.

    Returns:
        The model.

    Raises:
        ValueError: for another storage, weights that are sharded or parametrised, or optimiser state of another shape
            than the weight. Nothing is changed then.
    """
    check_not_wrapped(model)
    states = OptimizerStates(optimizer) if optimizer is not None else None
    changes = []
    for name, layer in model.named_modules():
        if not isinstance(layer, SparseLayer):
            continue
        if resolve_storage(storage, layer.pattern, layer.weight.dtype) == layer.storage:
            continue
        if (reason := why_unowned(layer)) is not None:
            raise ValueError(f"{name or type(layer).__name__}: {reason}")
        nothing = layer.pattern.blocks()[:0]
        moving = states.of(name, layer.weight) if states is not None else ()
        changes.append(Change(layer, nothing, nothing, storage, moving))
    outdated = [change.layer.weight for change in changes if change.apply()]
    if states is None:
        warn_of_outdated(outdated)
    return model
