"""Suite prune-grow: selection beside torch.topk, kthvalue and numpy's partition, and the update of a whole ResNet-50.

    python -m benchmarks.bench_prune_grow [--threads 1] [--folder DIR]      pytest benchmarks/bench_prune_grow.py

The roof of a selection is one pass over the scores, measured as their maximum; what selection returns (8 bytes an
index) is not in it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import harness
from uasparse_kernels import SparsityPattern
from uasparse_kernels.ops import topk_indices
from uasparse_kernels.ops.prune_grow import GrowthCandidates, apply, block_scores, drop_candidates, drop_count

SELECTIONS = [(25_000_000, 0.1), (25_000_000, 0.001), (2_500_000, 0.3)]


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


def selection_rows(seconds: float = 3.0) -> list[dict[str, Any]]:
    found = []
    for n, share in SELECTIONS:
        ms = {name: 1e3 * s for name, s in harness.interleave(selections(n, share), seconds=seconds).items()}
        ratios = {name: value / ms["ours"] for name, value in ms.items() if name not in ("ours", "one pass")}
        row = {"n": n, "share": share, "ms": ms, "times_faster_than": ratios, "of_roof": ms["one pass"] / ms["ours"]}
        print(
            f"{share:.1%} of {n:.2g}: {ms['ours']:.1f} ms, {row['of_roof']:.0%} of the roof; as fast as "
            + ", ".join(f"{value:.1f}x {name}" for name, value in ratios.items()),
            flush=True,
        )
        found.append(row)
    return found


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


def update_row(sparsity: float = 0.9, fraction: float = 0.3, rounds: int = 3) -> dict[str, Any]:
    """Drop, grow and apply in every layer of a packed ResNet-50, momentum moved along; dense gradients are at hand."""
    layers = []
    for shape in resnet50_shapes():
        pattern = SparsityPattern.random(shape, 1 - sparsity)
        layers.append((pattern, torch.randn(pattern.nnz), torch.randn(pattern.nnz), torch.randn(shape)))
    times = []
    for _ in range(rounds + 1):
        seconds = dict.fromkeys(("drop", "grow", "apply"), 0.0)
        for pattern, weight, momentum, gradient in layers:
            start = time.perf_counter()
            k = drop_count(fraction, pattern)
            dropped = drop_candidates(weight, pattern, k)
            selected = time.perf_counter()
            candidates = GrowthCandidates(k, pattern, dropped)
            columns = pattern.grid[1]
            rows = max(1, (1 << 20) // columns)
            for row in range(0, pattern.grid[0], rows):
                candidates.add(block_scores(gradient[row : row + rows], pattern.block), row * columns)
            grown = candidates.select()
            chosen = time.perf_counter()
            apply(weight, pattern, dropped, grown, [momentum])
            done = time.perf_counter()
            seconds["drop"] += selected - start
            seconds["grow"] += chosen - selected
            seconds["apply"] += done - chosen
        times.append(seconds)
    ms = {name: 1e3 * statistics.median(t[name] for t in times[1:]) for name in times[0]}
    total = sum(ms.values())
    parts = ", ".join(f"{name} {value:.0f}" for name, value in ms.items())
    print(f"update of a {sparsity:.0%} ResNet-50 ({len(layers)} layers): {total:.0f} ms ({parts})", flush=True)
    return {"model": "ResNet-50", "sparsity": sparsity, "layers": len(layers), "ms": ms, "total_ms": total}


@pytest.mark.parametrize("name", ["ours", "torch.topk", "kthvalue", "np.partition"])
def test_selection(benchmark, name):
    benchmark(selections(2_500_000, 0.1)[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, default=harness.RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = [*selection_rows(arguments.seconds), update_row()]
    print(harness.save("prune-grow", found, arguments.folder))


if __name__ == "__main__":
    main()
