"""Measures the crossovers of a CUDA device: the densities at which the vendor's dense kernels become faster."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from uasparse_kernels import _crossovers
from uasparse_kernels.ops import _common, _cuda
from uasparse_kernels.ops.masked_conv2d import masked_conv2d
from uasparse_kernels.ops.masked_linear import masked_linear
from uasparse_kernels.pattern import SparsityPattern
from uasparse_kernels.triton._csr import csr_product

_STEPS = 5
_DTYPES = {"half": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32"), "fp32": (torch.float32, "ieee")}


def measure_crossovers(
    device: torch.device | str,
    *,
    seconds: float = math.inf,
    features: int = 4096,
    vectors: int = 8192,
    channels: int = 256,
    report: Callable[[_crossovers.Table], None] = lambda _: None,
) -> _crossovers.Table:
    """Measures where a layer's training step packed, by the sparse kernel, is as fast as dense-stored, by the vendor's.

    Args:
        device: a CUDA device (tests pass the CPU, where other kernels serve).
        seconds: about; cells come in order of importance, and those that there was no time for are left out.
        features, vectors: of the linear layer, and how many it is applied to.
        channels: of the 3x3 convolution, on as many pixels as there are vectors.
        report: called with what is known after each cell.

    Returns:
        ``table[op][arithmetic][block]``, densities in (0, 1], as ``_cuda.PREDICTED``.
    """
    device, end = torch.device(device), time.monotonic() + seconds
    table: _crossovers.Table = {}
    for op, arithmetic, block in _cells():
        if table and time.monotonic() > end:
            break
        if block == "csr":
            table.setdefault(op, {}).setdefault(arithmetic, {})[block] = _measure_csr(device, features, vectors)
            report(table)
            continue
        size = features if op == "masked_linear" else channels
        if size % block:
            continue
        density = _measure(op, arithmetic, block, device, size, vectors)
        table.setdefault(op, {}).setdefault(arithmetic, {})[str(block)] = density
        if op == "masked_linear" and block == 1:
            # A convolution by 1x1 is this very product.
            table.setdefault("masked_conv2d", {}).setdefault(arithmetic, {})["1"] = density
        report(table)
    return table


def _cells() -> Iterator[tuple[str, str, Any]]:
    yield "masked_linear", "fp32", "csr"  # what serves the cells after it
    first = [("half", 64), ("half", 128), ("half", 1), ("fp32", 1), ("tf32", 1), ("half", 32), ("half", 16)]
    yield from (("masked_linear", arithmetic, block) for arithmetic, block in first)
    for op in ("masked_conv2d", "masked_linear"):
        for arithmetic in ("half", "tf32", "fp32"):
            for block in (64, 128, 32, 16):
                if op == "masked_conv2d" or arithmetic != "half":
                    yield op, arithmetic, block


def _measure(op: str, arithmetic: str, block: int, device: torch.device, size: int, vectors: int) -> float:
    """The density up to which the sparse kernel is faster, looked for around what is predicted."""
    dtype, precision = _DTYPES[arithmetic]
    backends: Any = torch.backends
    backend = backends.cuda.matmul if op == "masked_linear" else backends.cudnn.conv
    before, backend.fp32_precision = backend.fp32_precision, precision
    try:
        middle = _cuda.PREDICTED[op][arithmetic][str(block)] or 0.01
        low, high = max(middle / 16, 1e-3), min(16 * middle, 1.0)
        dense = _step(op, block, low, dtype, device, size, vectors, packed=False)

        def is_faster(density: float) -> bool:
            sparse = _step(op, block, density, dtype, device, size, vectors, packed=True)
            # Dense anew each time: one bad reading must not decide five times.
            return _time_ms(sparse, device) < _time_ms(dense, device)

        return _bisect(low, high, is_faster)
    finally:
        backend.fp32_precision = before


def _bisect(low: float, high: float, is_faster: Callable[[float], bool]) -> float:
    """Bisection in the logarithm of the density: within a tenth of the answer at the end.

    0 where it was never faster; where it always was, the highest density that was tried.
    """
    won = lost = False
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        if is_faster(middle):
            low, won = middle, True
        else:
            high, lost = middle, True
    if not won:
        return 0.0
    return math.sqrt(low * high) if lost else low


def _measure_csr(device: torch.device, size: int, vectors: int) -> float:
    """Where torch's CSR kernel is as fast as the unstructured one: forward, as grad-input is the same product."""
    x = torch.randn(vectors, size, device=device)

    def is_faster(density: float) -> bool:
        pattern = SparsityPattern.random((size, size), density).to(device)
        crow, col, *_rest = _common.pattern_tensors(pattern)
        values = torch.randn(pattern.packed_shape, device=device)
        out = x.new_empty(vectors, size)

        def ours() -> Any:
            if device.type == "cuda":
                return torch.ops.uasparse.sparse_product_out(x, values, None, crow, col, out)
            return masked_linear(x, values, pattern)

        def vendors() -> Any:
            return csr_product(x, values, None, crow, col, out)

        # Not in CUDA graphs, in which CSR kernels do not serve either.
        return _time_ms(vendors, device, graph=False) < _time_ms(ours, device, graph=False)

    return _bisect(1e-3, 0.1, is_faster)


def _step(
    op: str,
    block: int,
    density: float,
    dtype: torch.dtype,
    device: torch.device,
    size: int,
    vectors: int,
    *,
    packed: bool,
) -> Callable[[], Any]:
    """A layer's forward and backward; the weight is [size, size], or [size, size, 3, 3]."""
    shape = (size, size) if op == "masked_linear" else (size, size, 3, 3)
    pattern = SparsityPattern.random(shape, density, block=(block, block)).to(device)
    weight = torch.randn(pattern.packed_shape, device=device, dtype=dtype) / math.sqrt(size)
    kernel = ("cuda" if block == 1 else "triton") if packed else "dense"
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    if op == "masked_linear":
        x = torch.randn(vectors, size, device=device, dtype=dtype)

        def function(x, w):
            return masked_linear(x, w, pattern)
    else:
        side = max(1, min(14, math.isqrt(vectors)))
        x = torch.randn(max(1, vectors // side**2), size, side, side, device=device, dtype=dtype)
        x = x.to(memory_format=torch.channels_last)

        def function(x, w):
            return masked_conv2d(x, w, pattern, padding=1)

    if not packed:
        weight = pattern.unpack(weight)
        weight = weight.to(memory_format=torch.channels_last) if weight.dim() == 4 else weight
    x.requires_grad_()
    weight.requires_grad_()
    with _common.forced("dense"):
        grad = torch.randn_like(function(x, weight))

    def step() -> Any:
        with _common.forced(kernel):
            return torch.autograd.grad(function(x, weight), (x, weight), grad)

    return step


def _time_ms(step: Callable[[], Any], device: torch.device, rounds: int = 7, *, graph: bool = True) -> float:
    """Median milliseconds; on a GPU those of the device, by a CUDA graph."""
    for _ in range(3):
        step()
    times = []
    if device.type != "cuda":
        for _ in range(rounds):
            begin = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)
    torch.cuda.synchronize(device)
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        step = captured.replay
    for _ in range(rounds):
        begin_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin_event.record()
        step()
        end_event.record()
        end_event.synchronize()
        times.append(begin_event.elapsed_time(end_event))
    return statistics.median(times)
