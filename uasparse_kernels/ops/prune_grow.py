"""Prune-and-grow of one sparse weight: the smallest active blocks leave, as many others come, all in place.

:func:`prune_grow` is the whole update where the scores of all blocks are at hand. Its pieces serve updates that never
hold them all: :func:`drop_lowest` of :func:`active_norms`, then :class:`GrowthCandidates` over tiles of scores
(:func:`block_scores`) or :func:`random_candidates`, then :func:`apply`, or :func:`resize` where more leave than come.
Those that select take many layers at once, which on a GPU is one set of launches. Blocks are named by their flat index
into the grid of blocks (``SparsityPattern.blocks``): int64, ascending.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from uasparse_kernels import _library
from uasparse_kernels._grid import sample_indices
from uasparse_kernels.ops._common import pattern_tensors, replace_data_
from uasparse_kernels.ops.topk_indices import indices_above, topk_indices_many, topk_indices_reference
from uasparse_kernels.pattern import SparsityPattern


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
    regrow_dropped: bool = True,
    reset_regrown: bool = False,
) -> PruneGrowResult:
    """One topology update as in RigL (arXiv 1911.11134) or SET: ``weight``, ``states`` and ``pattern`` change in place.

    The ``ceil(fraction * blocks)`` active blocks of smallest norm are dropped and as many are grown, so that the count
    never changes. What was inactive starts at zero, with zero state; what was kept, or dropped and grown again, stays
    bit for bit, as in the code of RigL's authors. Equal scores: the lower index first.

    Args:
        weight: packed or dense-stored. Only its magnitude counts: Frobenius norms of blocks.
        fraction: share of the active blocks to replace, in [0, 1].
        grow: "gradient" takes the largest magnitudes of ``grow_scores``, "random" draws uniformly.
        grow_scores: of ``pattern.shape``, for "gradient": the dense gradient. NaN counts as -inf.
        generator: CPU generator of the draw, for "random".
        states: tensors of the weight's shape that move with it (optimizer state, a gradient in flight).
        regrow_dropped: whether a just-dropped block is a candidate for growth. Without, no more blocks are replaced
            than were inactive.
        reset_regrown: whether a block that is dropped and grown again starts at zero, too.

    Raises:
        ValueError, TypeError: if shapes, dtypes, devices or options do not fit. Nothing is changed then.
    """
    _check(weight, pattern, fraction, grow, grow_scores, states)
    k = drop_count(fraction, pattern, regrow_dropped)
    dropped = drop_candidates(weight, pattern, k)
    candidates_too = dropped if regrow_dropped else dropped[:0]
    if grow == "random":
        grown = random_candidates(pattern, candidates_too, k, generator)
    else:
        assert grow_scores is not None  # checked
        grown = _grow_largest(grow_scores, k, pattern, candidates_too)
    apply(weight, pattern, dropped, grown, states, reset_regrown=reset_regrown)
    return PruneGrowResult(dropped, grown)


def _grow_largest(dense: Tensor, k: int, pattern: SparsityPattern, dropped: Tensor) -> Tensor:
    """The ``k`` blocks of largest norm that are inactive or dropped."""
    dense = dense.detach()
    fits = pattern.block == (1, 1) and dense.is_contiguous() and dense.dtype == _score_dtype(dense) and dense.numel()
    if fits and dense.device.type == "cpu" and _library.has_kernel("growth_indices", dense):
        return torch.ops.uasparse.growth_indices(dense, k, pattern.crow, pattern.col, dropped)  # reads them once
    scores = block_scores(dense, pattern.block)
    prepare_scores_(scores, 0, pattern, dropped)
    return topk_indices_many([scores], [k])[0]


def drop_count(fraction: float, pattern: SparsityPattern, regrow_dropped: bool = True) -> int:
    """Number of blocks that an update replaces: ``ceil(fraction * blocks)``, or what is inactive if that is all it may
    grow."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"prune_grow: expected a fraction in [0, 1], got {fraction}.")
    most = pattern.num_blocks if regrow_dropped else math.prod(pattern.grid) - pattern.num_blocks
    return min(most, math.ceil(fraction * pattern.num_blocks))


@torch.no_grad()
def drop_candidates(weight: Tensor, pattern: SparsityPattern, k: int) -> Tensor:
    """The ``k`` active blocks of smallest norm; linear in the active weights."""
    return drop_lowest([active_norms(weight, pattern)], [pattern], [k])[0]


@torch.no_grad()
def active_norms(weight: Tensor, pattern: SparsityPattern) -> Tensor:
    """Norm of every active block, in packed order: float32 or float64 ``[num_blocks]``; absolute values for 1x1."""
    values = (weight if pattern.is_packed(weight) else pattern.pack(weight)).detach()
    if pattern.block == (1, 1):
        return values.to(_score_dtype(values)).abs()
    return _norms(values.flatten(1))


@torch.no_grad()
def drop_lowest(scores: Sequence[Tensor], patterns: Sequence[SparsityPattern], counts: Sequence[int]) -> list[Tensor]:
    """Of each layer the ``counts[i]`` active blocks of lowest ``scores[i]`` (``[num_blocks]``, in packed order)."""
    dropped = []
    for pattern, places in zip(patterns, topk_indices_many(scores, counts, largest=False), strict=True):
        if _library.has_kernel("blocks_at", places):
            dropped.append(torch.ops.uasparse.blocks_at(pattern.crow, pattern.col, places, pattern.grid[1]))
            continue
        rows = torch.searchsorted(pattern.crow, places.to(torch.int32), right=True)
        dropped.append(rows.sub_(1).mul_(pattern.grid[1]).add_(pattern.col[places]))
    return dropped


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

    Active blocks that are not in ``dropped`` are left out. At most ``4 * k`` candidates are held, whatever the tiles.

    Example:
        >>> candidates = GrowthCandidates(k, pattern, dropped)
        >>> for row, tile in tiles:  # whole grid rows of the dense gradient, from the first to the last
        ...     candidates.add(block_scores(tile, pattern.block), row * pattern.grid[1])
        >>> grown = candidates.select()
    """

    def __init__(self, k: int, pattern: SparsityPattern, dropped: Tensor):
        if dropped.dim() != 1 or dropped.dtype != torch.int64 or dropped.device != pattern.device:
            raise ValueError(
                f"GrowthCandidates: expected dropped blocks as one row of int64 indices on {pattern.device}, got shape "
                f"{tuple(dropped.shape)} of {dropped.dtype} on {dropped.device}."
            )
        free = math.prod(pattern.grid) - pattern.num_blocks + dropped.numel()
        if not 0 <= k <= free:
            raise ValueError(f"GrowthCandidates: expected k in [0, {free}], the inactive or dropped blocks, got {k}.")
        self.k, self.pattern, self.dropped = k, pattern, dropped
        self._end = 0
        self._index_dtype = torch.int32 if math.prod(pattern.grid) < 2**31 else torch.int64
        self._indices: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._held = 0
        self._least: float | None = None

    def add(self, tile_scores: Tensor, first_index: int) -> None:
        """Takes the scores of the blocks ``[first_index, first_index + n)``, which must follow those of the last call.

        ``tile_scores [n]`` (float32 or float64; NaN counts as -inf) is overwritten where blocks are kept.
        """
        self.add_many([(self, tile_scores, first_index)])

    def select(self) -> Tensor:
        """The ``k`` best of all tiles: flat grid indices, int64, ascending; of equal scores the lower index."""
        return self.select_many([self])[0]

    @staticmethod
    @torch.no_grad()
    def add_many(tiles: Sequence[tuple[GrowthCandidates, Tensor, int]]) -> None:
        """:meth:`add` of tiles of several layers (one of each), selected together."""
        waiting = []
        for candidates, scores, first in tiles:
            candidates._follow(scores, first)
            if candidates.k == 0:
                continue
            prepare_scores_(scores, first, candidates.pattern, candidates.dropped)
            places = candidates._better(scores)
            if places is None:
                waiting.append((candidates, scores, first))
            else:
                candidates._hold(scores, first, places)
        counts = [min(candidates.k, scores.numel()) for candidates, scores, _ in waiting]
        best = topk_indices_many([scores for _, scores, _ in waiting], counts)
        for (candidates, scores, first), places in zip(waiting, best, strict=True):
            candidates._hold(scores, first, places)
        GrowthCandidates._reduce([candidates for candidates, _, _ in tiles if candidates._held > 2 * candidates.k])

    @staticmethod
    @torch.no_grad()
    def select_many(layers: Sequence[GrowthCandidates]) -> list[Tensor]:
        """:meth:`select` of several layers, together."""
        for candidates in layers:
            total = math.prod(candidates.pattern.grid)
            if candidates._end != total:
                raise ValueError(f"GrowthCandidates: expected the scores of all {total} blocks, got {candidates._end}.")
        GrowthCandidates._reduce([candidates for candidates in layers if candidates.k > 0])
        nothing = [candidates.pattern.col.new_empty(0, dtype=torch.int64) for candidates in layers]
        return [c._indices[0].to(torch.int64) if c.k > 0 else none for c, none in zip(layers, nothing, strict=True)]

    def _follow(self, scores: Tensor, first: int) -> None:
        if first != self._end:
            raise ValueError(f"GrowthCandidates: expected the tile from block {self._end} on, got {first}.")
        n, total = scores.numel(), math.prod(self.pattern.grid)
        if scores.dim() != 1 or first + n > total:
            raise ValueError(
                f"GrowthCandidates: expected a row of at most {total - first} scores, got shape {tuple(scores.shape)}."
            )
        self._end += n

    def _better(self, scores: Tensor) -> Tensor | None:
        """Places in a tile that are better than the k-th best so far, where that is known and few (at most ``2 * k``).

        A later block must be better, not equal. On a GPU the host would wait for the count: None.
        """
        if self._least is None:
            return None
        places = indices_above(scores, self._least)
        return places if places.numel() <= 2 * self.k else None

    def _hold(self, scores: Tensor, first: int, places: Tensor) -> None:
        self._indices.append((places + first).to(self._index_dtype))
        self._scores.append(scores[places])
        self._held += places.numel()

    @staticmethod
    def _reduce(layers: Sequence[GrowthCandidates]) -> None:
        for candidates in layers:  # one after the other, what was joined is let go
            candidates._scores = [torch.cat(candidates._scores)]
        scores = [candidates._scores[0] for candidates in layers]
        counts = [min(c.k, s.numel()) for c, s in zip(layers, scores, strict=True)]
        for candidates, held, best in zip(layers, scores, topk_indices_many(scores, counts), strict=True):
            candidates._scores = [held[best]]
            candidates._indices = [torch.cat(candidates._indices)]
            candidates._indices = [candidates._indices[0][best]]
            candidates._held = best.numel()
            if candidates._held == candidates.k and held.device.type == "cpu":
                least = float(candidates._scores[0].min())
                # NaN: kept blocks are among them still, for want of others.
                candidates._least = None if math.isnan(least) else least


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
    weight: Tensor,
    pattern: SparsityPattern,
    dropped: Tensor,
    grown: Tensor,
    states: Sequence[Tensor] = (),
    *,
    reset_regrown: bool = False,
) -> None:
    """Replaces the blocks ``dropped`` by ``grown`` in the weight, the states and the pattern, in place.

    All keep their identity and storage. Blocks in both lists stay as they are, or become zero with ``reset_regrown``;
    others that are grown become zero, in the states too. What is the same memory as the weight or another state (as
    the old weight is that some SAMs put back by ``p.data = old``) moves once. Linear time.

    Raises:
        ValueError, TypeError: if blocks are not distinct and ascending, dropped ones not active, grown ones active and
            not dropped, or states not of the weight's shape. Nothing is changed then.
    """
    _check_states(weight, pattern, states)
    data = _of_own_memory([t.detach() for t in (weight, *states)])
    in_rows = not pattern.is_packed(weight) or all(tensor.is_contiguous() for tensor in data)
    if not (in_rows and _library.has_kernel("prune_grow_", weight)):
        _apply_reference(data[0], pattern, dropped, grown, data[1:], reset_regrown)
        return
    tensors = pattern_tensors(pattern)
    torch.ops.uasparse.prune_grow_(data[0], data[1:], *tensors, dropped, grown, pattern.shape, pattern.block)
    # A graph that saved the old values must not be used any more, and autograd can tell.
    if reset_regrown:
        _zero_blocks(data, pattern, grown)
    torch.autograd.graph.increment_version([*data, *tensors])
    pattern.changed_()


@torch.no_grad()
def resize(
    weight: Tensor,
    pattern: SparsityPattern,
    dropped: Tensor,
    grown: Tensor,
    states: Sequence[Tensor] = (),
    *,
    reset_regrown: bool = False,
) -> None:
    """:func:`apply` where fewer (or more) blocks come than leave: the pattern takes another number of active blocks.

    Tensor objects keep their identity: a packed weight and its states get new data of the new size, dense-stored ones
    change in place. What holds their old size (a CUDA graph, the buckets of DistributedDataParallel, a graph that
    awaits its backward) is outdated by it. No host sync.

    Raises:
        ValueError: on the CPU if dropped blocks are not active, or blocks are not distinct and ascending.
    """
    _check_states(weight, pattern, states)
    active, count = pattern.blocks(), pattern.num_blocks - dropped.numel()
    keep = torch.ones_like(active, dtype=torch.bool)
    places = torch.searchsorted(active, dropped.contiguous()).clamp(max=max(0, active.numel() - 1))
    keep.index_fill_(0, places, False)  # an assignment would wait for a GPU
    old = torch.nonzero_static(keep, size=count).squeeze(1)
    blocks, order = torch.cat([active[old], grown]).sort()
    if blocks.device.type == "cpu":
        rises = (dropped[1:] > dropped[:-1]).all() and (blocks[1:] > blocks[:-1]).all()
        if not (rises and torch.equal(active[places], dropped)):
            raise ValueError("resize: expected active blocks to drop and inactive or dropped ones to grow, ascending.")
    size = pattern.block[0] * pattern.block[1]
    tensors = [tensor.detach() for tensor in (weight, *states)]
    if pattern.is_packed(weight):
        # The old place of every new block; behind the last one is a zero.
        zero = active.numel()
        places = torch.searchsorted(active, grown)
        places.masked_fill_(torch.cat([active, active.new_full((1,), -1)])[places] != grown, zero)
        if reset_regrown:
            places.fill_(zero)
        source = torch.cat([old, places])[order]
        for tensor, holder in zip(tensors, (weight, *states), strict=True):
            values = tensor.reshape(-1, size)
            values = torch.cat([values, values.new_zeros(1, size)])[source]
            replace_data_(holder, values.view(blocks.numel(), *weight.shape[1:]))
    else:
        changed = pattern.mask_of(dropped)
        changed = changed | pattern.mask_of(grown) if reset_regrown else changed ^ pattern.mask_of(grown)
        for tensor in tensors:
            tensor.masked_fill_(changed, 0)
        torch.autograd.graph.increment_version([weight, *states])
    pattern.set_blocks_(blocks)


@torch.no_grad()
def prepare_scores_(scores: Tensor, first: int, pattern: SparsityPattern, dropped: Tensor) -> None:
    """Makes the scores of blocks ``[first, first + n)`` ready for selection, in place: NaN counts as -inf, and the
    scores of active blocks that are not in ``dropped`` become NaN, which comes last."""
    scores.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    exclude_kept_(scores, first, pattern, dropped)


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
    regrow_dropped: bool = True,
    reset_regrown: bool = False,
) -> PruneGrowResult:
    """What :func:`prune_grow` computes, in plain torch, by sorting; in place too."""
    _check(weight, pattern, fraction, grow, grow_scores, states)
    k = drop_count(fraction, pattern, regrow_dropped)
    values = weight.detach() if pattern.is_packed(weight) else pattern.pack(weight.detach())
    active = pattern.blocks()
    dropped = active[
        topk_indices_reference(_norms(values.reshape(pattern.num_blocks, math.prod(pattern.block))), k, largest=False)
    ]
    candidates_too = dropped if regrow_dropped else dropped[:0]
    if grow == "random":
        grown = random_candidates(pattern, candidates_too, k, generator)
    else:
        assert grow_scores is not None  # checked
        scores = block_scores(grow_scores, pattern.block).nan_to_num(-math.inf, math.inf, -math.inf)
        scores[kept_blocks(pattern, candidates_too)] = math.nan
        grown = topk_indices_reference(scores, k)
    _apply_reference(weight, pattern, dropped, grown, states, reset_regrown)
    return PruneGrowResult(dropped, grown)


@torch.no_grad()
def _apply_reference(weight, pattern, dropped, grown, states, reset_regrown=False) -> None:
    """By way of dense tensors, for a packed weight too."""
    kept = kept_blocks(pattern, dropped)
    new = SparsityPattern.from_blocks(pattern.shape, torch.cat([kept, grown]).sort().values, block=pattern.block)
    changed = pattern.to_mask() ^ new.to_mask()
    if reset_regrown:
        changed |= pattern.mask_of(grown)
    for tensor in (weight, *states):
        if pattern.is_packed(tensor):
            tensor.copy_(new.pack(pattern.unpack(tensor).masked_fill_(changed, 0)))
        else:
            tensor.masked_fill_(changed, 0)
    pattern.assign_(new)


def _of_own_memory(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that are not the memory of one before, nor one number at all places (of ``expand``)."""
    seen: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    for tensor in tensors:
        if tensor.numel() < 2 or any(tensor.stride()):
            seen.setdefault((tensor.data_ptr(), tensor.stride()), tensor)
    return list(seen.values())


def _zero_blocks(tensors: Sequence[Tensor], pattern: SparsityPattern, blocks: Tensor) -> None:
    """Sets active blocks to zero, in place."""
    if pattern.is_packed(tensors[0]):
        places = torch.searchsorted(pattern.blocks(), blocks)
        for tensor in tensors:
            tensor.index_fill_(0, places, 0)
    else:
        mask = pattern.mask_of(blocks)
        for tensor in tensors:
            tensor.masked_fill_(mask, 0)


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


@_library.register_fake("growth_indices")
def _grow_fake(dense, k, crow, col, dropped):
    return dropped.new_empty(k)


@_library.register_fake("blocks_at")
def _blocks_fake(crow, col, places, columns):
    return places.new_empty(places.shape)
