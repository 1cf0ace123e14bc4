"""Dynamic sparse training methods: what a layer drops and what it grows at an update.

A method is an object with ``needs_gradient`` and ``update(layer) -> (dropped, grown)``, flat indices into the grid of
blocks (int64, ascending, equally many). Register it in METHODS to name it in DynamicSparsity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from uasparse_kernels.ops.prune_grow import GrowthCandidates, block_scores, drop_candidates, random_candidates
from uasparse_kernels.pattern import SparsityPattern


@dataclass
class LayerUpdate:
    """One layer at one update, as a method sees it."""

    weight: Tensor
    pattern: SparsityPattern
    fraction: float
    generator: torch.Generator
    gradient_tiles: Callable[[], Iterator[tuple[int, Tensor]]]

    @property
    def count(self) -> int:
        """Blocks to drop and to grow: ``ceil(fraction * num_blocks)``."""
        return math.ceil(self.fraction * self.pattern.num_blocks)


class Method(Protocol):
    needs_gradient: bool

    def update(self, layer: LayerUpdate) -> tuple[Tensor, Tensor]: ...


class RigL:
    """Drops the smallest magnitudes, grows the largest dense gradients (Evci et al., arXiv 1911.11134)."""

    needs_gradient = True

    def update(self, layer: LayerUpdate) -> tuple[Tensor, Tensor]:
        dropped = drop_candidates(layer.weight, layer.pattern, layer.count)
        candidates = GrowthCandidates(layer.count, layer.pattern, dropped)
        columns = layer.pattern.grid[1]
        for first, tile in layer.gradient_tiles():
            scores = block_scores(tile, layer.pattern.block)
            candidates.add(scores.reshape(-1), first // layer.pattern.block[0] * columns)
        return dropped, candidates.select()


class SET:
    """Drops the smallest magnitudes, grows at random (Mocanu et al., arXiv 1707.04780)."""

    needs_gradient = False

    def update(self, layer: LayerUpdate) -> tuple[Tensor, Tensor]:
        dropped = drop_candidates(layer.weight, layer.pattern, layer.count)
        return dropped, random_candidates(layer.pattern, dropped, layer.count, layer.generator)


METHODS: dict[str, type[Method]] = {"rigl": RigL, "set": SET}
