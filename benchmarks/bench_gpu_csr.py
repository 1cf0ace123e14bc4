"""Suite gpu-csr: float32 products with few active weights, by our unstructured kernel, and by cuSPARSE through torch.

    python -m benchmarks.bench_gpu_csr [--seconds 40] [--folder DIR]

"CSR" is what the dispatch would take: the input transposed, the product, the result transposed. "CSR, bare" is the
product alone, and "CSR, no transposes" gives cuSPARSE the input as it lies. A row says also whether CSR results are the
same in two runs (`repeats`), whether it can be captured in a CUDA graph (`captures`; all are timed without one), and
both relative errors. Where "CSR" is faster than "ours" the dispatch may take it: `python -m benchmarks.gpu_crossovers`
finds the density up to which, and keeps it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import gpu
from benchmarks.bench_gpu_masked_linear import Cell, Problem, show
from uasparse_kernels.ops._common import pattern_tensors
from uasparse_kernels.triton._csr import csr_product


def cells() -> Iterator[Cell]:
    """`step` stands for grad-input."""
    for density in (0.01, 0.005, 0.02, 0.002, 0.05):
        for out, inp, tokens in ((4096, 4096, 8192), (4096, 16384, 8192), (4096, 4096, 2048), (16384, 4096, 8192)):
            yield Cell(out, inp, tokens, "fp32", density, 1)
            if tokens == 8192:
                yield Cell(out, inp, tokens, "fp32", density, 1, True)


def calls(problem: Problem, transposed: bool) -> dict[str, Callable[[], torch.Tensor]]:
    crow, col, ccol, row, perm = pattern_tensors(problem.pattern)
    if transposed:
        x, values, offsets, index = problem.dy, problem.values[perm.long()], ccol, row
        dense = problem.dense.t().contiguous()
    else:
        x, values, offsets, index, dense = problem.x, problem.values, crow, col, problem.dense
    out = x.new_empty(x.shape[0], dense.shape[0])
    weight = torch.sparse_csr_tensor(offsets, index, values, dense.shape, check_invariants=False)
    features = x.t().contiguous()

    def ours() -> torch.Tensor:
        if gpu.DEVICE == "cuda":
            torch.ops.uasparse.sparse_product_out(x, values, None, offsets, index, out)
            return out
        return F.linear(x, dense)  # tests

    return {
        "dense": lambda: F.linear(x, dense),
        "ours": ours,
        "CSR": lambda: csr_product(x, values, None, offsets, index),
        "CSR, bare": lambda: torch.mm(weight, features).t(),
        "CSR, no transposes": lambda: torch.mm(weight, x.t()).t(),
    }


def medians_ms(variants: Mapping[str, Callable[[], Any]], clock: gpu.Clock, rounds: int = 20) -> dict[str, float]:
    """As gpu.Clock's, without CUDA graphs: products take longer than their launches."""
    events: dict[str, list[Any]] = {name: [] for name in variants}
    for turn in range(rounds + 3):
        for name, call in variants.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            clock.flush.zero_()
            begin.record()
            call()
            end.record()
            if turn >= 3:
                events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def captures(call: Callable[[], Any]) -> bool:
    """Whether a call can be captured in a CUDA graph, and gives the same there."""
    want, graph = call().clone(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            got = call()
        got.fill_(torch.nan)
        graph.replay()
    except RuntimeError as error:
        print(f"    not captured: {str(error).splitlines()[0][:150]}", flush=True)
        return False
    torch.cuda.synchronize()
    return bool(torch.allclose(got, want, rtol=1e-3, atol=1e-3))


def measure(cell: Cell, clock: Any, roof: dict[str, float]) -> dict[str, Any]:
    problem = Problem(cell)
    variants = calls(problem, cell.step)
    on_gpu = gpu.DEVICE == "cuda"
    ms = medians_ms(variants, clock) if on_gpu else clock.medians_ms(variants)
    first = variants["CSR"]().clone()
    want = variants["dense"]().double()
    row: dict[str, Any] = {**cell._asdict(), "ms": ms}
    flops = 2 * cell.tokens * problem.pattern.nnz
    row["roof_ms"] = flops / roof["unstructured_tflops"] / 1e9
    row["times_dense"] = {name: ms["dense"] / value for name, value in ms.items()}
    row["of_roof"] = row["roof_ms"] / min(ms["ours"], ms["CSR"])
    row["error"], row["error_ours"] = gpu.error(first, want), gpu.error(variants["ours"](), want)
    row["repeats"] = bool(torch.equal(first, variants["CSR"]()))
    row["captures"] = captures(variants["CSR"]) if on_gpu else None
    return row


def main() -> None:
    arguments = gpu.parser(__doc__).parse_args()
    gpu.run_suite("gpu-csr", gpu.only(cells(), arguments), measure, show, arguments)


if __name__ == "__main__":
    main()
