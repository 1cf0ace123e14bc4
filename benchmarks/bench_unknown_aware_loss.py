"""Suite loss: unknown_aware_loss, forward and backward, beside its eager reference, the reference by torch.compile, and
plain cross entropy, which does less.

    python -m benchmarks loss      pytest benchmarks/bench_unknown_aware_loss.py

The roof is the traffic that cannot be spared: logits read twice, their gradient written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from uasparse_kernels.ops import unknown_aware_loss, unknown_aware_loss_reference

SIZES = [(4096, 11), (4096, 101), (1024, 1001)]
REPEATS = 4  # steps in a row to a timed call, as in training: the second finds its memory warm


def variants(n: int, classes: int, device: str = "cpu", *, compiled: bool = True) -> dict[str, Callable[[], Any]]:
    """A call of each takes REPEATS steps, forward and backward."""
    logits = torch.randn(n, classes, device=device, requires_grad=True)
    target = torch.randint(classes, (n,), device=device)
    alpha = torch.tensor(0.5, device=device)

    def steps(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(REPEATS):
                logits.grad = None
                loss().backward()

        return run

    reference = unknown_aware_loss_reference
    calls = {
        "ours": steps(lambda: unknown_aware_loss(logits, target, alpha)[0]),
        "eager reference": steps(lambda: reference(logits, target, alpha)[0]),
        "cross_entropy": steps(lambda: F.cross_entropy(logits, target)),
    }
    if compiled:
        compiled_reference = torch.compile(reference, dynamic=False)
        calls["compiled reference"] = steps(lambda: compiled_reference(logits, target, alpha)[0])
    return calls


def run(seconds: float = 1.0, device: str = "cpu", *, compiled: bool = True) -> list[dict[str, Any]]:
    rows = []
    roof = harness.copy_roof() if device == "cpu" else None
    for n, classes in SIZES:
        times = harness.interleave(variants(n, classes, device, compiled=compiled), seconds=seconds)
        us = {name: value / REPEATS * 1e6 for name, value in times.items()}
        row: dict[str, Any] = {"n": n, "classes": classes, "us": us}
        row["times_faster_than"] = {name: value / us["ours"] for name, value in us.items() if name != "ours"}
        if roof is not None:
            row["of_roof"] = 3 * 4 * n * classes / roof / 1e3 / us["ours"]
        rows.append(row)
        ratios = ", ".join(f"{value:.2f}x {name}" for name, value in row["times_faster_than"].items())
        share = f", {row['of_roof']:.0%} of the roof" if roof is not None else ""
        print(f"({n}, {classes}): {us['ours']:.0f} us; as fast as {ratios}{share}", flush=True)
    return rows


@pytest.mark.parametrize("name", ["ours", "eager reference", "cross_entropy"])
@pytest.mark.parametrize("size", SIZES)
def test_loss(benchmark, size, name):
    benchmark(variants(*size, compiled=False)[name])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(harness.save("loss", run()))
