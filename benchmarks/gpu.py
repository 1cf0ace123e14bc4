"""How the GPU suites time: CUDA graphs, interleaved, the L2 cache flushed, medians of event times; roofs beside."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

DEVICE = "cuda"


class Clock:
    """Times variants in turn; ``flush_bytes`` are overwritten before each call, so that no input lies in the cache."""

    def __init__(self, flush_bytes: int = 256 << 20):
        self.flush = torch.empty(flush_bytes, dtype=torch.int8, device=DEVICE)

    def medians_ms(self, variants: Mapping[str, Callable[[], Any]], *, rounds: int = 30) -> dict[str, float]:
        """Median device milliseconds of a call of each variant. What fails gives NaN and a printed line."""
        ready: dict[str, Callable[[], Any]] = {}
        for name, call in variants.items():
            try:
                ready[name] = captured(call)
            except Exception as error:
                print(f"    {name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}", flush=True)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in ready}
        for _ in range(rounds):
            for name, call in ready.items():
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self.flush.zero_()
                begin.record()
                call()
                end.record()
                events[name].append((begin, end))
        torch.cuda.synchronize()
        times = {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}
        return {name: times.get(name, float("nan")) for name in variants}


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` as a CUDA graph, so that the device is timed and not Python; as it is where it cannot be captured."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def roofs(clock: Clock) -> dict[str, float]:
    """What this device reaches: TFLOP/s of dense products by arithmetic, GB/s (read and written) of a copy."""
    found = {}
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("fp32", torch.float32, "ieee"),
    ):
        torch.backends.cuda.matmul.fp32_precision = precision
        a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=dtype) for _ in range(2))
        ms = clock.medians_ms({"matmul": lambda a=a, b=b: a @ b}, rounds=10)["matmul"]
        found[f"{name}_tflops"] = 2 * 8192**3 / ms / 1e9
    source = torch.randn(1 << 29, device=DEVICE)
    target = torch.empty_like(source)
    ms = clock.medians_ms({"copy": lambda: target.copy_(source)}, rounds=10)["copy"]
    return found | {"copy_gbs": 2 * source.nbytes / ms / 1e6}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the error relative to the norm of ``want`` (float64)."""
    return float((got.double() - want).norm() / want.norm())


class Budget:
    """Seconds that a suite may take; its cells come in order of importance."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> bool:
        return time.monotonic() < self.end
