"""An average of a sparse model's weights over training that follows the topology."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from uasparse_kernels._model import check_model
from uasparse_kernels.nn.layers import SparseLayer
from uasparse_kernels.ops._common import replace_data_


class _Left(NamedTuple):
    """Blocks that left a layer's pattern: flat grid indices, ascending, and the average that they had after so many
    updates."""

    blocks: Tensor
    values: Tensor
    updates: int


class AveragedModel(nn.Module):
    """The exponential moving average (EMA) or the equal average (SWA) of a model's weights, as a model of its own.

    Call :meth:`update_parameters` after the optimiser's and the topology's step, and use the average as the model.
    Weights are averaged by position, and an inactive weight counts as zero: the result is the average of the dense
    weights, masked by the model's last pattern. A position that leaves the pattern keeps its average until it comes
    back, which takes 8 bytes and a value for every position that was active once and is not now. A step costs as much
    as that of a dense average over as many weights as are active.

    As with ``torch.optim.swa_utils.AveragedModel``, the first update takes the weights as they are, and buffers are the
    model's own: for batch norm's call ``torch.optim.swa_utils.update_bn(loader, averaged)`` at the end of SWA.

    Example:
        >>> averaged = ua.AveragedModel(model, decay=0.999)
        >>> for x, y in loader:
        ...     loss_fn(model(x), y).backward()
        ...     optimizer.step(); topology.step(); optimizer.zero_grad()
        ...     averaged.update_parameters(model)
        >>> averaged(x)  # averaged.module is the sparse network

    Args:
        model: is copied; of a DistributedDataParallel or a compiled model, what it holds.
        decay: the average's own share in an EMA update, in [0, 1]; None averages all updates equally.
        device: where the average is kept; by default where the model is.

    Sources: Polyak and Juditsky, 1992; Izmailov et al., arXiv 1803.05407.
    """

    n_averaged: Tensor

    def __init__(self, model: nn.Module, decay: float | None = None, *, device: Any = None):
        super().__init__()
        if decay is not None and not 0 <= decay <= 1:
            raise ValueError(f"Expected a decay in [0, 1], or None, got {decay}.")
        model = _unwrapped(model)
        check_model(model)
        if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
            raise ValueError("Expected a model with whole weights, got one that is sharded (fully_shard).")
        self.decay = decay
        self.module = copy.deepcopy(model)
        self.module.zero_grad()
        if device is not None:
            self.module.to(device)
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device))
        self._left: dict[str, _Left] = {}
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Adds the model's weights to the average, and copies its patterns and buffers.

        Raises:
            ValueError: for a model of another structure. Nothing is changed then.
        """
        mine, theirs = _parts(self.module), _parts(_unwrapped(model))
        differing = [name for name in {**mine, **theirs} if _form(mine.get(name)) != _form(theirs.get(name))]
        if differing:
            raise ValueError(
                f"Expected a model of the average's structure, got one that differs in {', '.join(differing[:5])}."
            )
        count = int(self.n_averaged)
        share = 1.0 if count == 0 else 1 / (count + 1) if self.decay is None else 1 - self.decay
        averaged: set[int] = set()  # weights of layers: several may share one
        for name, average in mine.items():
            new = theirs[name]
            if isinstance(average, SparseLayer) and id(average.weight) in averaged:
                if not average.pattern.equal(new.pattern):
                    average.pattern.become_(new.pattern)
            elif isinstance(average, SparseLayer):
                averaged.add(id(average.weight))
                self._follow(name, average, new, count)
                _mix(average.weight, _values(new, average.storage), share)
            else:
                _mix(average, new, share if isinstance(average, nn.Parameter) else 1.0)
        self.n_averaged += 1

    def _follow(self, name: str, average: SparseLayer, new: SparseLayer, count: int) -> None:
        """Gives the average the pattern of a layer. What leaves is put aside, what comes back is taken from there."""
        # A pattern has another code after every change: nothing is compared, on a GPU nothing waits, while it stands.
        codes = (average.pattern._code, new.pattern._code)
        if (known := self._known.get(name)) and known[0] is codes[0] and known[1] is codes[1]:
            return
        wanted = new.pattern.blocks().to(average.pattern.device)
        if not torch.equal(average.pattern.blocks(), wanted):
            self._move(name, average, wanted, count)
        self._known[name] = (average.pattern._code, codes[1])

    def _move(self, name: str, average: SparseLayer, wanted: Tensor, count: int) -> None:
        blocks, values = average.pattern.blocks(), _values(average, "packed")
        if left := self._left.get(name):
            since = left.updates / count if self.decay is None else self.decay ** (count - left.updates)
            blocks, order = torch.cat([blocks, left.blocks.to(blocks)]).sort()
            values = torch.cat([values, left.values.to(values) * since])[order]
        # Both are ascending, so that what they share stands in the same order.
        taken, found = torch.isin(blocks, wanted), torch.isin(wanted, blocks)
        if count:
            self._left[name] = _Left(blocks[~taken], values[~taken], count)
        moved = values.new_zeros(wanted.numel(), *values.shape[1:])
        moved[found] = values[taken]
        dense = average.storage == "dense"
        average.pattern.set_blocks_(wanted)
        moved = average.pattern.unpack(moved) if dense else moved
        if moved.shape == average.weight.shape:
            average.weight.copy_(moved)
        else:
            replace_data_(average.weight, moved)

    def get_extra_state(self) -> tuple[tuple[Any, ...], ...]:
        # A tuple is one value for dcp.load, which looks for no entries of a mapping that are new to it.
        return tuple((name, *left) for name, left in self._left.items())

    def set_extra_state(self, state: tuple[tuple[Any, ...], ...]) -> None:
        self._left = {name: _Left(*left) for name, *left in state}


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def _parts(model: nn.Module) -> dict[str, Any]:
    """What an average consists of: sparse layers (for their weights), other parameters, and buffers."""
    layers = {f"{name}." if name else "": m for name, m in model.named_modules() if isinstance(m, SparseLayer)}
    weights = {id(layer.weight) for layer in layers.values()}
    parts: dict[str, Any] = {name: p for name, p in model.named_parameters() if id(p) not in weights}
    parts |= dict(model.named_buffers())
    for prefix, layer in layers.items():
        parts[prefix + "weight"] = layer
        parts.pop(prefix + "pattern.signature", None)  # none where the pattern is another layer's, too
    return parts


def _form(part: Any) -> Any:
    if isinstance(part, SparseLayer):
        return part.pattern.shape, part.pattern.block
    return None if part is None else (isinstance(part, nn.Parameter), tuple(part.shape))


def _values(layer: SparseLayer, storage: str) -> Tensor:
    if layer.storage == storage:
        return layer.weight.detach()
    return layer.unpacked_weight() if storage == "dense" else layer.pattern.pack(layer.weight.detach())


def _mix(average: Tensor, new: Tensor, share: float) -> None:
    new = new.detach().to(average)
    if share == 1 or not average.is_floating_point():
        average.copy_(new)
    else:
        average.lerp_(new, share)
