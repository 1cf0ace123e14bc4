"""Suite recipe: what the parts of the method add to sparse training, in time and memory.

    python -m benchmarks recipe

A call is a small training from the first step to the last: loss, topology updates (one in ten steps, more than usual),
synthetic unknowns, votes. Each call has a seed of its own: arms with another number of outputs have other patterns, and
the luck of one pattern is not to count for an arm. The images are noise. What ends a training, and evaluation, are left
out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import torch

from benchmarks import harness
from uasparse_kernels.training.config import FitConfig, with_arm
from uasparse_kernels.training.cost import training_cost
from uasparse_kernels.training.data import ImageSet, TrainTest
from uasparse_kernels.training.recipe import Trainer

# An arm, and the one that it is compared with.
ARMS = {
    "": "",
    "+vote": "",
    "+moon+vote": "",
    "+vote+hard-shuffle": "+vote",
    "+relative+vote+hard-shuffle": "+vote",
}


class Case(NamedTuple):
    """A network, the size of its images, and the steps of an epoch."""

    model: str
    image: tuple[int, int, int]
    batch_size: int
    steps: int

    def __str__(self) -> str:
        return f"{self.model}, {self.batch_size} x {'x'.join(map(str, self.image))}"


CASES = {
    Case("convnet", (1, 28, 28), 128, 8): ("rigl", "set"),
    Case("wrn-22-2", (3, 32, 32), 64, 1): ("rigl",),
}


def row(case: Case, method: str, seconds: float, epochs: int = 5, rounds: int = 15) -> dict[str, Any]:
    steps = epochs * case.steps
    trainers: dict[str, Trainer] = {}
    calls = {arm: _training(case, method + arm, epochs, arm, trainers) for arm in ARMS}
    ms = {arm: 1e3 * s / steps for arm, s in harness.interleave(calls, seconds=seconds, rounds=rounds).items()}
    cost = {arm: training_cost(t.model, t.optimizer, t.vote) for arm, t in trainers.items()}
    held = {arm: c["memory_bytes"] + c["index_bytes"] + c["vote_bytes"] for arm, c in cost.items()}
    return {
        "shape": str(case),
        "method": method,
        "sparsity": 0.9,
        "ms": {method + arm: value for arm, value in ms.items()},
        "more_time": {method + arm: ms[arm] / ms[base] - 1 for arm, base in ARMS.items() if arm != base},
        "more_memory": {method + arm: held[arm] / held[base] - 1 for arm, base in ARMS.items() if arm != base},
    }


def _training(case: Case, arm: str, epochs: int, key: str, trainers: dict[str, Trainer]) -> Callable[[], Any]:
    """A call that builds a trainer and trains it, leaving it in `trainers`."""
    images = torch.randint(256, (case.steps * case.batch_size, *case.image), dtype=torch.uint8)
    labels, names = torch.arange(len(images)) % 10, tuple("abcdefghij")
    data = TrainTest(ImageSet("noise", images, labels, names), ImageSet("noise", images[:1], labels[:1], names))
    delta_t = min(10, epochs * case.steps // 4)  # a short training (a test's) is to have updates too
    shared = FitConfig(model=case.model, batch_size=case.batch_size, epochs=epochs, warmup_epochs=1, delta_t=delta_t)
    config, seeds = with_arm(shared, arm), count()

    def call() -> None:
        trainers[key] = trainer = Trainer(replace(config, seed=next(seeds)), data)
        for _ in range(epochs):
            trainer.train_epoch()

    return call


def run(seconds: float = 1.0) -> list[dict[str, Any]]:
    return harness.rows(row(case, method, seconds) for case, methods in CASES.items() for method in methods)
