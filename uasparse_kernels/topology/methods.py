"""Dynamic sparse training methods: what the layers drop and what they grow at an update.

A :class:`Method` is put together from a drop score, a grower and a few switches; docs/methods.md has the table and
shows how to add one. It sees all layers at once, so that selection takes one call for all of them. Blocks are named by
their flat index into the grid of blocks (int64, ascending).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from uasparse_kernels.ops.prune_grow import (
    GrowthCandidates,
    active_norms,
    block_scores,
    drop_lowest,
    kept_blocks,
    prepare_scores_,
    random_candidates,
)
from uasparse_kernels.ops.topk_indices import topk_indices, topk_indices_many
from uasparse_kernels.pattern import SparsityPattern
from uasparse_kernels.topology.growth import tile_entries
from uasparse_kernels.topology.schedule import cubic_sparsity
from uasparse_kernels.topology.structure import check_n_of_m, groups_of, parse_n_of_m, row_counts

Change = tuple[Tensor, Tensor]  # blocks dropped and grown


@dataclass
class LayerUpdate:
    """One layer at one update, as a method sees it.

    ``gradient`` is that of the active weights, in the weight's storage (None where there is none); ``tiles()`` gives
    the gradient of all weights: ``(first output row, gradient [rows, ...])``, ascending, whole rows of blocks each.
    ``last`` marks the model's last sparse layer.
    """

    weight: Tensor
    gradient: Tensor | None
    pattern: SparsityPattern
    initial_blocks: int
    tiles: Callable[[], Iterator[tuple[int, Tensor]]]
    last: bool = False

    @property
    def grid_size(self) -> int:
        return math.prod(self.pattern.grid)

    def score_tiles(self) -> Iterator[tuple[int, Tensor]]:
        """Norms of the gradient's blocks: ``(first block, scores [n])``, tile by tile."""
        for row, tile in self.tiles():
            yield row // self.pattern.block[0] * self.pattern.grid[1], block_scores(tile, self.pattern.block)


@dataclass
class Update:
    """All layers at one update: the share of blocks to replace, and the share of updates that are done with this
    one."""

    layers: Sequence[LayerUpdate]
    fraction: float
    progress: float
    generator: torch.Generator


# ---- drop scores: of every active block, [num_blocks] in packed order; the lowest leave ----


def magnitude(layer: LayerUpdate) -> Tensor:
    """``|w|``, for blocks the Frobenius norm."""
    return active_norms(layer.weight, layer.pattern)


def relative_magnitude(layer: LayerUpdate) -> Tensor:
    """``|w| / sum of |w| over the row``: a weight's share of its output, for blocks of Frobenius norms.

    Batch norm after a layer makes the scale of a row arbitrary. If few weights are left, those of a few large rows
    displace all others, and outputs lose their last weight. By this score the only weight of a row ranks highest. Use
    it with growth by gradient: random growth revives outputs by itself (docs/methods.md has figures). RIA (Zhang et
    al., ICLR 2024) prunes by this share plus that of the column.
    """
    norms = magnitude(layer)
    lengths = row_counts(layer.pattern).to(torch.int64)
    sums = torch.segment_reduce(norms, "sum", lengths=lengths)  # in a fixed order: processes must agree
    return norms.div_(sums.clamp_(min=torch.finfo(norms.dtype).tiny).repeat_interleave(lengths, output_size=len(norms)))


def magnitude_and_gradient(weight_of_gradient: float) -> Callable[[LayerUpdate], Tensor]:
    """``|w| + lambda * |dL/dw|`` (MEST, arXiv 2110.14032), for blocks of Frobenius norms."""

    def score(layer: LayerUpdate) -> Tensor:
        norms = magnitude(layer)
        if layer.gradient is not None:  # none: the layer took no part
            norms.add_(active_norms(layer.gradient, layer.pattern), alpha=weight_of_gradient)
        return norms

    return score


# ---- growers: counts[i] blocks of each layer, from those inactive or in dropped[i] ----


class Grower(Protocol):
    needs_gradient: bool

    def __call__(self, update: Update, dropped: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]: ...


class RandomGrowth:
    """Uniformly at random, layer after layer."""

    needs_gradient = False

    def __call__(self, update: Update, dropped: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        layers = zip(update.layers, dropped, counts, strict=True)
        return [random_candidates(layer.pattern, out, k, update.generator) for layer, out, k in layers]


class GradientGrowth:
    """The largest dense gradients. Tiles of small layers are selected together."""

    needs_gradient = True

    def __call__(self, update: Update, dropped: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        layers = zip(update.layers, dropped, counts, strict=True)
        selection = [GrowthCandidates(k, layer.pattern, out) for layer, out, k in layers]
        waiting: list[tuple[GrowthCandidates, Tensor, int]] = []
        size = 0
        for layer, candidates in zip(update.layers, selection, strict=True):
            for first, scores in layer.score_tiles():
                if size and (size + scores.numel() > tile_entries(scores.device) or waiting[-1][0] is candidates):
                    GrowthCandidates.add_many(waiting)
                    waiting, size = [], 0
                waiting.append((candidates, scores, first))
                size += scores.numel()
        GrowthCandidates.add_many(waiting)
        return GrowthCandidates.select_many(selection)


@dataclass(frozen=True)
class GroupGrowth:
    """In every group of ``m`` input channels as many as it dropped, those of the largest dense gradients."""

    m: int
    needs_gradient = True

    def __call__(self, update: Update, dropped: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        return [self._layer(layer, out) for layer, out in zip(update.layers, dropped, strict=True)]

    def _layer(self, layer: LayerUpdate, dropped: Tensor) -> Tensor:
        positions, grown = math.prod(layer.pattern.shape[2:]), [dropped[:0]]
        lost = torch.zeros(layer.grid_size // self.m, dtype=torch.int32, device=dropped.device)
        groups = groups_of(dropped, layer.pattern, self.m)
        lost.index_add_(0, groups, torch.ones_like(groups, dtype=lost.dtype))
        for first, scores in layer.score_tiles():
            prepare_scores_(scores, first, layer.pattern, dropped)
            scores.nan_to_num_(nan=-math.inf, neginf=torch.finfo(scores.dtype).min, posinf=math.inf)
            tile = scores.view(-1, self.m, positions)
            # A block's rank in its group: how many are better, of equal ones those before it.
            rank = torch.zeros_like(tile, dtype=torch.int32)
            for other in range(self.m):
                it = tile[:, other : other + 1]
                rank[:, :other] += it > tile[:, :other]
                rank[:, other + 1 :] += it >= tile[:, other + 1 :]
            wanted = lost[first // self.m :][: tile.shape[0] * positions].view(-1, 1, positions)
            grown.append((rank < wanted).view(-1).nonzero().squeeze(1) + first)
        return torch.cat(grown)


# ---- methods ----


@dataclass(frozen=True)
class Method:
    """A method from parts. At an update every layer loses the blocks of lowest score and grows ``ceil(fraction * n)``.

    Args:
        drop: score of a layer's active blocks, ``[num_blocks]``; the lowest leave.
        grow: chooses what grows instead; None for nothing.
        scope: "layer" drops the same share of each layer. "global" compares the scores of all layers (of one block
            size); every layer keeps at least its best block, and regrows as many as it lost. With gradual pruning,
            blocks are pruned globally and replaced by layer (as in GraNet).
        regrow_dropped: whether a just-dropped block may be grown again; it then stays as it is, optimiser state
            included.
        reset_regrown: whether such a block starts at zero instead, as others that are grown.
        final_sparsity: of gradual pruning, reached at the last update by the cubic schedule; None keeps the density.
            By "layer" each layer ends with it, by "global" all together.
    """

    drop: Callable[[LayerUpdate], Tensor] = magnitude
    grow: Grower | None = field(default_factory=GradientGrowth)
    scope: str = "layer"
    regrow_dropped: bool = True
    reset_regrown: bool = False
    final_sparsity: float | None = None

    def __post_init__(self) -> None:
        if self.scope not in ("layer", "global"):
            raise ValueError(f'Expected scope "layer" or "global", got {self.scope!r}.')
        if self.final_sparsity is not None and not 0 <= self.final_sparsity < 1:
            raise ValueError(f"Expected a final_sparsity in [0, 1), got {self.final_sparsity}.")
        if self.grow is None and self.final_sparsity is None:
            raise ValueError("Expected a final_sparsity for a method that grows nothing.")

    @property
    def needs_gradient(self) -> bool:
        """Whether it reads ``tiles()``."""
        return self.grow is not None and self.grow.needs_gradient

    @property
    def resizes(self) -> bool:
        """Whether a layer's number of active blocks may change."""
        return self.final_sparsity is not None

    def check(self, pattern: SparsityPattern) -> None:
        """Raises ValueError for a pattern that the method cannot keep to."""

    def update(self, update: Update) -> list[Change]:
        """What each layer drops and grows."""
        dropped, replaced = self._dropped(update)
        if self.grow is None:
            return [(out, out[:0]) for out in dropped]
        candidates = dropped if self.regrow_dropped else [out[:0] for out in dropped]
        return list(zip(dropped, self.grow(update, candidates, replaced), strict=True))

    def _dropped(self, update: Update) -> tuple[list[Tensor], list[int]]:
        """What each layer drops, and how many of it are replaced."""
        scores = [self.drop(layer) for layer in update.layers]
        pruned, replaced = self._counts(update, scores)
        counts = [p + r for p, r in zip(pruned, replaced, strict=True)]
        return drop_lowest(scores, [layer.pattern for layer in update.layers], counts), replaced

    def _counts(self, update: Update, scores: Sequence[Tensor]) -> tuple[list[int], list[int]]:
        """By layer, the blocks to drop for good and those to replace."""
        held = [layer.pattern.num_blocks for layer in update.layers]
        pruned = self._pruned(update, scores)
        replaced = [math.ceil(update.fraction * (n - p)) for n, p in zip(held, pruned, strict=True)]
        if self.grow is None:
            replaced = [0] * len(held)
        elif self.scope == "global" and self.final_sparsity is None:
            replaced = lowest_of_all(scores, sum(replaced))
        if not self.regrow_dropped:
            free = [layer.grid_size - n for layer, n in zip(update.layers, held, strict=True)]
            replaced = [min(r, f) for r, f in zip(replaced, free, strict=True)]
        return pruned, replaced

    def _pruned(self, update: Update, scores: Sequence[Tensor]) -> list[int]:
        if self.final_sparsity is None:
            return [0] * len(update.layers)
        held = [layer.pattern.num_blocks for layer in update.layers]
        sizes = [layer.grid_size for layer in update.layers]
        initial = [layer.initial_blocks for layer in update.layers]
        if self.scope == "layer":
            left = [self._left(n, size, update.progress) for n, size in zip(initial, sizes, strict=True)]
            return [max(0, n - target) for n, target in zip(held, left, strict=True)]
        left_of_all = self._left(sum(initial), sum(sizes), update.progress)
        return lowest_of_all(scores, max(0, sum(held) - left_of_all))

    def _left(self, initial: int, size: int, progress: float) -> int:
        assert self.final_sparsity is not None
        return max(1, round(size * (1 - cubic_sparsity(1 - initial / size, self.final_sparsity, progress))))


def lowest_of_all(scores: Sequence[Tensor], k: int) -> list[int]:
    """How many of the ``k`` lowest of all layers' scores each layer has; the best of each layer is never among them.

    On a GPU the host waits for these counts: the sizes of what follows depend on them.
    """
    joined = torch.cat(list(scores))
    starts = torch.tensor([0, *(s.numel() for s in scores)], device=joined.device).cumsum(0)
    best = torch.stack([s.argmax() for s in scores]) + starts[:-1]
    joined[best] = math.inf
    lowest = topk_indices(joined, min(k, joined.numel() - len(scores)), largest=False)
    return torch.searchsorted(lowest, starts).diff().tolist()


@dataclass(frozen=True)
class RigL(Method):
    """Drops the smallest magnitudes, grows the largest dense gradients (Evci et al., arXiv 1911.11134).

    On patterns of blocks it is block RigL: norms of blocks instead of magnitudes. With ``drop=relative_magnitude`` it
    keeps more outputs alive at extreme sparsity (docs/methods.md).
    """


@dataclass(frozen=True)
class SET(Method):
    """Drops the smallest magnitudes, grows at random (Mocanu et al., arXiv 1707.04780)."""

    grow: Grower | None = field(default_factory=RandomGrowth)


@dataclass(frozen=True)
class MEST(Method):
    """Drops the smallest ``|w| + lambda * |gradient|``, grows at random (Yuan et al., arXiv 2110.14032).

    This is its elastic mutation; the soft memory bound, which grows first and drops after some training, is left out.
    Lambda is a hyper-parameter.
    """

    drop: Callable[[LayerUpdate], Tensor] = field(default_factory=lambda: magnitude_and_gradient(0.5))
    grow: Grower | None = field(default_factory=RandomGrowth)

    def update(self, update: Update) -> list[Change]:
        if all(layer.gradient is None for layer in update.layers):
            raise RuntimeError("MEST: expected gradients at the update, got none; call step() before zero_grad().")
        return super().update(update)


@dataclass(frozen=True)
class GMP(Method):
    """Gradual magnitude pruning: to a final sparsity by the cubic schedule, no regrowth (arXiv 1710.01878)."""

    grow: Grower | None = None
    final_sparsity: float | None = 0.9


@dataclass(frozen=True)
class GraNet(Method):
    """Gradual pruning with regrowth (Liu et al., arXiv 2106.10404): at each update magnitudes are pruned globally by
    the cubic schedule, then each layer replaces its smallest magnitudes by the largest dense gradients."""

    scope: str = "global"
    final_sparsity: float | None = 0.9


@dataclass(frozen=True)
class NOfM(Method):
    """RigL that keeps N of every M neighbouring input channels: a group grows as many as it dropped, by gradient.

    The pattern must be N:M already (``sparsify(..., structure="2:4")``) and have 1x1 blocks.
    """

    grow: Grower | None = field(default_factory=lambda: GroupGrowth(4))
    n: int = 2

    @classmethod
    def of(cls, structure: str) -> NOfM:
        """For "N:M"."""
        n, m = parse_n_of_m(structure)
        return cls(grow=GroupGrowth(m), n=n)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.grow, GroupGrowth) or not 0 < self.n < self.grow.m:
            raise ValueError(f"Expected GroupGrowth(m) and 0 < n < m, got {self.grow} and n = {self.n}.")
        if not self.regrow_dropped:
            raise ValueError("NOfM: expected regrow_dropped; a small group may have nothing else to grow.")

    def check(self, pattern: SparsityPattern) -> None:
        assert isinstance(self.grow, GroupGrowth)
        m = self.grow.m
        check_n_of_m(pattern, m)
        counts = torch.bincount(groups_of(pattern.blocks(), pattern, m), minlength=math.prod(pattern.grid) // m)
        if not bool((counts == self.n).all()):
            raise ValueError(
                f"Expected {self.n} active weights in every {m} input channels, got {int(counts.min())} to "
                f'{int(counts.max())}; call sparsify(model, {1 - self.n / m:g}, structure="{self.n}:{m}") first.'
            )


@dataclass(frozen=True)
class SRigL(Method):
    """RigL with a constant fan-in and neuron ablation (Lasby et al., arXiv 2305.02299, section 3, and their code).

    A row's salient blocks are those that survive the drop and those among the layer's largest gradients, as many as are
    dropped. Rows with fewer than ``max(1, int(min_salient * fan-in at first))`` are ablated: all they have is dropped.
    So many rows are left that their fan-in, ``initial blocks // rows left``, fits into a row; blocks that this rounds
    off, fewer than rows are left, are not active. Then the smallest magnitudes of the rows left are dropped, and every
    row grows up to the fan-in by its own largest gradients, which are computed a second time. Every update asks anew:
    an ablated row comes back when enough of the largest gradients are its own. The rows of the model's last sparse
    layer are never ablated, nor is any with ``min_salient=0``.

    The pattern must have a constant fan-in already: ``sparsify(..., structure="fan-in")``.
    """

    min_salient: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_salient <= 1:
            raise ValueError(f"Expected min_salient in [0, 1], got {self.min_salient}.")
        plain = self.scope == "layer" and self.final_sparsity is None and self.regrow_dropped
        if not plain or not isinstance(self.grow, GradientGrowth):
            raise ValueError("SRigL: only drop and min_salient can be changed.")

    @property
    def resizes(self) -> bool:
        return True

    def check(self, pattern: SparsityPattern) -> None:
        counts = row_counts(pattern)
        if not bool(((counts == counts.max()) | (counts == 0)).all()):
            raise ValueError(
                f"Expected the same number of active blocks in each row, got {int(counts.min())} to {int(counts.max())}"
                '; call sparsify(model, sparsity, structure="fan-in") first.'
            )

    def update(self, update: Update) -> list[Change]:
        assert self.grow is not None
        scores = [self.drop(layer) for layer in update.layers]
        _, counts = self._counts(update, scores)
        dropped = drop_lowest(scores, [layer.pattern for layer in update.layers], counts)
        wanted = self.grow(update, [layer.pattern.blocks() for layer in update.layers], counts)
        parts = zip(update.layers, scores, dropped, wanted, strict=True)
        return [self._layer(*part) for part in parts]

    def _layer(self, layer: LayerUpdate, scores: Tensor, dropped: Tensor, wanted: Tensor) -> Change:
        """``dropped`` are the layer's lowest scores, ``wanted`` its largest gradients, whether active or not."""
        pattern, (rows, columns) = layer.pattern, layer.pattern.grid
        alive = self._alive(layer, dropped, wanted)
        # The host needs these numbers: they are sizes.
        fan_in = layer.initial_blocks // int(alive.sum())
        active = pattern.blocks()
        row_of = active // columns
        scores = scores.masked_fill(~alive[row_of], -math.inf)
        lost = max(dropped.numel(), int((~alive[row_of]).sum()))
        dropped = drop_lowest([scores], [pattern], [lost])[0]
        keep = torch.ones_like(active, dtype=torch.bool)
        keep[torch.searchsorted(active, dropped)] = False
        held = torch.bincount(row_of[keep], minlength=rows)
        # Rows that came back lower the fan-in of all: what is too much in a row leaves, the smallest first.
        by_row = scores[keep].split(held.tolist())
        excess = [max(0, row.numel() - fan_in) for row in by_row]
        if any(excess):
            places, starts = topk_indices_many(by_row, excess, largest=False), (held.cumsum(0) - held).tolist()
            more = torch.cat([place + start for place, start in zip(places, starts, strict=True)])
            dropped = torch.cat([dropped, active[keep][more]]).sort().values
        missing = torch.where(alive, (fan_in - held).clamp(min=0), 0).tolist()
        grown = [dropped[:0]]
        for first, tile in layer.score_tiles():
            prepare_scores_(tile, first, pattern, dropped)
            by_row = tile.view(-1, columns).unbind()
            row = first // columns
            picked = topk_indices_many(by_row, missing[row : row + len(by_row)])
            grown += [places + (row + i) * columns for i, places in enumerate(picked) if places.numel()]
        return dropped, torch.cat(grown)

    def _alive(self, layer: LayerUpdate, dropped: Tensor, wanted: Tensor) -> Tensor:
        """Which rows are not ablated: bool ``[rows]``."""
        rows, columns = layer.pattern.grid
        fewest = layer.initial_blocks // columns  # rows that would have to be full
        if layer.last or self.min_salient == 0 or fewest >= rows:
            return torch.ones(rows, dtype=torch.bool, device=dropped.device)
        survivors = kept_blocks(layer.pattern, dropped)
        salient = torch.cat([survivors, wanted]).unique()
        counts = torch.bincount(salient // columns, minlength=rows)
        needed = max(1, int(self.min_salient * (layer.initial_blocks // rows)))
        return counts >= counts.sort(descending=True).values[fewest].clamp(max=needed)


METHODS: dict[str, Callable[[], Method]] = {
    "rigl": RigL,
    "set": SET,
    "mest": MEST,
    "gmp": GMP,
    "granet": GraNet,
    "srigl": SRigL,
}
