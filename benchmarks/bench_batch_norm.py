"""Suite batch-norm: batch norm in training, contiguous and ours, beside torch's in both layouts.

    python -m benchmarks batch-norm      pytest benchmarks/bench_batch_norm.py

The roof is the traffic that cannot be spared, at the rate of a copy of the same tensor into a new one: one read and
one write forward, two reads and one write backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import uasparse_kernels as ua
from benchmarks import harness

# The layers of a ResNet-18 on images of 32 x 32, and those of a small network on images of 28 x 28.
SHAPES = [(64, 64, 32, 32), (64, 128, 16, 16), (64, 256, 8, 8), (64, 512, 4, 4), (128, 16, 14, 14), (128, 64, 7, 7)]
PASSES = ("forward", "backward")


def variants(shape: tuple[int, ...], which: str) -> dict[str, Callable[[], Any]]:
    """A call of each layer's pass; the backward is to the input, the weight and the bias."""
    x, grad = torch.randn(shape), torch.randn(shape)
    torchs, ours = nn.BatchNorm2d(shape[1]), ua.nn.BatchNorm2d(shape[1])
    last = torch.channels_last
    return {
        "torch": _call(torchs, x, grad, which),
        "torch channels_last": _call(torchs, x.to(memory_format=last), grad.to(memory_format=last), which),
        "ours": _call(ours, x, grad, which),
        "copy": lambda: x.clone(),
    }


def _call(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor, which: str) -> Callable[[], Any]:
    x = x.detach().requires_grad_()
    if which == "forward":
        return lambda: layer(x)
    output, wanted = layer(x), [x, *layer.parameters()]
    return lambda: torch.autograd.grad(output, wanted, grad, retain_graph=True)


def row(shape: tuple[int, ...], which: str, seconds: float) -> dict[str, Any]:
    ms = {name: 1e3 * s for name, s in harness.interleave(variants(shape, which), seconds=seconds).items()}
    roof = ms.pop("copy") * (1 if which == "forward" else 1.5)
    faster = {name: value / ms["ours"] for name, value in ms.items() if name != "ours"}
    return {
        "shape": "x".join(map(str, shape)),
        "pass": which,
        "ms": ms,
        "times_faster_than": faster,
        "of_copy_roof": roof / ms["ours"],
    }


def run(seconds: float = 1.0) -> list[dict[str, Any]]:
    return harness.rows(row(shape, which, seconds) for shape in SHAPES for which in PASSES)


@pytest.mark.parametrize("name", ["ours", "torch", "torch channels_last"])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm(benchmark, shape, which, name):
    benchmark(variants(shape, which)[name])
