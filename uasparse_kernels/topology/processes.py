"""The processes that train one model together: who they are, and how they come to hold the same pattern.

Under DistributedDataParallel each holds all weights. Under ``fully_shard`` (FSDP2) each holds a part of every weight,
a DTensor, and of its gradient and optimiser state; patterns are whole everywhere.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from uasparse_kernels.nn.layers import SparseLayer

Group = Any  # torch.distributed.ProcessGroup, which builds without distributed lack


def find_group(
    model: nn.Module, weights: Sequence[Tensor], process_group: Group | Literal[False] | None, *, needed: bool
) -> Group | None:
    """The process group that trains ``weights``: the one given, else that of the weights' shards (fully_shard), else
    that of the DistributedDataParallel that holds them, be it the model, inside of it (or of a compiled model), or
    around it. None for a single process.

    Raises:
        ValueError: if there are several processes and it is ``needed`` but not found, or several were found.
    """
    if process_group is False or not dist.is_available() or not dist.is_initialized():
        return None
    if process_group is not None:
        return process_group if dist.get_world_size(process_group) > 1 else None
    if dist.get_world_size() == 1:
        return None
    if any(is_sharded(weight) for weight in weights):
        return _group_of_shards(weights)
    wanted = {id(weight) for weight in weights}
    # The live ones: one that is given the unwrapped module has no other way up to its wrapper.
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)] or [
        m for m in gc.get_objects() if issubclass(type(m), DistributedDataParallel)
    ]
    groups = {id(m.process_group): m.process_group for m in wrappers if wanted & {id(p) for p in m.parameters()}}
    if len(groups) > 1:
        raise ValueError(
            f"Expected one process group that trains the sparse layers, got {len(groups)}; make a DynamicSparsity for "
            "the layers of each, or pass process_group=."
        )
    if not groups and needed:
        raise ValueError(
            f"torch.distributed has {dist.get_world_size()} processes, and no DistributedDataParallel or fully_shard "
            "holds the sparse layers: each process would train another pattern. Make DynamicSparsity after these, or "
            "pass process_group= (torch.distributed.group.WORLD for all processes). process_group=False says that the "
            "processes train models of their own."
        )
    group = next(iter(groups.values()), None)
    return group if group is not None and dist.get_world_size(group) > 1 else None


def _group_of_shards(weights: Sequence[Tensor]) -> Group:
    meshes = {getattr(weight, "device_mesh", None) for weight in weights}
    mesh: Any = meshes.pop()
    if meshes or mesh is None or mesh.ndim != 1:
        raise ValueError(
            "Expected all sparse weights to be sharded over one mesh of one dimension, got some that are not, or that "
            "are sharded or replicated in other ways; call fully_shard for all of them with the same mesh."
        )
    return mesh.get_group() if mesh.size() > 1 else None


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds a part of it (a DTensor)."""
    return hasattr(tensor, "device_mesh")


def is_fully_sharded(layer: SparseLayer) -> bool:
    """Whether fully_shard holds a layer, and so its weight is whole in a forward pass."""
    return is_sharded(layer.weight) and getattr(layer, "_is_fsdp_managed_module", False)


def local(tensor: Any) -> Tensor:
    """What of a tensor is here."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(tensor: Any) -> Tensor:
    """All of a tensor: a copy where it is sharded, which all processes must ask for; else itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@contextmanager
def whole(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors to be changed in place, all of each; what is sharded is gathered, and each part then kept where it
    belongs. All processes must make the same change."""
    complete = [gathered(tensor) for tensor in tensors]
    yield complete
    for tensor, changed in zip(tensors, complete, strict=True):
        if is_sharded(tensor):
            from torch.distributed.tensor import distribute_tensor

            sharded: Any = tensor
            part = distribute_tensor(changed, sharded.device_mesh, sharded.placements, src_data_rank=None)
            sharded.to_local().copy_(part.to_local())


def broadcast(tensor: Tensor, group: Group) -> Tensor:
    """The first process's tensor, in place."""
    dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)  # the collectives do not
    return tensor


def largest(values: Sequence[int], device: torch.device, group: Group | None) -> list[int]:
    """Each value's largest over the processes."""
    if group is None:
        return list(values)
    tensor = torch.tensor(list(values), dtype=torch.int64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return tensor.tolist()


@torch.no_grad()
def make_alike(layers: Mapping[str, SparseLayer], group: Group) -> None:
    """Gives every process the first one's patterns and weights. DDP has made the weights alike, but not the patterns.

    Raises:
        ValueError: on every process, if a layer has another shape, block or (packed) number of active weights than on
            the first one, or another pattern where the weights are sharded: their parts are of different weights then.
            Nothing is changed.
    """
    device = next(iter(layers.values())).weight.device
    facts = []
    for layer in layers.values():
        facts += [*layer.pattern.shape, *layer.pattern.block, layer.weight.numel()]
    counts = [layer.pattern.num_blocks for layer in layers.values()]
    # A list of another length would never end: the length goes first.
    differs = largest([len(facts), -len(facts)], device, group)
    same = differs[0] == -differs[1]
    if same:
        first = broadcast(torch.tensor([*facts, *counts], device=device), group).tolist()
        same = not any(largest([int(first[: len(facts)] != facts)], device, group))
    if not same:
        raise ValueError(
            "Expected the same sparse layers in every process: their number, shapes, blocks and numbers of weights; "
            "make the model in the same way everywhere."
        )
    sharded, differing = any(is_sharded(layer.weight) for layer in layers.values()), False
    for layer, count in zip(layers.values(), first[len(facts) :], strict=True):
        mine = layer.pattern.blocks()
        theirs = broadcast(mine.clone() if mine.numel() == count else mine.new_empty(count), group)
        if sharded:
            differing |= not torch.equal(mine, theirs)
            continue
        if not torch.equal(mine, theirs):
            layer.pattern.set_blocks_(theirs)
        broadcast(layer.weight.detach(), group)
    if sharded and any(largest([int(differing)], device, group)):
        raise ValueError(
            "Expected the same patterns in every process before fully_shard: make the model from the same seed "
            "everywhere, or load the same checkpoint into it."
        )
