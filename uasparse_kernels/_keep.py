"""Which weights stay where a layer becomes sparse, or sparser: random ones, the largest, or those of best score."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from uasparse_kernels._coverage import pattern_shape, pattern_view
from uasparse_kernels._model import check_model
from uasparse_kernels.nn.layers import SparseLayer, resolve_storage
from uasparse_kernels.ops._common import replace_data_
from uasparse_kernels.ops.prune_grow import active_norms, apply, block_scores, kept_blocks, resize
from uasparse_kernels.pattern import SparsityPattern
from uasparse_kernels.topology.checks import why_unowned
from uasparse_kernels.topology.dynamic import owner_of
from uasparse_kernels.topology.saliency import best_pattern, change_to, densities_by_threshold
from uasparse_kernels.topology.states import State
from uasparse_kernels.topology.structure import structured_pattern

logger = logging.getLogger("uasparse_kernels")


class Keep:
    """Scores of weights by layer, checked where they are asked for, before a model is changed.

    Raises:
        ValueError: if keep is neither "random" nor "magnitude", or scores are named after nothing.
    """

    def __init__(self, model: nn.Module, keep: str, scores: Mapping[str, Tensor] | None):
        if keep not in ("random", "magnitude"):
            raise ValueError(f'Expected keep="random" or "magnitude", got {keep!r}.')
        if scores is not None:
            if keep != "random":
                raise ValueError('Expected one of keep="magnitude" and scores=, got both.')
            unknown = sorted(scores.keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)})
            if unknown:
                raise ValueError(
                    f"No parameter of the model is named {', '.join(map(repr, unknown[:5]))}: scores go by the "
                    "name of the weight, as model.named_parameters() has it ('layer1.0.conv1.weight')."
                )
        self.is_random = keep == "random" and scores is None
        self._scores = scores

    def pattern(
        self, name: str, module: Any, density: float, block: Sequence[int], structure: str | None
    ) -> SparsityPattern:
        """The pattern of a dense layer."""
        shape = pattern_shape(module)
        if not self.is_random:
            return best_pattern(self.norms(name, module, block), shape, density, block=block, structure=structure)
        if structure is not None:
            return structured_pattern(shape, density, structure, block=block)
        return SparsityPattern.random(shape, density, block=block)

    def norms(self, name: str, module: Any, block: Sequence[int] = (1, 1)) -> Tensor:
        """Scores of all blocks of a dense layer, of the active ones of a sparse layer: Frobenius norms."""
        scores = self._values(name, module)
        if isinstance(module, SparseLayer):
            norms = active_norms(scores, module.pattern)
        else:
            SparsityPattern.from_blocks(
                scores.shape, torch.empty(0, dtype=torch.int64), block=block
            )  # checks the block
            norms = block_scores(scores, block)
        if not bool(norms.isfinite().all()):
            what = "weights" if self._scores is None else "scores"
            raise ValueError(
                f"{name or type(module).__name__}: expected finite {what} to choose by, got NaN or infinity."
            )
        return norms

    def change(self, name: str, layer: SparseLayer, density: float, structure: str | None) -> tuple[Tensor, Tensor]:
        """What a sparse layer drops and grows, smallest first: at random where neither scores nor magnitudes tell."""
        growth = None
        if self._scores is not None and not layer.pattern.is_packed(scores := self._values(name, layer)):
            growth = block_scores(scores, layer.pattern.block)
        return change_to(layer.pattern, density, structure, self.norms(name, layer), growth)

    def densities(
        self, modules: Mapping[str, Any], blocks: Mapping[str, Sequence[int]], density: float
    ) -> dict[str, float]:
        """By one threshold over all layers."""
        if not modules:
            return {}
        shapes = {name: pattern_shape(module) for name, module in modules.items()}
        units = {name: blocks[name][0] * blocks[name][1] for name in modules}
        totals = {name: torch.Size(shape).numel() // units[name] for name, shape in shapes.items()}
        scores = {name: self.norms(name, module, blocks[name]) for name, module in modules.items()}
        return densities_by_threshold(scores, totals, units, density)

    def _values(self, name: str, module: Any) -> Tensor:
        """The weight itself, or the scores of it: packed, or of the pattern's shape."""
        called, weight = name or type(module).__name__, module.weight
        if weight.is_meta:
            raise ValueError(f"{called}: expected a weight with values to choose by, got one on the meta device.")
        if self._scores is None:
            return pattern_view(module, weight.detach())
        key = f"{name}.weight" if name else "weight"
        score = self._scores.get(key)
        if not isinstance(score, Tensor) or not score.is_floating_point():
            raise ValueError(f"Expected scores of floating point for {key}, got {_describe(score)}.")
        shapes = {tuple(weight.shape)}
        if isinstance(module, SparseLayer) and module.storage == "packed":
            shapes.add(module.dense_shape)
        if tuple(score.shape) not in shapes:
            expected = " or ".join(map(str, sorted(shapes, key=len)))
            raise ValueError(f"Expected scores of shape {expected} for {key}, got {tuple(score.shape)}.")
        if not bool(score.isfinite().all()):
            raise ValueError(f"Expected finite scores for {key}, got NaN or infinity.")
        score = score.detach().to(weight.device)
        if isinstance(module, SparseLayer):
            return score if score.shape == weight.shape else module.pattern_view(score)
        return pattern_view(module, score)


def _describe(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else "none" if value is None else type(value).__name__


@dataclass
class Change:
    """What happens to a sparse layer, in place, once all layers are decided."""

    layer: SparseLayer
    dropped: Tensor
    grown: Tensor
    storage: str
    states: Sequence[State] = ()

    @classmethod
    def to_pattern(cls, layer: SparseLayer, pattern: SparsityPattern, storage: str) -> Change:
        layer.pattern.check_fits(pattern)
        pattern = pattern.to(layer.pattern.device)
        dropped = kept_blocks(layer.pattern, _common(layer.pattern, pattern))
        grown = kept_blocks(pattern, _common(pattern, layer.pattern))
        return cls(layer, dropped, grown, storage)

    def num_blocks(self) -> int:
        return self.layer.pattern.num_blocks - self.dropped.numel() + self.grown.numel()

    @torch.no_grad()
    def apply(self) -> bool:
        """Returns whether an optimiser's state that did not move no longer fits: the parameter has another size, or its
        packed values stand at other places."""
        layer, size = self.layer, self.layer.weight.shape
        moved = layer.storage == "packed" and self.grown.numel() > 0
        moving = [state.tensor for state in self.states] + (
            [layer.weight.grad] if layer.weight.grad is not None else []
        )
        if self.dropped.numel() or self.grown.numel():
            same = self.dropped.numel() == self.grown.numel()
            (apply if same else resize)(layer.weight, layer.pattern, self.dropped, self.grown, moving)
        storage = resolve_storage(self.storage, layer.pattern, layer.weight.dtype)
        if storage != layer.storage:
            store = layer.pattern.pack if storage == "packed" else layer.pattern.unpack
            grad, layer.weight.grad = layer.weight.grad, None
            for tensor in [layer.weight, *(state.tensor for state in self.states)]:
                replace_data_(tensor, store(tensor.detach()))
            layer.weight.grad = None if grad is None else store(grad)
        return moved or layer.weight.shape != size


def _common(pattern: SparsityPattern, other: SparsityPattern) -> Tensor:
    """The active blocks of a pattern that are active in another one too."""
    mine = pattern.blocks()
    return mine[torch.isin(mine, other.blocks(), assume_unique=True)]


def check_not_wrapped(model: nn.Module) -> None:
    """Raises ValueError if a DistributedDataParallel around or inside the model holds its parameters (it would reduce
    the gradients of the old ones), or if they are sharded, and what :func:`check_model` does."""
    check_model(model)
    for name, module in model.named_modules():
        if getattr(module, "_is_fsdp_managed_module", False):
            raise ValueError(
                f"{name or type(module).__name__} is sharded, and its parameters are about to change: call this on the "
                "model first, and shard it afterwards."
            )
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    mine = {id(parameter) for parameter in model.parameters()}
    for wrapper in gc.get_objects():
        if issubclass(type(wrapper), DistributedDataParallel) and mine & {id(p) for p in wrapper.parameters()}:
            raise ValueError(
                "A DistributedDataParallel holds the model's parameters, which are about to change: call this on the "
                "model first, and wrap it afterwards."
            )


def check_changeable(name: str, layer: SparseLayer) -> None:
    """Raises ValueError if a sparse layer's pattern is not ours to change."""
    if owner_of(layer) is not None:
        raise ValueError(
            f"{name or type(layer).__name__}: a DynamicSparsity changes this layer's pattern; call its detach() first, "
            "and make a new one afterwards."
        )
    if (reason := why_unowned(layer)) is not None:
        raise ValueError(f"{name or type(layer).__name__}: {reason}")


def warn_of_outdated(weights: Iterable[Tensor]) -> None:
    """Logs that optimisers have state for weights that were given another size or other places, of those that are alive
    anywhere."""
    changed = list(weights)
    if not changed:
        return
    holders = {
        type(optimizer).__name__
        for optimizer in gc.get_objects()
        if issubclass(type(optimizer), torch.optim.Optimizer) and any(optimizer.state.get(w) for w in changed)
    }
    if holders:
        logger.warning(
            "%d weights have another size or stand at other places now, and %s has state of the old ones: make a new "
            "optimizer.",
            len(changed),
            ", ".join(sorted(holders)),
        )
