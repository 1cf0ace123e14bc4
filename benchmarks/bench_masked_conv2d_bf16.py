"""Suite conv-bf16: a sparse convolution in bfloat16, everything counted, beside dense bfloat16 in both layouts and
beside itself in float32.

python -m benchmarks conv-bf16      pytest benchmarks/bench_masked_conv2d_bf16.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import uasparse_kernels as ua
from benchmarks import harness
from benchmarks.bench_masked_conv2d import Case

# Of ResNet-18 on CIFAR, then of ResNet-50.
CASES = [
    Case(64, 64, 32, batch=64),
    Case(128, 128, 16, batch=64),
    Case(256, 256, 8, batch=64),
    Case(512, 512, 4, batch=64),
    Case(64, 128, 32, stride=2, batch=64),
    Case(64, 64, 56, batch=8),
    Case(128, 128, 28, batch=8),
    Case(256, 256, 14, batch=8),
    Case(512, 512, 7, batch=8),
    Case(256, 256, 28, stride=2, batch=8),
    Case(64, 256, 56, kernel=1, batch=8),
    Case(512, 128, 28, kernel=1, batch=8),
    Case(256, 1024, 14, kernel=1, batch=8),
    Case(512, 1024, 28, kernel=1, stride=2, batch=8),
]
SPARSITIES = (0.8, 0.9)


def variants(case: Case, sparsity: float) -> dict[str, Callable[[], Any]]:
    """Calls of a training step of the layer, by name. "ours" is bfloat16, as all are but "float32"."""
    arguments = (case.channels, case.outputs, case.kernel, case.stride, case.kernel // 2)
    shape = (case.outputs, case.channels, case.kernel, case.kernel)
    pattern = ua.SparsityPattern.random(shape, 1 - sparsity)
    x = torch.randn(case.batch, case.channels, case.size, case.size)
    half, last = x.bfloat16(), torch.channels_last
    ours = ua.SparseConv2d(*arguments, bias=False, pattern=pattern)
    return {
        "dense": harness.training_call(nn.Conv2d(*arguments, bias=False).bfloat16(), half),
        "dense channels_last": harness.training_call(
            nn.Conv2d(*arguments, bias=False).bfloat16().to(memory_format=last),  # type: ignore[call-overload]
            half.to(memory_format=last),
        ),
        "float32": harness.training_call(ours, x),
        "ours": harness.training_call(
            ua.SparseConv2d(*arguments, bias=False, pattern=pattern).bfloat16(),
            half,
        ),
    }


def row(case: Case, sparsity: float, seconds: float) -> dict[str, Any]:
    times = harness.interleave(variants(case, sparsity), seconds=seconds, rounds=7)
    positions = case.batch * (-(-case.size // case.stride)) ** 2
    flops = 6 * positions * round(case.channels * case.outputs * case.kernel**2 * (1 - sparsity))
    return {"shape": str(case), "sparsity": sparsity, "pass": "step"} | harness.compare(times, flops)


def run(seconds: float = 1.0) -> list[dict[str, Any]]:
    return harness.rows(_rows(seconds / 4))


def _rows(seconds: float) -> Iterator[dict[str, Any]]:
    for case in CASES:
        for sparsity in SPARSITIES:
            yield row(case, sparsity, seconds)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(benchmark, case, sparsity):
    benchmark(variants(case, sparsity)["ours"])
