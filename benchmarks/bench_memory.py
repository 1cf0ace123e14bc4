"""Memory of a training step: bytes of parameters, gradients and momentum, and the peak of a process that takes a
step.

python -m benchmarks memory      pytest benchmarks/bench_memory.py
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch
from torch import nn

import uasparse_kernels as ua
from benchmarks import harness

SIZE, BATCH, SPARSITY = 4096, 128, 0.9


def make(kind: str, size: int = SIZE, sparsity: float = SPARSITY) -> nn.Module:
    if kind == "dense":
        return nn.Linear(size, size, bias=False)
    return ua.SparseLinear(size, size, bias=False, sparsity=sparsity, storage=kind)


def step_bytes(kind: str, size: int = SIZE, sparsity: float = SPARSITY) -> dict[str, int]:
    """Bytes of values (parameter, gradient, SGD momentum) and of indices, after a training step."""
    layer = make(kind, size, sparsity)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(torch.randn(BATCH, size)).square().mean().backward()
    optimizer.step()
    states = [t for t in optimizer.state[layer.weight].values() if isinstance(t, torch.Tensor)]
    values = sum(t.nbytes for t in (layer.weight, layer.weight.grad, *states))
    return {"value_bytes": values, "index_bytes": sum(b.nbytes for b in layer.pattern.tensors())}


def peak_bytes(kind: str, size: int = SIZE, sparsity: float = SPARSITY) -> int:
    """Peak resident memory of a fresh process in five training steps, above what it had before the layer was made."""
    code = (
        "import re, torch; from benchmarks.bench_memory import make, BATCH\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        f"x = torch.randn(BATCH, {size}); (torch.randn(64, 64) @ torch.randn(64, 64)).sum()\n"
        "reset = lambda: open('/proc/self/clear_refs', 'w').write('5')\n"
        "reset(); before = peak()\n"
        f"layer = make({kind!r}, {size}, {sparsity})\n"
        "optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)\n"
        "reset()\n"
        "for _ in range(5):\n"
        "    layer(x).square().mean().backward(); optimizer.step(); optimizer.zero_grad()\n"
        "print(peak() - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(result.stdout) * 1024


def run(seconds: float = 0.0) -> list[dict[str, Any]]:
    rows = []
    for kind in ("dense", "packed"):
        rows.append({"layer": f"{SIZE}x{SIZE}", "sparsity": 0.0 if kind == "dense" else SPARSITY, "storage": kind})
        rows[-1] |= step_bytes(kind) | {"peak_bytes": peak_bytes(kind)}
    for row in rows:
        row["values_of_dense"] = row["value_bytes"] / rows[0]["value_bytes"]
        row["all_of_dense"] = (row["value_bytes"] + row["index_bytes"]) / rows[0]["value_bytes"]
        row["peak_of_dense"] = row["peak_bytes"] / rows[0]["peak_bytes"]
    return harness.rows(rows)


def test_values_shrink_with_the_active_weights(benchmark):
    dense = step_bytes("dense", 512)
    packed = benchmark.pedantic(step_bytes, ("packed", 512), rounds=1)
    assert packed["value_bytes"] <= 0.12 * dense["value_bytes"]
