"""Patterns with a constraint: a constant fan-in (SRigL), N of every M weights (N:M)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from uasparse_kernels.pattern import SparsityPattern

# Entries of random numbers at a time.
_CHUNK = 1 << 22


def structured_pattern(
    shape: Sequence[int],
    density: float,
    structure: str,
    *,
    block: Sequence[int] = (1, 1),
    generator: torch.Generator | None = None,
    scores: Tensor | None = None,
    preferred: Tensor | None = None,
) -> SparsityPattern:
    """A pattern with a constraint: a random one, or the best by scores.

    Args:
        shape: ``[out, in]`` or ``[out, in, kh, kw]``.
        density: share of active weights, in (0, 1]; for "N:M" it must be N / M.
        structure: "fan-in" gives every row of the grid of blocks ``round(density * columns)`` active blocks (at least
            one), "N:M" (such as "2:4") gives N to each M neighbours along the input channels.
        block: (1, 1) for "N:M".
        generator: CPU generator.
        scores: of every block of the grid, flat; each row or group keeps its largest, of equal ones the first.
        preferred: bool, flat; these blocks come before all others.

    Raises:
        ValueError: for another structure, or sizes or a density that do not fit it.
    """
    whole = SparsityPattern.from_blocks(shape, torch.empty(0, dtype=torch.int64), block=block)
    (rows, columns), positions = whole.grid, math.prod(whole.shape[2:])
    if not 0 < density <= 1:
        raise ValueError(f"Expected a density in (0, 1], got {density}.")
    if structure == "fan-in":
        count, group, groups, inner = max(1, round(density * columns)), columns, 1, 1
    else:
        count, group = parse_n_of_m(structure)
        if not math.isclose(density, count / group):
            raise ValueError(f"Expected density {count / group:g} for structure {structure!r}, got {density}.")
        check_n_of_m(whole, group)
        groups, inner = columns // (group * positions), positions
    chunk, parts = max(1, _CHUNK // columns), []
    for first in range(0, rows, chunk):
        size = (min(chunk, rows - first), groups, group, inner)
        part = slice(first * columns, (first + size[0]) * columns)
        if scores is None:
            draws = torch.rand(size, generator=generator)
            best = draws.topk(count, dim=2).indices
        else:
            draws = scores[part].view(size)
            best = draws.argsort(dim=2, descending=True, stable=True)
            if preferred is not None:
                ahead = preferred[part].view(size).gather(2, best).to(torch.uint8)
                best = best.gather(2, ahead.argsort(dim=2, descending=True, stable=True))
            best = best[:, :, :count]
        mask = torch.zeros_like(draws, dtype=torch.bool).scatter_(2, best, True)
        parts.append(mask.view(-1).nonzero().squeeze(1) + first * columns)
    return SparsityPattern.from_blocks(shape, torch.cat(parts), block=block)


def parse_n_of_m(structure: str) -> tuple[int, int]:
    """N and M of "N:M"."""
    match = re.fullmatch(r"(\d+):(\d+)", structure)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f'Expected structure "fan-in" or "N:M" with 0 < N < M, got {structure!r}.')
    return int(match[1]), int(match[2])


def check_n_of_m(pattern: SparsityPattern, m: int) -> None:
    if pattern.block != (1, 1) or pattern.shape[1] % m:
        raise ValueError(
            f"Expected 1x1 blocks and a number of input channels that {m} divides for groups of {m}, got blocks "
            f"{pattern.block} and a weight of shape {pattern.shape}."
        )


def groups_of(blocks: Tensor, pattern: SparsityPattern, m: int) -> Tensor:
    """The group of M input channels (at one position of one row) that each block is in: flat, row by row.

    ``blocks`` are flat indices into the grid, whose column is ``channel * positions + position``.
    """
    positions, columns = math.prod(pattern.shape[2:]), pattern.grid[1]
    row, column = blocks // columns, blocks % columns
    return (row * (columns // (m * positions)) + column // (m * positions)) * positions + column % positions


def row_counts(pattern: SparsityPattern) -> Tensor:
    """Active blocks of every row of the grid: int32 ``[rows]``."""
    return pattern.crow[1:] - pattern.crow[:-1]
