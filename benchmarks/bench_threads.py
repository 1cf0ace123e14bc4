"""Suite threads: what a second core gives a training step, of dense torch and of the sparse layers.

python -m benchmarks threads      pytest benchmarks/bench_threads.py
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from benchmarks import bench_masked_conv2d, bench_masked_linear, harness

LINEAR = [(512, 1024, 1024), (128, 4096, 4096)]
CONV = [bench_masked_conv2d.Case(64, 64, 32), bench_masked_conv2d.Case(256, 256, 8)]
SPARSITY = 0.9


def cases() -> Iterable[tuple[str, dict[str, Any]]]:
    for shape in LINEAR:
        calls = bench_masked_linear.variants(*shape, SPARSITY, training=True)
        yield "x".join(map(str, shape)), {name: calls[name] for name in ("dense", "ours")}
    for case in CONV:
        calls = bench_masked_conv2d.variants(case, SPARSITY)
        yield str(case), {name: calls[name] for name in ("dense", "ours")}


def row(shape: str, calls: dict[str, Any], seconds: float) -> dict[str, Any]:
    before = torch.get_num_threads()
    times = {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            times[threads] = harness.interleave(calls, seconds=seconds)
    finally:
        torch.set_num_threads(before)
    return {
        "shape": shape,
        "sparsity": SPARSITY,
        "pass": "step",
        "ms": {f"{name}, {n} threads": 1e3 * s for n, found in times.items() for name, s in found.items()},
        "two_threads_over_one": {name: times[1][name] / times[2][name] for name in calls},
    }


def run(seconds: float = 1.0) -> list[dict[str, Any]]:
    return harness.rows(row(shape, calls, seconds) for shape, calls in cases())


@pytest.mark.parametrize("threads", [1, 2])
def test_step(benchmark, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        benchmark(bench_masked_linear.variants(*LINEAR[0], SPARSITY, training=True)["ours"])
    finally:
        torch.set_num_threads(before)
