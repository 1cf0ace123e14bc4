"""How many weights each layer keeps: uniform, Erdos-Renyi (ER) and its kernel form (ERK), with an exact global
count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]


def layer_densities(
    shapes: Mapping[str, Shape], density: float, distribution: str, blocks: Mapping[str, Sequence[int]] | None = None
) -> dict[str, float]:
    """Density of each layer, such that the active weights of all add up to ``round(density * total)``.

    Layers count in whole blocks: where ``blocks`` are larger than 1x1, the sum is exact to less than a block. ER gives
    a layer a density proportional to ``(in + out) / (in * out)``, ERK to ``(in + out + kh + kw) / (in * out * kh *
    kw)``; layers that would exceed 1 are dense and the rest takes up their share.

    Source: Evci et al., "Rigging the Lottery", arXiv 1911.11134, section 3 (1); Mocanu et al. 2018 for ER.

    Args:
        shapes: weight shape ``[out, in]`` or ``[out, in, kh, kw]`` by layer name.
        density: global share of active weights, in (0, 1].
        distribution: "uniform", "er" or "erk".

    Raises:
        ValueError: for another distribution or a density outside (0, 1].
    """
    if distribution not in ("uniform", "er", "erk"):
        raise ValueError(f'Expected distribution "uniform", "er" or "erk", got {distribution!r}.')
    if not 0 < density <= 1:
        raise ValueError(f"Expected a density in (0, 1], got {density}.")
    if not shapes:
        return {}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: _raw_density(shape, distribution) for name, shape in shapes.items()}
    budget = density * sum(sizes.values())
    ideal = _scale_to_budget(raw, sizes, budget)
    unit = {name: math.prod(blocks[name]) if blocks else 1 for name in shapes}
    counts = _round_to_budget(ideal, sizes, unit, round(budget))
    return {name: counts[name] * unit[name] / sizes[name] for name in shapes}


def _raw_density(shape: Shape, distribution: str) -> float:
    if distribution == "uniform":
        return 1.0
    dims = shape if distribution == "erk" else shape[:2]
    return sum(dims) / math.prod(dims)


def _scale_to_budget(raw: dict[str, float], sizes: dict[str, int], budget: float) -> dict[str, float]:
    """Densities ``min(1, factor * raw)`` whose weighted sum is the budget."""
    dense: set[str] = set()
    while True:
        rest = [name for name in raw if name not in dense]
        weight = sum(raw[name] * sizes[name] for name in rest)
        factor = (budget - sum(sizes[name] for name in dense)) / weight if rest else 0.0
        too_dense = {name for name in rest if factor * raw[name] > 1}
        if not too_dense:
            return {name: 1.0 if name in dense else factor * raw[name] for name in raw}
        # Only the densest at a time, as in the paper's code: the others may fall below 1 again.
        dense.add(max(too_dense, key=lambda name: raw[name]))


def _round_to_budget(
    ideal: dict[str, float], sizes: dict[str, int], unit: dict[str, int], budget: int
) -> dict[str, int]:
    """Whole blocks per layer, at least one each, by largest remainder."""
    exact = {name: ideal[name] * sizes[name] / unit[name] for name in ideal}
    counts = {name: max(1, math.floor(exact[name] + 1e-9)) for name in ideal}
    rest = budget - sum(counts[name] * unit[name] for name in counts)
    order = sorted(counts, key=lambda name: counts[name] - exact[name])
    changed = True
    while changed:
        changed = False
        for name in order if rest > 0 else reversed(order):
            step = 1 if rest > 0 else -1
            room = counts[name] * unit[name] < sizes[name] if step > 0 else counts[name] > 1
            if room and abs(rest) >= unit[name]:
                counts[name] += step
                rest -= step * unit[name]
                changed = True
    return counts
