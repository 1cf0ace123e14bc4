"""When the topology changes and by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """An update every ``delta_t`` optimiser steps until ``stop_fraction * total_steps``, its size falling by a cosine.

    ``fraction(t) = drop_fraction / 2 * (1 + cos(pi * t / t_end))``. Source: Evci et al., arXiv 1911.11134, section 3
    (2) and (3); Dettmers and Zettlemoyer, arXiv 1907.04840, for the cosine.
    """

    total_steps: int
    delta_t: int = 100
    drop_fraction: float = 0.3
    stop_fraction: float = 0.75

    def __post_init__(self) -> None:
        if self.total_steps < 1 or self.delta_t < 1:
            raise ValueError(f"Expected total_steps and delta_t >= 1, got {self.total_steps} and {self.delta_t}.")
        if not 0 <= self.drop_fraction <= 1 or not 0 <= self.stop_fraction <= 1:
            raise ValueError(
                f"Expected drop_fraction and stop_fraction in [0, 1], got {self.drop_fraction} and "
                f"{self.stop_fraction}."
            )

    @property
    def end(self) -> int:
        """The first step (counted from 1) at which, and after which, nothing changes."""
        return math.ceil(self.stop_fraction * self.total_steps)

    def is_update(self, step: int) -> bool:
        return step % self.delta_t == 0 and 0 < step < self.end

    def fraction(self, step: int) -> float:
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * step / self.end)) if step < self.end else 0.0

    def is_over(self, step: int) -> bool:
        """Whether no update comes after ``step``."""
        return (step // self.delta_t + 1) * self.delta_t >= self.end

    def progress(self, step: int) -> float:
        """Share of the updates that are done with the one of ``step``: 1 at the last."""
        last = (self.end - 1) // self.delta_t * self.delta_t
        return min(1.0, step / last) if last > 0 else 1.0


def cubic_sparsity(initial: float, final: float, progress: float) -> float:
    """Sparsity of gradual pruning: ``final + (initial - final) * (1 - progress)^3``.

    Source: Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878, equation (1).
    """
    return final + (initial - final) * (1 - progress) ** 3
