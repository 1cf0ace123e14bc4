"""What a network costs: active parameters, bytes of parameters and optimiser state, against the dense network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import uasparse_kernels as ua
from uasparse_kernels.unknowns import Vote


def training_cost(
    model: nn.Module, optimizer: torch.optim.Optimizer, vote: Vote | None = None
) -> dict[str, int | float]:
    """Counts parameters and bytes as they are held now.

    active_parameters counts active weights, biases and norm parameters; dense_parameters the same network without
    sparsity. Bytes are those of parameters plus optimiser state (memory_bytes), of the pattern's index tensors, and of
    parameters plus the same optimiser state in the dense network. vote_bytes: the vote's copy of the network,
    which is held from its first step on.
    """
    sparse = {id(m.weight): m for m in model.modules() if isinstance(m, ua.SparseLinear | ua.SparseConv2d)}
    active = dense = held_bytes = dense_bytes = 0
    for parameter in model.parameters():
        layer = sparse.get(id(parameter))
        full = torch.Size(layer.pattern.shape).numel() if layer is not None else parameter.numel()
        active += layer.pattern.nnz if layer is not None else parameter.numel()
        dense += full
        states = [s for s in optimizer.state.get(parameter, {}).values() if _is_state(s, parameter)]
        held_bytes += parameter.nbytes + sum(state.nbytes for state in states)
        dense_bytes += full * parameter.element_size() + sum(full * state.element_size() for state in states)
    return {
        "active_parameters": active,
        "dense_parameters": dense,
        "density": active / dense,
        "memory_bytes": held_bytes,
        "index_bytes": sum(_index_bytes(layer) for layer in sparse.values()),
        "dense_memory_bytes": dense_bytes,
        "vote_bytes": sum(t.nbytes for t in vote.averaged.module.state_dict().values()) if vote is not None else 0,
    }


def _is_state(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _index_bytes(layer: ua.nn.SparseLayer) -> int:
    """Bytes of the index tensors of the layer's pattern, in both orders."""
    return sum(buffer.nbytes for buffer in layer.pattern.tensors())
