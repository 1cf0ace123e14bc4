"""Suite gpu-loss: unknown_aware_loss, forward and backward, beside its eager reference, the reference by torch.compile,
and plain cross entropy, which does less. All as CUDA graphs.

    python -m benchmarks.bench_gpu_unknown_aware_loss [--seconds 30] [--folder DIR]

The roof reads the logits once and writes their gradient once, at the rate of a copy. "ours" makes the gradient with
the loss; "two launches" is the kernels' other way (what compiled graphs take), which reads the logits twice; "scaled"
is ours with a loss times 1024, as under a loss scaler, once the kernels have seen it (timed apart: it changes what they
expect).
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
    for n, classes in ((1024, 1001), (8192, 32001)):
        for kind in ("fp32", "bf16"):
            yield Cell(n, classes, kind)
    for n, classes in ((4096, 11), (4096, 101)):
        yield Cell(n, classes, "fp32")
    yield Cell(4096, 1001, "bf16")
    yield Cell(8192, 32001, "fp16")
    yield Cell(2048, 128_257, "bf16")  # more than the shared memory of a block holds


def measure(cell: Cell, clock: gpu.Clock, roof: dict[str, float]) -> dict[str, Any]:
    dtype = DTYPES[cell.kind][0]
    logits = torch.randn(cell.n, cell.classes, device=gpu.DEVICE, dtype=dtype, requires_grad=True)
    target = torch.randint(cell.classes, (cell.n,), device=gpu.DEVICE)
    alpha = torch.tensor(0.5, device=gpu.DEVICE)
    torch._dynamo.reset()  # it counts what it has compiled, and leaves the ninth as it is
    compiled = torch.compile(unknown_aware_loss_reference, dynamic=False)

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), logits)

    calls = {
        "ours": step(lambda: unknown_aware_loss(logits, target, alpha)[0]),
        "eager reference": step(lambda: unknown_aware_loss_reference(logits, target, alpha)[0]),
        "compiled reference": step(lambda: compiled(logits, target, alpha)[0]),
        "cross_entropy": step(lambda: F.cross_entropy(logits, target)),
    }
    calls["two launches"] = lambda: two_launches(logits, target, alpha)
    ms = clock.medians_ms(calls)
    ms |= clock.medians_ms({"scaled": step(lambda: 1024 * unknown_aware_loss(logits, target, alpha)[0])})
    roof_ms = 2 * logits.nbytes / roof["copy_gbs"] / 1e6
    some = logits[:256].detach().double().requires_grad_()
    loss, _ = unknown_aware_loss_reference(some, target[:256], alpha, reduction="sum")
    (want,) = torch.autograd.grad(loss / cell.n, some)
    ratios = {name: value / ms["ours"] for name, value in ms.items() if name != "ours"}
    return {
        **cell._asdict(),
        "ms": ms,
        "roof_ms": roof_ms,
        "times_faster_than": ratios,
        "of_roof": roof_ms / ms["ours"],
        "error": gpu.error(calls["ours"]()[0][:256], want),
    }


def two_launches(logits: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    options, ops = (logits.detach(), target, alpha), torch.ops.uasparse
    loss, _, saved = ops.unknown_aware_loss(*options, 1.0, 1)
    return ops.unknown_aware_loss_backward(torch.ones_like(loss), *options, saved, 1.0, 1)


def show(row: dict[str, Any]) -> None:
    ratios = ", ".join(f"{value:.2f}x {name}" for name, value in row["times_faster_than"].items())
    print(
        f"({row['n']}, {row['classes']}) {row['kind']}: {1e3 * row['ms']['ours']:.1f} us, "
        f"{100 * row['of_roof']:.0f} % of roof, error {row['error']:.1e}; as fast as {ratios}",
        flush=True,
    )


def main() -> None:
    arguments = gpu.parser(__doc__).parse_args()
    gpu.run_suite("gpu-loss", cells(), measure, show, arguments)


if __name__ == "__main__":
    main()
