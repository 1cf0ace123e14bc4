"""Suite linear: a sparse linear layer, everything counted, beside dense torch, oneDNN, torch CSR (MKL) and sparselab.

python -m benchmarks linear      pytest benchmarks/bench_masked_linear.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import uasparse_kernels as ua
from benchmarks import harness, rivals

# Batch, inputs, outputs. The first four are the ones that rivals were measured on; then an MLP's first layer, a
# ViT-small's MLP and a layer that narrows.
TRAINING = [
    (128, 1024, 1024),
    (512, 1024, 1024),
    (128, 4096, 4096),
    (256, 3072, 768),
    (128, 784, 1024),
    (1024, 384, 1536),
    (256, 2048, 512),
]
INFERENCE = [(1, 4096, 4096), (1, 1024, 1024), (4, 4096, 4096), (16, 4096, 4096)]
SPARSITIES = (0.8, 0.9, 0.95, 0.99)
# Where dense is expected to win or to be near.
LOW_SPARSITIES = (0.0, 0.2, 0.5)


def variants(batch: int, inputs: int, outputs: int, sparsity: float, *, training: bool) -> dict[str, Callable[[], Any]]:
    """Calls that run the layer once, by name: forward, and backward to input, weight and bias where ``training``."""
    pattern = ua.SparsityPattern.random((outputs, inputs), 1 - sparsity)
    layers: dict[str, nn.Module] = {
        "dense": nn.Linear(inputs, outputs),
        "dense [in, out]": rivals.TransposedLinear(inputs, outputs),
        "ours": ua.SparseLinear(inputs, outputs, pattern=pattern),
        "oneDNN": rivals.OneDnnLinear(inputs, outputs),
        "torch CSR": rivals.CsrLinear(pattern),
    }
    if rivals.HAS_SPARSELAB and sparsity > 0:
        layers["sparselab"] = rivals.sparselab_linear(inputs, outputs, sparsity)
    x = torch.randn(batch, inputs)
    return {
        name: harness.training_call(layer, x) if training else harness.forward_call(layer, x)
        for name, layer in layers.items()
    }


def row(batch: int, inputs: int, outputs: int, sparsity: float, *, training: bool, seconds: float) -> dict[str, Any]:
    times = harness.interleave(variants(batch, inputs, outputs, sparsity, training=training), seconds=seconds)
    flops = 2 * (3 if training else 1) * batch * round(inputs * outputs * (1 - sparsity))
    facts = {"shape": f"{batch}x{inputs}x{outputs}", "sparsity": sparsity, "pass": "step" if training else "forward"}
    return facts | harness.compare(times, flops)


def run(seconds: float = 1.0) -> list[dict[str, Any]]:
    return harness.rows(
        row(*shape, sparsity, training=training, seconds=seconds)
        for training, shapes in ((True, TRAINING), (False, INFERENCE))
        for shape in shapes
        for sparsity in (*LOW_SPARSITIES, *SPARSITIES)
    )


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", TRAINING, ids=str)
def test_step(benchmark, shape, sparsity):
    benchmark(variants(*shape, sparsity, training=True)["ours"])


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", INFERENCE, ids=str)
def test_forward(benchmark, shape, sparsity):
    benchmark(variants(*shape, sparsity, training=False)["ours"])
