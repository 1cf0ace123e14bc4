"""Suite conv: a sparse convolution, everything counted, beside dense torch in NCHW and channels_last.

python -m benchmarks conv      pytest benchmarks/bench_masked_conv2d.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import uasparse_kernels as ua
from benchmarks import harness
from benchmarks.bench_masked_linear import LOW_SPARSITIES, SPARSITIES


class Case(NamedTuple):
    """A convolution of ``channels`` to ``outputs`` channels over square images."""

    channels: int
    outputs: int
    size: int
    kernel: int = 3
    stride: int = 1
    batch: int = 32

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.batch}x{self.channels}@{self.size}-{self.outputs} {self.kernel}x{self.kernel}{stride}"


# ResNet's four stages on CIFAR, then their 1x1 and strided relatives.
CASES = [
    Case(64, 64, 32),
    Case(128, 128, 16),
    Case(256, 256, 8),
    Case(512, 512, 4),
    Case(128, 128, 16, kernel=1),
    Case(256, 256, 8, kernel=1),
    Case(64, 128, 32, stride=2),
    Case(128, 256, 16, stride=2),
]


def variants(case: Case, sparsity: float, *, training: bool = True) -> dict[str, Callable[[], Any]]:
    """Calls that run the layer once, by name; "ours" takes what is faster for dense here, NCHW."""
    arguments = (case.channels, case.outputs, case.kernel, case.stride, case.kernel // 2)
    x = torch.randn(case.batch, case.channels, case.size, case.size)
    call: Any = harness.training_call if training else harness.forward_call
    last = torch.channels_last
    return {
        "dense": call(nn.Conv2d(*arguments, bias=False), x),
        "dense channels_last": call(
            nn.Conv2d(*arguments, bias=False).to(memory_format=last),
            x.to(memory_format=last),  # type: ignore[call-overload]
        ),
        "ours": call(ua.SparseConv2d(*arguments, bias=False, sparsity=sparsity), x),
    }


def row(case: Case, sparsity: float, seconds: float) -> dict[str, Any]:
    times = harness.interleave(variants(case, sparsity), seconds=seconds)
    positions = case.batch * (case.size // case.stride) ** 2
    flops = 6 * positions * round(case.channels * case.outputs * case.kernel**2 * (1 - sparsity))
    return {"shape": str(case), "sparsity": sparsity, "pass": "step"} | harness.compare(times, flops)


def run(seconds: float = 1.0) -> list[dict[str, Any]]:
    return harness.rows(row(case, sparsity, seconds) for case in CASES for sparsity in (*LOW_SPARSITIES, *SPARSITIES))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(benchmark, case, sparsity):
    benchmark(variants(case, sparsity)["ours"])
