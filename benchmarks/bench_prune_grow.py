"""Suite prune-grow: selection beside torch.topk, kthvalue and numpy's partition; an update of one large layer, its
memory and its time in steps of the dense layer; and an update of a whole ResNet-50.

    python -m benchmarks prune-grow      pytest benchmarks/bench_prune_grow.py

The roof of a selection is one pass over the scores, measured as their maximum; what selection returns (8 bytes an
index) is not in it.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import uasparse_kernels as ua
from benchmarks import harness
from uasparse_kernels.ops import topk_indices

SELECTIONS = [(25_000_000, 0.1), (25_000_000, 0.001), (2_500_000, 0.3)]
SIZE, BATCH, SPARSITY = 16384, 128, 0.9


def selections(n: int, share: float) -> dict[str, Callable[[], Any]]:
    scores, k = torch.rand(n), round(n * share)
    array = scores.numpy()
    return {
        "ours": lambda: topk_indices(scores, k),
        "one pass": lambda: scores.max(),
        "torch.topk": lambda: torch.topk(scores, k),
        "kthvalue": lambda: torch.kthvalue(scores, n - k),
        "np.partition": lambda: np.partition(array, n - k),
    }


def selection_row(n: int, share: float, seconds: float) -> dict[str, Any]:
    ms = {name: 1e3 * s for name, s in harness.interleave(selections(n, share), seconds=seconds).items()}
    ratios = {name: value / ms["ours"] for name, value in ms.items() if name not in ("ours", "one pass")}
    passes = ms["ours"] / ms["one pass"]
    print(
        f"{share:.1%} of {n:.2g}: {ms['ours']:.1f} ms, {passes:.2f} passes; as fast as "
        + ", ".join(f"{value:.1f}x {name}" for name, value in ratios.items()),
        flush=True,
    )
    return {"what": "selection", "n": n, "share": share, "ms": ms, "times_faster_than": ratios, "passes": passes}


def _status(field: str) -> int:
    """Bytes of a field of this process's status: VmRSS, or VmHWM, the peak since the last reset."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def layer_update(size: int = SIZE, batch: int = BATCH, sparsity: float = SPARSITY, updates: int = 3) -> dict[str, Any]:
    """Steps of one linear layer, every second of them with an update; and of the dense layer. For a process of its own.

    A step is forward and backward, to the input too, and the optimiser's. The first update's memory is the peak
    above what the process held before it, and what it goes on to hold: buffers that the next one finds.
    """
    x = torch.randn(batch, size, requires_grad=True)

    def step(layer: nn.Module, optimizer: torch.optim.Optimizer, update: Callable[[], Any] = lambda: None) -> float:
        start = time.perf_counter()
        layer(x).square().mean().backward()
        optimizer.step()
        update()
        optimizer.zero_grad()
        x.grad = None
        return time.perf_counter() - start

    layer = ua.SparseLinear(size, size, bias=False, sparsity=sparsity, storage="packed")
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    topology = ua.DynamicSparsity(layer, optimizer, total_steps=10**6, delta_t=2)
    memory = []

    def measured() -> None:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        topology.step()
        memory.append((_status("VmHWM") - before, _status("VmRSS") - before))

    plain, updating = [], []
    for _ in range(updates + 1):
        plain.append(step(layer, optimizer, topology.step))
        updating.append(step(layer, optimizer, measured))
    blocks, k = layer.pattern.num_blocks, topology.method.count(topology, layer) if False else 0
    del layer, optimizer, topology
    dense = nn.Linear(size, size, bias=False)
    optimizer = torch.optim.SGD(dense.parameters(), 0.1, momentum=0.9)
    dense_steps = [step(dense, optimizer) for _ in range(updates + 1)]
    return {
        "active": blocks,
        "peak_bytes": memory[0][0],
        "seconds": {
            "dense step": statistics.median(dense_steps[1:]),
            "sparse step": statistics.median(plain[1:]),
            "sparse step with update": statistics.median(updating[1:]),
        },
    }
