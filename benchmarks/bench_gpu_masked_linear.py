"""Suites gpu-linear (forward) and gpu-step (forward and backward): masked_linear beside dense and other sparse kernels.

    python -m benchmarks.bench_gpu_masked_linear [--suite gpu-linear gpu-step] [--seconds 150] [--folder DIR]

Each cell (shape, tokens, dtype, density, block) is timed in one run with: cuBLAS dense, ``F.linear(x, w * m)`` eager
and by torch.compile, the masked dense-stored path of this package, its block kernel, torch's BSR kernel, and, once a
shape, torch's 2:4 and CSR. The cells come in order of importance; results are kept after each.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import gpu, harness
from uasparse_kernels import SparsityPattern
from uasparse_kernels.ops._common import dense_form, pattern_tensors

DTYPES = {"bf16": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32"), "fp32": (torch.float32, "ieee")}


class Cell(NamedTuple):
    out: int
    inp: int
    tokens: int
    kind: str
    density: float
    block: int


def cells() -> Iterator[Cell]:
    shapes = [(4096, 4096), (4096, 16384)]
    for (out, inp), density, block in itertools.product(shapes, (0.1, 0.05), (64, 128)):
        yield Cell(out, inp, 8192, "bf16", density, block)
    for (out, inp), tokens, density, block in itertools.product(shapes, (2048, 16384), (0.1, 0.05), (64, 128)):
        yield Cell(out, inp, tokens, "bf16", density, block)
    for block in (32, 16):
        yield Cell(4096, 4096, 8192, "bf16", 0.05, block)
    for kind, block in (("tf32", 64), ("fp32", 64)):
        yield Cell(4096, 4096, 8192, kind, 0.1, block)
    # For the crossovers.
    for block, density in ((64, 0.2), (64, 0.3), (128, 0.3), (128, 0.5), (32, 0.1), (16, 0.1)):
        yield Cell(4096, 4096, 8192, "bf16", density, block)


class Problem:
    def __init__(self, cell: Cell):
        self.dtype, self.precision = DTYPES[cell.kind]
        torch.backends.cuda.matmul.fp32_precision = self.precision
        block = (cell.block, cell.block)
        self.pattern = SparsityPattern.random((cell.out, cell.inp), cell.density, block=block).to(gpu.DEVICE)
        self.values = self._normal(*self.pattern.packed_shape)
        self.dense = self.pattern.unpack(self.values)
        self.mask = self.pattern.to_mask()
        self.x, self.dy = self._normal(cell.tokens, cell.inp), self._normal(cell.tokens, cell.out)
        self.block = cell.block

    def _normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, device=gpu.DEVICE, dtype=self.dtype)

    def ours(self, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The block kernel, whatever the dispatch would choose."""
        arguments = (*pattern_tensors(self.pattern), self.pattern.shape, self.pattern.block)
        return torch.ops.uasparse.masked_linear(x, values, None, *arguments)

    def variants(self) -> dict[str, tuple[Callable, torch.Tensor]]:
        """Function of input and weight, and the weight."""
        return {
            "dense": (F.linear, self.dense),
            "masked by w * m": (lambda x, w: F.linear(x, w * self.mask), self.dense),
            "ours, dense-stored": (lambda x, w: F.linear(x, dense_form(w, self.pattern)), self.dense),
            "ours, blocks": (self.ours, self.values),
        }

    def others(self, all_of_them: bool) -> dict[str, Callable[[], Any]]:
        """Kernels of torch that know the forward only."""
        found: dict[str, Callable[[], Any]] = {}
        try:
            from torch.sparse._triton_ops import bsr_dense_addmm

            bsr, zeros = self.dense.to_sparse_bsr(self.block), self.x.new_zeros(self.dense.shape[0], self.x.shape[0])
            found["torch BSR"] = lambda: bsr_dense_addmm(zeros, bsr, self.x.t(), beta=0)
        except Exception as error:
            print(f"    torch BSR: {type(error).__name__}: {str(error)[:150]}")
        if not all_of_them:
            return found
        compiled = torch.compile(lambda x, w, m: F.linear(x, w * m))
        found["masked, torch.compile"] = lambda: compiled(self.x, self.dense, self.mask)
        if self.dtype == torch.bfloat16:
            try:
                keep = torch.tensor([True, True, False, False], device=gpu.DEVICE).tile(self.dense.shape[1] // 4)
                half = torch.sparse.to_sparse_semi_structured(torch.randn_like(self.dense) * keep)
                found["torch 2:4 (50 %)"] = lambda: F.linear(self.x, half)
            except Exception as error:
                print(f"    torch 2:4: {type(error).__name__}: {str(error)[:150]}")
        else:
            csr, right = self.dense.to_sparse_csr(), self.x.t().contiguous()
            found["torch CSR"] = lambda: torch.mm(csr, right)
        return found


def step(function: Callable, input: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward."""
    x, w = input.detach().requires_grad_(), weight.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(x, w), (x, w), dy)


def measure(cell: Cell, suite: str, clock: gpu.Clock, roof: dict[str, float]) -> dict[str, Any]:
    problem = Problem(cell)
    variants: dict[str, Callable[[], Any]] = {}
    for name, (function, weight) in problem.variants().items():
        if suite == "gpu-step":
            variants[name] = step(function, problem.x, weight, problem.dy)
        else:
            variants[name] = lambda function=function, weight=weight: function(problem.x, weight)
    if suite == "gpu-linear":
        variants |= problem.others(cell.tokens == 8192 and cell.block == 64 and cell.density == 0.1)
    ms = clock.medians_ms(variants)
    products = 3 if suite == "gpu-step" else 1
    flops = 2 * cell.tokens * problem.pattern.nnz * products
    moved = products * (problem.x.nbytes + problem.values.nbytes + problem.dy.nbytes)
    roof_ms = max(flops / roof[f"{cell.kind}_tflops"] / 1e9, moved / roof["copy_gbs"] / 1e6)
    row: dict[str, Any] = {**cell._asdict(), "ms": ms, "roof_ms": roof_ms}
    row["times_dense"] = {name: ms["dense"] / value for name, value in ms.items()}
    row["of_roof"] = roof_ms / ms["ours, blocks"]
    if cell.tokens == 2048 and suite == "gpu-linear":
        want = problem.x.double() @ problem.dense.double().t()
        row["error"] = gpu.error(problem.ours(problem.x, problem.values), want)
        row["error_dense"] = gpu.error(F.linear(problem.x, problem.dense), want)
    return row


def show(row: dict[str, Any]) -> None:
    head = " ".join(f"{value}" for key, value in row.items() if key not in ("ms", "times_dense", "roof_ms", "of_roof"))
    times = ", ".join(f"{name} {row['ms'][name]:.3f} ms ({ratio:.2f}x)" for name, ratio in row["times_dense"].items())
    print(f"{head} | {times} | {100 * row['of_roof']:.0f} % of roof", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", default=["gpu-linear", "gpu-step"])
    parser.add_argument("--seconds", type=float, default=150, help="for each suite, about")
    parser.add_argument("--folder", type=Path, default=harness.RESULTS)
    arguments = parser.parse_args()
    clock = gpu.Clock()
    roof = gpu.roofs(clock)
    print(roof)
    for suite in arguments.suite:
        rows: list[dict[str, Any]] = []
        budget = gpu.Budget(arguments.seconds)
        for cell in cells():
            if not budget.left():
                print(f"{suite}: out of time after {len(rows)} cells")
                break
            try:
                rows.append(measure(cell, suite, clock, roof))
            except Exception as error:
                print(f"{cell}: {type(error).__name__}: {error}", flush=True)
                continue
            show(rows[-1])
            harness.save(suite, rows, arguments.folder, roofs=roof)


if __name__ == "__main__":
    main()
