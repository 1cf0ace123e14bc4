"""Suite conv: a sparse convolution, everything counted, beside dense torch in NCHW and channels_last.

python -m benchmarks conv      pytest benchmarks/bench_masked_conv2d.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

# The distinct sparse layers of a ResNet-50 on images of 224 pixels.
_RESNET50 = [
    Case(64, 64, 56, kernel=1),
    Case(64, 64, 56),
    Case(64, 256, 56, kernel=1),
    Case(256, 64, 56, kernel=1),
    Case(256, 128, 56, kernel=1),
    Case(128, 128, 56, stride=2),
    Case(256, 512, 56, kernel=1, stride=2),
    Case(128, 512, 28, kernel=1),
    Case(512, 128, 28, kernel=1),
    Case(128, 128, 28),
    Case(512, 256, 28, kernel=1),
    Case(256, 256, 28, stride=2),
    Case(512, 1024, 28, kernel=1, stride=2),
    Case(256, 1024, 14, kernel=1),
    Case(1024, 256, 14, kernel=1),
    Case(256, 256, 14),
    Case(1024, 512, 14, kernel=1),
    Case(512, 512, 14, stride=2),
    Case(1024, 2048, 14, kernel=1, stride=2),
    Case(512, 2048, 7, kernel=1),
    Case(2048, 512, 7, kernel=1),
    Case(512, 512, 7),
]
NETWORK_SPARSITIES = {8: (0.8, 0.9, 0.95), 32: (0.9,)}  # by batch
RESNET50 = [case._replace(batch=batch) for batch in NETWORK_SPARSITIES for case in _RESNET50]
# In blocks, beside the same shapes without.
BLOCKED = [Case(64, 64, 32), Case(128, 128, 16), Case(256, 256, 8), Case(128, 512, 28, kernel=1, batch=8)]
BLOCKS = ((4, 1), (4, 4), (16, 16), (32, 32))


def variants(
    case: Case, sparsity: float, *, training: bool = True, block: tuple[int, int] = (1, 1)
) -> dict[str, Callable[[], Any]]:
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
        "ours": call(ua.SparseConv2d(*arguments, bias=False, sparsity=sparsity, block=block), x),
    }


def row(
    case: Case,
    sparsity: float,
    seconds: float,
    *,
    training: bool = True,
    block: tuple[int, int] = (1, 1),
    rounds: int = 11,
) -> dict[str, Any]:
    times = harness.interleave(variants(case, sparsity, training=training, block=block), seconds=seconds, rounds=rounds)
    positions = case.batch * (-(-case.size // case.stride)) ** 2
    products = 3 if training else 1
    flops = 2 * products * positions * round(case.channels * case.outputs * case.kernel**2 * (1 - sparsity))
    shape = str(case) if block == (1, 1) else f"{case}, {block[0]}x{block[1]}"
    return {"shape": shape, "sparsity": sparsity, "pass": "step" if training else "forward"} | harness.compare(
        times, flops
    )


def run(seconds: float = 1.0) -> list[dict[str, Any]]:
    return harness.rows(_rows(seconds))


def _rows(seconds: float) -> Iterator[dict[str, Any]]:
    for case in CASES:
        for sparsity in (*LOW_SPARSITIES, *SPARSITIES):
            yield row(case, sparsity, seconds)
    for case in RESNET50:
        for sparsity in NETWORK_SPARSITIES[case.batch]:
            for training in (False, True):
                yield row(case, sparsity, seconds / 2, training=training, rounds=3 if case.batch > 8 else 5)
    for case in BLOCKED:
        for block in BLOCKS:
            for sparsity in NETWORK_SPARSITIES[8] if block == (4, 4) else (0.9,):
                yield row(case, sparsity, seconds, block=block)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(benchmark, case, sparsity):
    benchmark(variants(case, sparsity)["ours"])
