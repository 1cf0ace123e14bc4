"""All that needs a GPU, in one command of less than ten minutes: ``make gpu-check`` (PYTHON=python3 OUT=folder).

Stages, each with its own limit, each leaving its log and results in the folder before the next begins: facts of the
machine, build, tests marked cuda, compute-sanitizer, kernels compiled, suites (what has not run yet first), crossovers,
plots. Nothing is fetched: it runs with the Python, torch and Triton that are installed. A failed stage does not stop
the later ones, but fails the whole.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
MINIMUM_SECONDS = 15


class Stage(NamedTuple):
    name: str
    command: list[str]
    seconds: int
    environment: dict[str, str] | None = None


def stages(folder: Path) -> list[Stage]:
    python, jobs = sys.executable, str(os.cpu_count() or 4)
    major, minor = torch.cuda.get_device_capability()
    # The study's tests need its packages, and no GPU.
    tests = [python, "-m", "pytest", "-m", "cuda", "-rf", "--durations=5", "--ignore-glob=*/test_training_*"]
    parallel = ["-n", str(min(12, int(jobs)))] if importlib.util.find_spec("xdist") else []
    found = [
        Stage("facts", [python, "-m", "uasparse_kernels"], 30),
        Stage(
            "build",
            [python, "setup.py", "build_ext", "--inplace"],
            150,
            {"MAX_JOBS": jobs, "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"},
        ),
        Stage("tests", [*tests, *parallel], 130),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        # Without torch's allocator, which hides accesses past the end of a tensor in its own blocks.
        few = "test_triton and ((matches and float32 and (16 or 64)) or uneven or keep_active or geometries)"
        few = f"({few}) or (test_cuda_masked_linear and (matches or strides))"
        command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *tests, "-k", few]
        found.append(Stage("sanitizer", command, 70, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    found.append(Stage("warm", [python, "-m", "benchmarks.gpu_warm"], 60))
    for suite, module, seconds in (
        ("gpu-networks", "bench_gpu_networks", 110),
        ("gpu-loss", "bench_gpu_unknown_aware_loss", 15),
        ("gpu-small", "bench_gpu_small", 25),
        ("gpu-linear", "bench_gpu_masked_linear", 50),
        ("gpu-conv", "bench_gpu_masked_conv2d", 40),
        ("gpu-step", "bench_gpu_step", 30),
        ("crossovers", "gpu_crossovers", 30),
        ("gpu-topk", "bench_gpu_topk_indices", 10),
    ):
        command = [python, "-m", f"benchmarks.{module}", "--seconds", str(seconds), "--folder", str(folder)]
        slack = (
            60 if suite == "gpu-networks" else 25
        )  # a cell that is begun is ended: inductor compiles before it times
        found.append(Stage(suite, command, seconds + slack))
    found.append(Stage("plots", [python, "-m", "benchmarks.gpu_plots", "--folder", str(folder)], 30))
    return found


def ordered(found: list[Stage], only: list[str] | None, first: list[str]) -> list[Stage]:
    """The stages that run. Those of `first` come after the build, which they need; names that are none are an error."""
    names = [stage.name for stage in found]
    if wrong := [name for name in (*(only or ()), *first) if name not in names]:
        sys.exit(f"gpu-check: expected stages of {', '.join(names)}, got {', '.join(wrong)}.")
    found = sorted(found, key=lambda stage: (stage.name not in ("facts", "build"), stage.name not in first))
    return [stage for stage in found if only is None or stage.name in only]


def run(stage: Stage, folder: Path, limit: float) -> dict[str, object]:
    """Runs a stage with its output in ``<folder>/<name>.log``; ends it, and what it started, at the limit."""
    begin = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(stage.environment or {})}
    with (folder / f"{stage.name}.log").open("w") as log:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "out of time"
    return {"stage": stage.name, "result": code, "seconds": round(time.monotonic() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results" / "gpu-check")
    parser.add_argument("--seconds", type=float, default=570, help="for everything")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages and no others")
    parser.add_argument("--first", nargs="+", metavar="STAGE", default=[], help="these before the other suites")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu-check: no CUDA device is at hand.")
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    results = []
    for stage in ordered(stages(folder), arguments.only, arguments.first):
        limit = min(stage.seconds, end - time.monotonic())
        if limit < MINIMUM_SECONDS:
            results.append({"stage": stage.name, "result": "no time left", "seconds": 0})
        else:
            results.append(run(stage, folder, limit))
            print(f"--- {results[-1]}")
            print("\n".join((folder / f"{stage.name}.log").read_text(errors="replace").splitlines()[-25:]), flush=True)
        (folder / "stages.json").write_text(json.dumps(results, indent=1) + "\n")
    for result in results:
        print(f"{result['stage']:12} {result['result']!s:14} {result['seconds']} s")
    sys.exit(any(result["result"] != 0 for result in results))


if __name__ == "__main__":
    main()
