"""Suite step: whole training steps, optimiser included, of networks made sparse, beside the dense ones.

python -m benchmarks step      pytest benchmarks/bench_step.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import uasparse_kernels as ua
from benchmarks import harness
from uasparse_kernels.training.models import build_model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 11))


class VitBlock(nn.Module):
    """The MLP half of a ViT-small block, over tokens ``[batch, tokens, 384]``."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(384)
        self.mlp = nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Case(NamedTuple):
    """A network, its input, and the layers' densities."""

    name: str
    model: Callable[[], nn.Module]
    input: tuple[int, ...]
    sparsity: float
    distribution: str = "uniform"
    exempt: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.distribution}"


def _resnet18() -> nn.Module:
    return build_model("resnet18", 11, 3, 32)


def _wrn() -> nn.Module:
    return build_model("wrn-22-2", 11, 3, 32)


CASES = [
    Case("MLP", mlp, (128, 784), 0.9, exempt=("4",)),
    Case("MLP", mlp, (128, 784), 0.95, exempt=("4",)),
    Case("ViT-small MLP", VitBlock, (8, 197, 384), 0.9),
    Case("ResNet-18", _resnet18, (64, 3, 32, 32), 0.9),
    Case("ResNet-18", _resnet18, (64, 3, 32, 32), 0.9, "erk"),
    Case("ResNet-18", _resnet18, (64, 3, 32, 32), 0.95),
    Case("WRN-22-2", _wrn, (64, 3, 32, 32), 0.9),
    Case("WRN-22-2", _wrn, (64, 3, 32, 32), 0.9, "erk"),
]


def variants(case: Case) -> dict[str, Callable[[], Any]]:
    """Calls that take a step of SGD with momentum, by name."""
    dense = case.model()
    sparse = ua.sparsify(
        copy.deepcopy(dense), sparsity=case.sparsity, distribution=case.distribution, exempt=case.exempt
    )
    x = torch.randn(case.input)
    found = {"dense": _step(dense, x), "ours": _step(sparse, x)}
    if len(case.input) == 4:
        last: Any = {"memory_format": torch.channels_last}
        found["dense channels_last"] = _step(copy.deepcopy(dense).to(**last), x.to(**last))
        # What of the speed-up is not sparsity: at sparsity 0 only batch norms are swapped.
        found["our batch norm, dense"] = _step(ua.sparsify(copy.deepcopy(dense), 0.0), x)
    return found


def _step(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    target = torch.randint(10, (x.shape[0],))

    def step() -> None:
        optimizer.zero_grad()
        output = model(x)
        loss = output.square().mean() if output.dim() == 3 else F.cross_entropy(output, target)
        loss.backward()
        optimizer.step()

    return step


def row(case: Case, seconds: float) -> dict[str, Any]:
    times = harness.interleave(variants(case), seconds=seconds, rounds=5)
    return {"shape": str(case), "sparsity": case.sparsity, "pass": "step"} | harness.compare(times)


def run(seconds: float = 1.0) -> list[dict[str, Any]]:
    return harness.rows(row(case, seconds) for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}-{case.sparsity}")
def test_step(benchmark, case):
    benchmark(variants(case)["ours"])
