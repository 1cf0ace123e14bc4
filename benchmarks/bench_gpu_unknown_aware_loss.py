"""Suite gpu-loss: unknown_aware_loss, forward and backward, beside its eager reference, the reference by torch.compile,
and plain cross entropy, which does less. All as CUDA graphs.

    python -m benchmarks.bench_gpu_unknown_aware_loss [--seconds 30] [--folder DIR]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import gpu
from benchmarks.bench_gpu_masked_linear import DTYPES
from uasparse_kernels.ops import unknown_aware_loss, unknown_aware_loss_reference


class Cell(NamedTuple):
    n: int
    classes: int
    kind: str


def cells() -> Iterator[Cell]:
    for n, classes in ((4096, 11), (4096, 101), (1024, 1001), (8192, 32001)):
        yield Cell(n, classes, "fp32")
    yield Cell(4096, 1001, "bf16")


def measure(cell: Cell, clock: gpu.Clock, roof: dict[str, float]) -> dict[str, Any]:
    dtype = DTYPES[cell.kind][0]
    logits = torch.randn(cell.n, cell.classes, device=gpu.DEVICE, dtype=dtype, requires_grad=True)
    target = torch.randint(cell.classes, (cell.n,), device=gpu.DEVICE)
    alpha = torch.tensor(0.5, device=gpu.DEVICE)
    compiled = torch.compile(unknown_aware_loss_reference, dynamic=False)

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), logits)

    calls = {
        "ours": step(lambda: unknown_aware_loss(logits, target, alpha)[0]),
        "eager reference": step(lambda: unknown_aware_loss_reference(logits, target, alpha)[0]),
        "compiled reference": step(lambda: compiled(logits, target, alpha)[0]),
        "cross_entropy": step(lambda: F.cross_entropy(logits, target)),
    }
    ms = clock.medians_ms(calls)
    roof_ms = 3 * logits.nbytes / roof["copy_gbs"] / 1e6
    ratios = {name: value / ms["ours"] for name, value in ms.items() if name != "ours"}
    return {
        **cell._asdict(),
        "ms": ms,
        "roof_ms": roof_ms,
        "times_faster_than": ratios,
        "of_roof": roof_ms / ms["ours"],
    }


def show(row: dict[str, Any]) -> None:
    ratios = ", ".join(f"{value:.2f}x {name}" for name, value in row["times_faster_than"].items())
    print(
        f"({row['n']}, {row['classes']}) {row['kind']}: {1e3 * row['ms']['ours']:.1f} us; as fast as {ratios}",
        flush=True,
    )


def main() -> None:
    arguments = gpu.parser(__doc__).parse_args()
    gpu.run_suite("gpu-loss", cells(), measure, show, arguments)


if __name__ == "__main__":
    main()
