"""Patterns from scores of weights: the best of a layer, of each row or group, or of all layers by one threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from uasparse_kernels.ops.prune_grow import drop_lowest, prepare_scores_, random_candidates
from uasparse_kernels.ops.topk_indices import topk_indices
from uasparse_kernels.pattern import SparsityPattern
from uasparse_kernels.topology.structure import structured_pattern


def best_pattern(
    scores: Tensor, shape: Sequence[int], density: float, *, block: Sequence[int] = (1, 1), structure: str | None = None
) -> SparsityPattern:
    """The pattern of the blocks of largest score; of equal ones those of lower index.

    Args:
        scores: of every block, in the order of flat grid indices: ``[rows * columns]`` (``ops.prune_grow.block_scores``
            of a dense tensor).
        shape: of the weight, ``[out, in]`` or ``[out, in, kh, kw]``.
        density: share of active weights, in (0, 1].
        structure: None for the best of the layer; "fan-in" for those of each row of blocks, "N:M" for those of each M
            neighbouring input channels.
    """
    if structure is not None:
        return structured_pattern(shape, density, structure, block=block, scores=scores)
    count = min(scores.numel(), max(1, round(density * scores.numel())))
    return SparsityPattern.from_blocks(shape, topk_indices(scores, count), block=block)


def densities_by_threshold(
    scores: Mapping[str, Tensor], totals: Mapping[str, int], units: Mapping[str, int], density: float
) -> dict[str, float]:
    """The density of each layer where one threshold over all layers says what stays: global pruning.

    Every layer keeps its best block. Blocks of several sizes are compared by root mean square, so that a weight counts
    the same everywhere; the number of active weights is exact to less than a block.

    Args:
        scores: of the blocks of each layer that may stay: norms.
        totals: blocks of each layer, active or not.
        units: weights of a block of each layer.
        density: share of active weights in all layers together.

    Raises:
        ValueError: if fewer weights than asked for have a score.
    """
    names = list(scores)
    budget = round(density * sum(totals[name] * units[name] for name in names))
    held = sum(scores[name].numel() * units[name] for name in names)
    if budget > held:
        raise ValueError(
            f'Expected at least {budget} active weights for distribution="global", which only takes weights away, got '
            f"{held}. Use another distribution."
        )
    device = scores[names[0]].device
    joined = torch.cat([scores[name].to(device) / math.sqrt(units[name]) for name in names])
    starts = torch.tensor([0, *(scores[name].numel() for name in names)], device=device).cumsum(0)
    best = torch.stack([scores[name].argmax().to(device) for name in names]) + starts[:-1]
    joined[best] = math.inf
    if len(set(units.values())) == 1:
        kept = topk_indices(joined, max(len(names), budget // units[names[0]]))
    else:
        order = joined.argsort(descending=True, stable=True)
        sizes = torch.cat([torch.full_like(scores[n], units[n], dtype=torch.int64, device=device) for n in names])
        fits = sizes[order].cumsum(0) <= budget
        fits[: len(names)] = True
        kept = order[fits].sort().values
    counts = torch.searchsorted(kept, starts).diff().tolist()
    return {name: count / totals[name] for name, count in zip(names, counts, strict=True)}


def change_to(
    pattern: SparsityPattern, density: float, structure: str | None, norms: Tensor, growth: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The blocks that a pattern drops and grows (flat, ascending) to have another density.

    The active blocks of lowest norm leave, or inactive ones come. With a structure both may happen at once: where a row
    or group has too few.

    Args:
        norms: of the active blocks, ``[num_blocks]``.
        growth: scores of all blocks, whose largest come; None for random ones. Overwritten.
    """
    nothing = pattern.blocks()[:0]
    if structure is None:
        count = min(math.prod(pattern.grid), max(1, round(density * math.prod(pattern.grid))))
        if count <= pattern.num_blocks:
            return drop_lowest([norms], [pattern], [pattern.num_blocks - count])[0], nothing
        if growth is None:
            return nothing, random_candidates(pattern, nothing, count - pattern.num_blocks)
        prepare_scores_(growth, 0, pattern, nothing)
        return nothing, topk_indices(growth, count - pattern.num_blocks)
    active = pattern.blocks()
    if growth is None:
        growth = torch.rand(math.prod(pattern.grid)).to(norms)
    is_active = torch.zeros_like(growth, dtype=torch.bool).index_fill_(0, active, True)
    growth[active] = norms
    new = structured_pattern(
        pattern.shape, density, structure, block=pattern.block, scores=growth, preferred=is_active
    ).blocks()
    stays = torch.zeros_like(is_active).index_fill_(0, new, True)
    return active[~stays[active]], new[~is_active[new]]
