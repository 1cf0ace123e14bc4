"""Suite gpu-linear: masked_linear, forward and forward with backward, beside dense and other sparse kernels.

    python -m benchmarks.bench_gpu_masked_linear [--seconds 150] [--only KIND BLOCK] [--folder DIR]

Each cell (shape, tokens, dtype, density, block; block 1 is unstructured) is timed in one run with: cuBLAS dense,
``F.linear(x, w * m)``, the masked dense-stored path of this package, its sparse kernel, torch's BSR or CSR kernel, and,
once a block, torch's 2:4 and torch.compile of the masked form. The cells come in order of importance; results are kept
after each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import gpu
from uasparse_kernels import SparsityPattern
from uasparse_kernels.ops._common import dense_form, pattern_tensors

DTYPES = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}


class Cell(NamedTuple):
    out: int
    inp: int
    tokens: int
    kind: str
    density: float
    block: int
    step: bool = False  # forward and backward


def cells() -> Iterator[Cell]:
    square, wide = (4096, 4096), (4096, 16384)
    first = [(*shape, 8192, "bf16", d, block) for shape in (square, wide) for d in (0.1, 0.05) for block in (64, 128)]
    first[4:4] = [(*square, 8192, "fp32", density, 1) for density in (0.1, 0.05, 0.01)]
    first += [(*square, 8192, kind, density, 1) for kind, density in (("bf16", 0.01), ("tf32", 0.01), ("bf16", 0.005))]
    first += [(*square, 8192, "bf16", 0.05, block) for block in (32, 16)]
    first += [(*square, 8192, kind, 0.1, 64) for kind in ("tf32", "fp32")]
    first += [
        (*shape, tokens, "bf16", density, block)
        for shape, tokens, density, block in itertools.product((square, wide), (2048, 16384), (0.1, 0.05), (64, 128))
    ]
    for facts, step in itertools.product(first, (False, True)):
        yield Cell(*facts, step)


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
        """The sparse kernel, whatever the dispatch would choose."""
        arguments = (*pattern_tensors(self.pattern), self.pattern.shape, self.pattern.block)
        return torch.ops.uasparse.masked_linear(x, values, None, *arguments)

    def variants(self) -> dict[str, tuple[Callable, torch.Tensor]]:
        """Function of input and weight, and the weight."""
        return {
            "dense": (F.linear, self.dense),
            "masked by w * m": (lambda x, w: F.linear(x, w * self.mask), self.dense),
            "ours, dense-stored": (lambda x, w: F.linear(x, dense_form(w, self.pattern)), self.dense),
            "ours": (self.ours, self.values),
        }

    def others(self, all_of_them: bool) -> dict[str, Callable[[], Any]]:
        """Forward kernels of torch; what this build of torch lacks is left out, with a line."""
        makers = {"torch CSR": self._csr} if self.block == 1 else {"torch BSR": self._bsr}
        if all_of_them:
            makers["masked, torch.compile"] = self._compiled
            if self.dtype == torch.bfloat16:
                makers["torch 2:4 (50 %)"] = self._semi_structured
        found = {}
        for name, make in makers.items():
            try:
                found[name] = make()
            except Exception as error:
                print(f"    {name}: {type(error).__name__}: {str(error)[:150]}", flush=True)
        return found

    def _bsr(self) -> Callable[[], Any]:
        from torch.sparse._triton_ops import bsr_dense_addmm

        bsr, zeros = self.dense.to_sparse_bsr(self.block), self.x.new_zeros(self.dense.shape[0], self.x.shape[0])
        return lambda: bsr_dense_addmm(zeros, bsr, self.x.t(), beta=0)

    def _csr(self) -> Callable[[], Any]:
        csr, right = self.dense.to_sparse_csr(), self.x.t().contiguous()
        return lambda: torch.mm(csr, right)

    def _compiled(self) -> Callable[[], Any]:
        compiled = torch.compile(lambda x, w, m: F.linear(x, w * m))
        return lambda: compiled(self.x, self.dense, self.mask)

    def _semi_structured(self) -> Callable[[], Any]:
        keep = torch.tensor([True, True, False, False], device=gpu.DEVICE).tile(self.dense.shape[1] // 4)
        half = torch.sparse.to_sparse_semi_structured(torch.randn_like(self.dense) * keep)
        return lambda: F.linear(self.x, half)


def step(function: Callable, input: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward."""
    x, w = input.detach().requires_grad_(), weight.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(x, w), (x, w), dy)


def measure(cell: Cell, clock: gpu.Clock, roof: dict[str, float]) -> dict[str, Any]:
    problem = Problem(cell)
    variants: dict[str, Callable[[], Any]] = {}
    for name, (function, weight) in problem.variants().items():
        if cell.step:
            variants[name] = step(function, problem.x, weight, problem.dy)
        else:
            variants[name] = lambda function=function, weight=weight: function(problem.x, weight)
    if not cell.step:
        variants |= problem.others(cell.tokens == 8192 and cell.density == 0.1)
    ms = clock.medians_ms(variants)
    products = 3 if cell.step else 1
    flops = 2 * cell.tokens * problem.pattern.nnz * products
    moved = products * (problem.x.nbytes + problem.values.nbytes + problem.dy.nbytes)
    # Unstructured products are bound by the activations that come out of shared memory, 4 bytes each.
    tflops = roof["unstructured_tflops" if cell.block == 1 else f"{cell.kind}_tflops"]
    roof_ms = max(flops / tflops / 1e9, moved / roof["copy_gbs"] / 1e6)
    row: dict[str, Any] = {**cell._asdict(), "ms": ms, "roof_ms": roof_ms}
    row["times_dense"] = {name: ms["dense"] / value for name, value in ms.items()}
    row["of_roof"] = roof_ms / ms["ours"]
    if cell.tokens == 2048 and not cell.step:
        want = problem.x.double() @ problem.dense.double().t()
        row["error"] = gpu.error(problem.ours(problem.x, problem.values), want)
        row["error_dense"] = gpu.error(F.linear(problem.x, problem.dense), want)
    return row


def show(row: dict[str, Any]) -> None:
    head = " ".join(
        f"{value}" for key, value in row.items() if not isinstance(value, dict) and key not in ("roof_ms", "of_roof")
    )
    times = ", ".join(f"{name} {row['ms'][name]:.3f} ms ({ratio:.2f}x)" for name, ratio in row["times_dense"].items())
    print(f"{head} | {times} | {100 * row['of_roof']:.0f} % of roof", flush=True)


def main() -> None:
    arguments = gpu.parser(__doc__).parse_args()
    gpu.run_suite("gpu-linear", gpu.only(cells(), arguments), measure, show, arguments)


if __name__ == "__main__":
    main()
