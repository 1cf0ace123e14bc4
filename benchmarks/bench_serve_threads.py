"""Two threads of an optimised model: what a call costs after a rest, and how far the two cores are from each other.

After a rest torch's second thread sleeps. A system may wake it on the first one's core, where it waits until that one
has spun for a time slice. OMP_PROC_BIND=true keeps each on a core of its own. A row says the milliseconds of the first
four calls after a rest (an MLP of 4 x 2048 at 90 %, batch 1), in a process without other engines; the last row what a
cache line costs that the other core wrote (cores.cpp, which needs a C++ compiler).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import uasparse_kernels as ua
from benchmarks import bench_serve, harness

RESTS = (0.002, 0.01, 0.05, 0.2)
CALLS = 4
PLACES: dict[str, dict[str, str]] = {"as the system places them": {}, "OMP_PROC_BIND=true": {"OMP_PROC_BIND": "true"}}


def run(seconds: float) -> list[dict[str, Any]]:
    harness.pin(None)
    found = []
    for places, more in PLACES.items():
        environment = {k: v for k, v in os.environ.items() if k != "OMP_PROC_BIND"} | {"OMP_NUM_THREADS": "2"} | more
        command = [sys.executable, "-m", __name__, str(seconds)]
        said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        found += [{"threads": places, **row} for row in json.loads(said.splitlines()[-1])]
    with tempfile.TemporaryDirectory() as folder:
        program, source = Path(folder) / "cores", Path(__file__).with_name("cores.cpp")
        subprocess.run(
            [os.environ.get("CXX", "g++"), "-O3", "-std=c++20", "-pthread", str(source), "-o", program], check=True
        )
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))[:2]]
        ns, rate = subprocess.run([program, *cores], check=True, capture_output=True, text=True).stdout.split()
    return harness.rows([*found, {"cores": cores, "line_ns": float(ns), "read_gb_per_s": float(rate)}])


def after_rests(seconds: float) -> list[dict[str, Any]]:
    """A row a rest, with the median milliseconds of the first calls after it and the longest of all."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    x = torch.randn(1, 2048)
    optimized = ua.optimize_for_inference(bench_serve.prune(bench_serve.mlp(), 0.9), x)
    for _ in range(CALLS):  # the first makes the plan
        optimized(x)
    found = []
    for rest in RESTS:
        times: list[list[float]] = []
        for _ in range(max(7, int(seconds / (rest + 0.01)))):
            time.sleep(rest)
            times.append([])
            for _ in range(CALLS):
                start = time.perf_counter()
                optimized(x)
                times[-1].append(1e3 * (time.perf_counter() - start))
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        found.append({"rest_ms": 1e3 * rest, "calls_ms": medians, "longest_ms": max(map(max, times))})
    return found


if __name__ == "__main__":
    print(json.dumps(after_rests(float(sys.argv[1]))))
