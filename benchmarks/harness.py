"""How everything here is timed: variants interleaved in one process, medians, ratios, roofs measured beside them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import uasparse_kernels as ua

RESULTS = Path(__file__).resolve().parent / "results"
# Where the tables of the results are shown.
_ROOT = Path(__file__).parents[1]
PAGES = (_ROOT / "README.md", *sorted((_ROOT / "docs").rglob("*.md")))


def table_name(path: Path) -> str:
    """The table of a file of results in the pages: "linear", or "avx2/linear" in a folder of its own; "" elsewhere."""
    path = path.resolve()
    return path.relative_to(RESULTS).with_suffix("").as_posix() if path.is_relative_to(RESULTS) else ""


def pin(count: int | None) -> None:
    """Keeps the process on the first cores, where the system lets it choose, so that it is not moved about."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(_CORES)[:count])


_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 1.0,
    rounds: int = 11,
    rest: float = 0.0,
    warm: float = 0.0,
) -> dict[str, float]:
    """Median seconds of a call of each variant, all called in turn so that the machine's moods meet them alike. Before
    each timed call goes one that is not, for the other variants have filled the caches.

    Args:
        seconds: time to spend on each variant, about.
        rounds: calls of each at least.
        rest: seconds to wait before each variant. Threads that wait for work spin for some milliseconds, and would take
            the next variant's core if it has threads of its own.
        warm: seconds of calls that are not timed before each timed one, where one is not enough: a call of a tenth of a
            millisecond after other work finds threads asleep, and caches and the prediction of branches as that left
            them.
    """
    slowest = 0.0
    for call in variants.values():
        call()
        start = time.perf_counter()
        call()
        slowest = max(slowest, time.perf_counter() - start)
    rounds = max(rounds, min(1000, int(seconds / max(2 * slowest, warm, rest, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            if rest:
                time.sleep(rest)
            call()
            until = time.perf_counter() + warm
            while time.perf_counter() < until:
                call()
            for _ in range(3 if warm else 1):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def training_call(layer: nn.Module, input: torch.Tensor) -> Callable[[], Any]:
    """A call of ``layer`` and its backward, to the input and all parameters; gradients are fresh, as in training."""
    input = input.clone().requires_grad_()
    grad = torch.randn_like(layer(input))
    wanted = [input, *layer.parameters()]

    def call() -> None:
        for tensor in wanted:
            tensor.grad = None
        layer(input).backward(grad)

    return call


def forward_call(layer: nn.Module, input: torch.Tensor) -> Callable[[], Any]:
    """A call of ``layer`` for inference."""
    layer.eval()

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return layer(input)

    return call


def compare(times: Mapping[str, float], flops: float | None = None) -> dict[str, Any]:
    """What a row says of the times of its variants, in seconds; names that begin with "dense" are one rival.

    Args:
        flops: floating-point operations on nonzeros, where that is one number.
    """
    dense = min(value for name, value in times.items() if name.startswith("dense"))
    rivals = {"dense": dense} | {
        name: s for name, s in times.items() if name != "ours" and not name.startswith("dense")
    }
    return {
        "ms": {name: 1e3 * value for name, value in times.items()},
        "speedup_over": {name: value / times["ours"] for name, value in rivals.items()},
    } | ({"gflops": flops / times["ours"] / 1e9} if flops else {})


def rows(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a suite, each printed as it comes."""
    kept = []
    for row in found:
        kept.append(row)
        show(row)
    return kept


_UNITS = {"ms": "ms", "mib": "MiB"}


def show(row: Mapping[str, Any]) -> None:
    """Prints a row: names and numbers, then times and ratios."""
    parts = [
        f"{name} {value:.3g}" if isinstance(value, float) else str(value)
        for name, value in row.items()
        if not isinstance(value, Mapping)
    ]
    parts += [
        f"{value:.4g} {_UNITS.get(name.rpartition('_')[2], 'x')} {key}"
        for name, values in row.items()
        if isinstance(values, Mapping)
        for key, value in values.items()
    ]
    print("  ".join(parts), flush=True)


def matmul_roof() -> float:
    """GFLOP/s that torch's own float32 matmul reaches at 1024x1024x1024 with the current number of threads."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / interleave({"matmul": lambda: a @ b}, seconds=0.5)["matmul"] / 1e9


def copy_roof() -> float:
    """GB/s (read and written) of a copy of 256 MiB with the current number of threads."""
    a = torch.zeros(64 << 20)
    b = torch.empty_like(a)
    return 2 * a.nbytes / interleave({"copy": lambda: b.copy_(a)}, seconds=0.5)["copy"] / 1e9


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions, commit."""
    info = ua.backend_info()
    root = Path(__file__).parents[1]
    # A copy of the tree on another machine need not have its history.
    commit = (
        os.environ.get("UASPARSE_COMMIT")
        or subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    return {
        "processor": info["cpu"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": info["cpu_isa"],
        "gpu": info["gpu"],
        **({"driver": _driver(), "cuda": torch.version.cuda} if info["gpu"] else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "uasparse_kernels": commit or info["uasparse_kernels"],
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


def save(suite: str, rows: list[dict[str, Any]], folder: Path = RESULTS, **facts: Any) -> Path:
    """Writes the rows of a suite and what they depend on to ``<folder>/<suite>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.json"
    path.write_text(json.dumps({"suite": suite, "machine": machine(), **facts, "rows": rows}, indent=1) + "\n")
    return path
