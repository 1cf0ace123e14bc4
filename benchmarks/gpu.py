"""How the GPU suites time: CUDA graphs, interleaved, the L2 cache flushed, medians of event times; roofs beside."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness

DEVICE = "cuda"
# Bytes a clock that a multiprocessor's shared memory gives, and the clock that it is reckoned with (H100 SXM, at work).
SHARED_BYTES, CLOCK_HZ = 128, 1.755e9


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
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    unstructured = 2 * processors * SHARED_BYTES / 4 * CLOCK_HZ / 1e12
    return found | {"copy_gbs": 2 * source.nbytes / ms / 1e6, "unstructured_tflops": unstructured}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that the GPU suites share."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--seconds", type=float, default=150, help="about; the cells come in order of importance")
    found.add_argument("--folder", type=Path, default=harness.RESULTS)
    found.add_argument("--only", nargs=2, metavar=("KIND", "BLOCK"), help="cells of this kind and block")
    found.add_argument("--steps", action="store_true", help="cells with a backward only")
    return found


def only(cells: Iterable[Any], arguments: argparse.Namespace) -> Iterator[Any]:
    """The cells that were asked for."""
    for cell in cells:
        if arguments.only in (None, [cell.kind, str(cell.block)]) and (cell.step or not arguments.steps):
            yield cell


def run_suite(
    suite: str,
    cells: Iterable[Any],
    measure: Callable[[Any, Clock, dict[str, float]], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
    arguments: argparse.Namespace,
) -> None:
    """Measures cell after cell until the time is up, and keeps the rows after each; a cell that fails leaves a line."""
    end = time.monotonic() + arguments.seconds
    clock, rows = Clock(), []
    roof = roofs(clock)
    print(roof)
    for cell in cells:
        if rows and time.monotonic() > end:
            print(f"{suite}: out of time after {len(rows)} cells")
            break
        try:
            rows.append(measure(cell, clock, roof))
        except Exception as error:
            print(f"{cell}: {type(error).__name__}: {error}", flush=True)
            continue
        show(rows[-1])
        harness.save(suite, rows, arguments.folder, roofs=roof)
    if not rows:
        raise SystemExit(f"{suite}: no cell could be measured")


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the error relative to the norm of ``want`` (float64)."""
    return float((got.double() - want).norm() / want.norm())
