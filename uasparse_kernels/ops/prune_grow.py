"""Prune-and-grow of one sparse weight: the smallest active blocks leave, as many others come, all in place.

:func:`prune_grow` is the whole update where the scores of all blocks are at hand. Its pieces serve updates that never
hold them all: :func:`drop_candidates`, then :class:`GrowthCandidates` over tiles of scores (:func:`block_scores`) or
:func:`random_candidates`, then :func:`apply`. Blocks are named by their flat index into the grid of blocks
(``SparsityPattern.blocks``): int64, ascending.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from uasparse_kernels import _library
from uasparse_kernels.ops._common import pattern_tensors
from uasparse_kernels.ops.topk_indices import topk_indices, topk_indices_reference
from uasparse_kernels.pattern import SparsityPattern, sample_indices


class PruneGrowResult(NamedTuple):
    """The blocks that left and those that came: flat grid indices, int64, ascending. They may overlap."""

    dropped: Tensor
    grown: Tensor


@torch.no_grad()
def prune_grow(
    weight: Tensor,
    pattern: SparsityPattern,
    fraction: float,
    *,
    grow: str = "gradient",
    grow_scores: Tensor | None = None,
    generator: torch.Generator | None = None,
    states: Sequence[Tensor] = (),
) -> PruneGrowResult:
    """One topology update as in RigL (arXiv 1911.11134) or SET: ``weight``, ``states`` and ``pattern`` change in place.

    The ``ceil(fraction * blocks)`` active blocks of smallest norm are dropped and as many are grown, so that the count
    never changes. A just-dropped block is a candidate for growth. Grown blocks start at zero, with zero state; what was
    kept is kept bit for bit. Equal scores: the lower index first.

    Args:
        weight: packed or dense-stored. Only its magnitude counts: Frobenius norms of blocks.
        fraction: share of the active blocks to replace, in [0, 1].
        grow: "gradient" takes the largest magnitudes of ``grow_scores``, "random" draws uniformly.
        grow_scores: of ``pattern.shape``, for "gradient": the dense gradient. NaN counts as -inf.
        generator: CPU generator of the draw, for "random".
        states: tensors of the weight's shape that move with it (optimizer state, a gradient in flight).

    Raises:
        ValueError, TypeError: if shapes, dtypes, devices or options do not fit. Nothing is changed then.
    """
    _check(weight, pattern, fraction, grow, grow_scores, states)
    k = drop_count(fraction, pattern)
    dropped = drop_candidates(weight, pattern, k)
    if grow == "random":
        grown = random_candidates(pattern, dropped, k, generator)
    else:
        candidates = GrowthCandidates(k, pattern, dropped)
        assert grow_scores is not None  # checked
        candidates.add(block_scores(grow_scores, pattern.block), 0)
        grown = candidates.select()
    apply(weight, pattern, dropped, grown, states)
    return PruneGrowResult(dropped, grown)


def drop_count(fraction: float, pattern: SparsityPattern) -> int:
    """Number of blocks that an update replaces: ``ceil(fraction * blocks)``."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"prune_grow: expected a fraction in [0, 1], got {fraction}.")
    return min(pattern.num_blocks, math.ceil(fraction * pattern.num_blocks))


@torch.no_grad()
def drop_candidates(weight: Tensor, pattern: SparsityPattern, k: int) -> Tensor:
    """The ``k`` active blocks of smallest norm; linear in the active weights."""
    values = weight if pattern.is_packed(weight) else pattern.pack(weight)
    if pattern.block == (1, 1):
        places = topk_indices(values, k, largest=False, magnitude=True)
    else:
        places = topk_indices(_norms(values.flatten(1)), k, largest=False)
    rows = torch.searchsorted(pattern.crow, places.to(torch.int32), right=True) - 1
    return rows * pattern.grid[1] + pattern.col[places]


@torch.no_grad()
def block_scores(dense_rows: Tensor, block: Sequence[int]) -> Tensor:
    """Norms of the blocks of whole grid rows of a dense tensor, in the order of flat grid indices.

    Args:
        dense_rows: ``[rows * bh, in]`` or ``[rows * bh, in, kh, kw]``: a tile of the weight's gradient, or all of it.
        block: ``(bh, bw)``.

    Returns:
        A new tensor ``[rows * columns]``, float32 or float64: absolute values for 1x1 blocks, else Frobenius norms.
    """
    if tuple(block) == (1, 1):
        return dense_rows.detach().to(_score_dtype(dense_rows)).abs().reshape(-1)
    (bh, bw), (out, inp) = block, dense_rows.shape[:2]
    # Squares are summed over the rows of a block first: what is left for the columns is bh times smaller.
    squares = dense_rows.detach().to(_score_dtype(dense_rows)).square().reshape(out // bh, bh, -1).sum(1)
    return squares.view(out // bh, inp // bw, bw, -1).sum(2).sqrt().reshape(-1)


class GrowthCandidates:
    """A running selection of the ``k`` best blocks to grow, over tiles of scores, without holding all scores.

    Active blocks that are not dropped are left out. At most ``4 * k`` candidates are held, whatever the tiles.

    Example:
        >>> candidates = GrowthCandidates(k, pattern, dropped)
        >>> for row, tile in tiles:  # whole grid rows of the dense gradient, from the first to the last
        ...     candidates.add(block_scores(tile, pattern.block), row * pattern.grid[1])
        >>> grown = candidates.select()
    """

    def __init__(self, k: int, pattern: SparsityPattern, dropped: Tensor):
        free = math.prod(pattern.grid) - pattern.num_blocks + dropped.numel()
        if not 0 <= k <= free:
            raise ValueError(f"GrowthCandidates: expected k in [0, {free}], the inactive or dropped blocks, got {k}.")
        self.k, self.pattern, self.dropped = k, pattern, dropped
        self._end = 0
        self._indices: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._held = 0
        self._least: Tensor | None = None

    @torch.no_grad()
    def add(self, tile_scores: Tensor, first_index: int) -> None:
        """Takes the scores of the blocks ``[first_index, first_index + n)``, which must follow those of the last call.

        ``tile_scores [n]`` (float32 or float64; NaN counts as -inf) is overwritten where blocks are kept.
        """
        if first_index != self._end:
            raise ValueError(f"GrowthCandidates: expected the tile from block {self._end} on, got {first_index}.")
        n, total = tile_scores.numel(), math.prod(self.pattern.grid)
        if tile_scores.dim() != 1 or first_index + n > total:
            raise ValueError(
                f"GrowthCandidates: expected a row of at most {total - first_index} scores, got shape "
                f"{tuple(tile_scores.shape)}."
            )
        self._end += n
        if self.k == 0:
            return
        tile_scores.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        exclude_kept_(tile_scores, first_index, self.pattern, self.dropped)
        places = self._promising(tile_scores)
        self._indices.append(places + first_index)
        self._scores.append(tile_scores[places])
        self._held += places.numel()
        if self._held > 2 * self.k:
            self._reduce()

    @torch.no_grad()
    def select(self) -> Tensor:
        """The ``k`` best of all tiles: flat grid indices, int64, ascending; of equal scores the lower index."""
        if self._end != math.prod(self.pattern.grid):
            raise ValueError(
                f"GrowthCandidates: expected the scores of all {math.prod(self.pattern.grid)} blocks, got {self._end}."
            )
        if self.k == 0:
            return self.pattern.col.new_empty(0, dtype=torch.int64)
        self._reduce()
        return self._indices[0]

    def _promising(self, scores: Tensor) -> Tensor:
        """Places in a tile that can be among the best ``k`` of all: at most ``2 * k``."""
        if scores.device.type == "cpu" and self._least is not None:
            # A later block must be better than the k-th best so far. On a GPU the host would wait for this count.
            places = (scores > self._least).nonzero().squeeze(1)
            if places.numel() <= 2 * self.k:
                return places
        return topk_indices(scores, min(self.k, scores.numel()))

    def _reduce(self) -> None:
        indices, scores = torch.cat(self._indices), torch.cat(self._scores)
        best = topk_indices(scores, min(self.k, scores.numel()))
        self._indices, self._scores = [indices[best]], [scores[best]]
        self._held = best.numel()
        if self._held == self.k:
            self._least = self._scores[0].min()


@torch.no_grad()
def random_candidates(
    pattern: SparsityPattern, dropped: Tensor, k: int, generator: torch.Generator | None = None
) -> Tensor:
    """``k`` blocks drawn uniformly from those inactive or dropped; memory grows with the active blocks, not with all.

    ``generator`` is a CPU generator; the draw does not depend on the pattern's device.
    """
    kept = kept_blocks(pattern, dropped)
    free = math.prod(pattern.grid) - kept.numel()
    ranks = sample_indices(free, k, generator).to(pattern.device)
    # The i-th kept block has kept[i] - i free ones before it: rank r is moved up by the kept blocks at or before it.
    free_before = kept - torch.arange(kept.numel(), device=kept.device)
    return ranks + torch.searchsorted(free_before, ranks, right=True)


@torch.no_grad()
def apply(
    weight: Tensor, pattern: SparsityPattern, dropped: Tensor, grown: Tensor, states: Sequence[Tensor] = ()
) -> None:
    """Replaces the blocks ``dropped`` by ``grown`` in the weight, the states and the pattern, in place.

    All keep their identity and storage; grown entries become zero, in the states too. Linear time.

    Raises:
        ValueError, TypeError: if blocks are not distinct and ascending, dropped ones not active, grown ones active and
            not dropped, or states not of the weight's shape. Nothing is changed then.
    """
    _check_states(weight, pattern, states)
    if not _library.has_kernel("prune_grow_", weight):
        _apply_reference(weight, pattern, dropped, grown, states)
        return
    tensors = pattern_tensors(pattern)
    data = [t.detach() for t in (weight, *states)]
    torch.ops.uasparse.prune_grow_(data[0], data[1:], *tensors, dropped, grown, pattern.shape, pattern.block)
    # A graph that saved the old values must not be used any more, and autograd can tell.
    torch.autograd.graph.increment_version([*data, *tensors])


@torch.no_grad()
def exclude_kept_(scores: Tensor, first: int, pattern: SparsityPattern, dropped: Tensor) -> None:
    """Sets the scores of kept blocks (active, not dropped) among ``[first, first + n)`` to NaN, in place."""
    if _library.has_kernel("exclude_kept_", scores):
        torch.ops.uasparse.exclude_kept_(scores, first, pattern.crow, pattern.col, dropped, pattern.grid[1])
        return
    kept = kept_blocks(pattern, dropped) - first
    scores[kept[(kept >= 0) & (kept < scores.numel())]] = math.nan


def prune_grow_reference(
    weight: Tensor,
    pattern: SparsityPattern,
    fraction: float,
    *,
    grow: str = "gradient",
    grow_scores: Tensor | None = None,
    generator: torch.Generator | None = None,
    states: Sequence[Tensor] = (),
) -> PruneGrowResult:
    """What :func:`prune_grow` computes, in plain torch, by sorting; in place too."""
    _check(weight, pattern, fraction, grow, grow_scores, states)
    k = drop_count(fraction, pattern)
    values = weight.detach() if pattern.is_packed(weight) else pattern.pack(weight.detach())
    active = pattern.blocks()
    dropped = active[topk_indices_reference(_norms(values.reshape(pattern.num_blocks, -1)), k, largest=False)]
    if grow == "random":
        grown = random_candidates(pattern, dropped, k, generator)
    else:
        assert grow_scores is not None  # checked
        scores = block_scores(grow_scores, pattern.block).nan_to_num(-math.inf, math.inf, -math.inf)
        scores[kept_blocks(pattern, dropped)] = math.nan
        grown = topk_indices_reference(scores, k)
    _apply_reference(weight, pattern, dropped, grown, states)
    return PruneGrowResult(dropped, grown)


@torch.no_grad()
def _apply_reference(weight, pattern, dropped, grown, states) -> None:
    """By way of dense tensors, for a packed weight too."""
    kept = kept_blocks(pattern, dropped)
    new = SparsityPattern.from_blocks(pattern.shape, torch.cat([kept, grown]).sort().values, block=pattern.block)
    rest = SparsityPattern.from_blocks(pattern.shape, kept, block=pattern.block).to_mask()
    for tensor in (weight, *states):
        if pattern.is_packed(tensor):
            dense = pattern.unpack(tensor)
            tensor.copy_(new.pack(torch.where(rest, dense, torch.zeros_like(dense))))
        else:
            changed = (pattern.to_mask() | new.to_mask()) & ~rest
            tensor.masked_fill_(changed, 0)
    pattern.assign_(new)


def kept_blocks(pattern: SparsityPattern, dropped: Tensor) -> Tensor:
    """Flat indices of the active blocks that are not dropped, ascending."""
    active = pattern.blocks()
    keep = torch.ones_like(active, dtype=torch.bool)
    keep[torch.searchsorted(active, dropped.contiguous())] = False
    return active[keep]


def _score_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _norms(blocks: Tensor) -> Tensor:
    return torch.linalg.vector_norm(blocks.detach(), dim=1, dtype=_score_dtype(blocks))


def _check(weight, pattern, fraction, grow, grow_scores, states) -> None:
    drop_count(fraction, pattern)
    _check_states(weight, pattern, states)
    if not weight.is_floating_point():
        raise TypeError(f"prune_grow: expected a floating-point weight, got {weight.dtype}.")
    if grow not in ("gradient", "random"):
        raise ValueError(f"prune_grow: expected grow='gradient' or 'random', got {grow!r}.")
    if grow == "random":
        if grow_scores is not None:
            raise ValueError("prune_grow: expected no grow_scores for grow='random'.")
        return
    if grow_scores is None or tuple(grow_scores.shape) != pattern.shape:
        got = "none" if grow_scores is None else f"shape {tuple(grow_scores.shape)}"
        raise ValueError(f"prune_grow: expected grow_scores of shape {pattern.shape} for grow='gradient', got {got}.")
    if grow_scores.device != weight.device:
        raise ValueError(
            f"prune_grow: expected weight and grow_scores on one device, got {weight.device} and {grow_scores.device}."
        )
    if not grow_scores.is_floating_point():
        raise TypeError(f"prune_grow: expected floating-point grow_scores, got {grow_scores.dtype}.")


def _check_states(weight: Tensor, pattern: SparsityPattern, states: Sequence[Tensor]) -> None:
    pattern.is_packed(weight)
    if pattern.device != weight.device:
        raise ValueError(
            f"prune_grow: expected weight and pattern on one device, got {weight.device} and {pattern.device}."
        )
    for state in states:
        if state.shape != weight.shape or state.device != weight.device:
            raise ValueError(
                f"prune_grow: expected states of the weight's shape {tuple(weight.shape)} on {weight.device}, got "
                f"{tuple(state.shape)} on {state.device}; leave other states (a step count) out."
            )


@_library.register_fake("prune_grow_")
def _fake(weight, states, crow, col, ccol, row, perm, dropped, grown, shape, block):
    return None


@_library.register_fake("exclude_kept_")
def _exclude_fake(scores, first, crow, col, dropped, columns):
    return None
