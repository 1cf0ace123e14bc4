"""Suite prune-grow: selection beside torch.topk, kthvalue and numpy's partition; an update of one large layer, its
memory and its time in steps of the dense layer; and an update of a whole ResNet-50.

    python -m benchmarks prune-grow      pytest benchmarks/bench_prune_grow.py

The roof of a selection is one pass over the scores, measured as their maximum; what selection returns (8 bytes an
index) is not in it.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import uasparse_kernels as ua
from benchmarks import harness
from uasparse_kernels.ops import topk_indices
from uasparse_kernels.ops.prune_grow import apply
from uasparse_kernels.topology import LayerUpdate, RigL, Update, growth

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


def _step(layer: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, update: Callable[[], Any]) -> float:
    """Seconds of forward, backward (to the input too), the optimiser's step and the update."""
    start = time.perf_counter()
    layer(x).square().mean().backward()
    optimizer.step()
    update()
    optimizer.zero_grad()
    x.grad = None
    return time.perf_counter() - start


def sparse_steps(x: torch.Tensor, sparsity: float, updates: int) -> dict[str, Any]:
    """Steps of a sparse layer, every second of them with a RigL update. The memory is the first update's peak of
    resident bytes, above what the process held before it.
    """
    layer = ua.SparseLinear(x.shape[1], x.shape[1], bias=False, sparsity=sparsity, storage="packed")
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    topology = ua.DynamicSparsity(layer, optimizer, total_steps=10**6, delta_t=2)
    peaks = []

    def update() -> None:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        assert topology.step()
        peaks.append(_status("VmHWM") - before)

    plain, updating = [], []
    for _ in range(updates + 1):
        plain.append(_step(layer, optimizer, x, topology.step))
        updating.append(_step(layer, optimizer, x, update))
    k = math.ceil(topology.schedule.fraction(2) * layer.pattern.num_blocks)
    seconds = {"sparse step": plain[1:], "sparse step with update": updating[1:]}
    return {"candidates": 4 * k, "peak_bytes": peaks[0]} | {name: statistics.median(s) for name, s in seconds.items()}


def layer_update(size: int = SIZE, batch: int = BATCH, sparsity: float = SPARSITY, updates: int = 3) -> dict[str, Any]:
    """:func:`sparse_steps`, then steps of the dense layer. It needs a process of its own."""
    x = torch.randn(batch, size, requires_grad=True)
    found = sparse_steps(x, sparsity, updates)
    dense = nn.Linear(size, size, bias=False)
    optimizer = torch.optim.SGD(dense.parameters(), 0.1, momentum=0.9)
    steps = [_step(dense, optimizer, x, lambda: None) for _ in range(updates + 1)]
    return found | {"dense step": statistics.median(steps[1:])}


def layer_row(size: int = SIZE, batch: int = BATCH, sparsity: float = SPARSITY) -> dict[str, Any]:
    code = (
        "import json, torch; from benchmarks.bench_prune_grow import layer_update; "
        f"torch.set_num_threads({torch.get_num_threads()}); "
        f"print(json.dumps(layer_update({size}, {batch}, {sparsity})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    row = {"what": "growth stream", "layer": f"{size}x{size}", "batch": batch, "sparsity": sparsity}
    found = json.loads(done.stdout)
    row["seconds"] = {name: value for name, value in found.items() if name.endswith(("step", "update"))}
    row["dense_steps"] = found["sparse step with update"] / found["dense step"]
    # The bound of GrowthCandidates, an index of 4 bytes and a score of 4 each.
    row["bytes"] = {
        "peak": found["peak_bytes"],
        "tile": 4 * growth.tile_entries(torch.device("cpu")),
        "4k candidates": 8 * found["candidates"],
        "dense gradient": 4 * size * size,
    }
    memory = ", ".join(f"{name} {value / 2**20:.0f}" for name, value in row["bytes"].items())
    print(f"update of {row['layer']}, {sparsity:.0%} sparse, batch {batch}: MiB {memory}", flush=True)
    print(f"its step takes {row['dense_steps']:.2f} steps of the dense layer", flush=True)
    return row


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The convolutions of ResNet-50 after the first, which stays dense."""
    shapes: list[tuple[int, ...]] = []
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if index == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return shapes


def _tiles(gradient: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    rows = max(1, growth.tile_entries(gradient.device) // gradient[0].numel())
    return ((first, gradient[first : first + rows]) for first in range(0, gradient.shape[0], rows))


def model_row(sparsity: float = 0.9, fraction: float = 0.3, rounds: int = 3) -> dict[str, Any]:
    """RigL's update of a packed ResNet-50, momentum and gradient moved along; dense gradients are at hand."""
    layers, states = [], []
    for shape in resnet50_shapes():
        pattern, gradient = ua.SparsityPattern.random(shape, 1 - sparsity), torch.randn(shape)
        weight = torch.randn(pattern.nnz)
        layers.append(LayerUpdate(weight, None, pattern, pattern.num_blocks, partial(_tiles, gradient)))
        states.append([torch.randn(pattern.nnz), torch.randn(pattern.nnz)])
    update, times = Update(layers, fraction, 1.0, torch.Generator()), []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        changes = RigL().update(update)
        chosen = time.perf_counter()
        for layer, (dropped, grown), moved in zip(layers, changes, states, strict=True):
            apply(layer.weight, layer.pattern, dropped, grown, moved)
        times.append((chosen - start, time.perf_counter() - chosen))
    select, move = (1e3 * statistics.median(column) for column in zip(*times[1:], strict=True))
    print(
        f"update of a {sparsity:.0%} ResNet-50 ({len(layers)} layers): {select + move:.0f} ms "
        f"(select {select:.0f}, move {move:.0f})",
        flush=True,
    )
    row = {"what": "model update", "model": "ResNet-50", "sparsity": sparsity, "layers": len(layers)}
    return row | {"ms": {"select": select, "move": move}, "total_ms": select + move}


def run(seconds: float = 1.0) -> list[dict[str, Any]]:
    rows = [selection_row(n, share, seconds) for n, share in SELECTIONS]
    return [*rows, layer_row(), model_row()]


@pytest.mark.parametrize("name", ["ours", "torch.topk", "kthvalue", "np.partition"])
def test_selection(benchmark, name):
    benchmark(selections(2_500_000, 0.1)[name])


def test_growth_takes_less_memory_than_the_dense_gradient(benchmark):
    row = benchmark.pedantic(layer_row, (4096,), rounds=1)
    assert row["bytes"]["peak"] < row["bytes"]["dense gradient"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(harness.save("prune-grow", run()))
