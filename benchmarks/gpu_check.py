"""All that needs a GPU, in one command of nine minutes: ``make gpu-check`` (PYTHON=python3 OUT=folder).

Stages, each with its own limit, each leaving its log and results in the folder before the next begins: facts of the
machine, build, tests of what has not run on a GPU, its suites, crossovers, then all tests marked cuda,
compute-sanitizer, and the suites that have run before. Nothing is fetched: it runs with the Python, torch and Triton
that are installed. A failed stage does not stop the later ones, but fails the whole. With OUT everything is also in one
archive there, as far as it has come: a machine may give back few files.
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
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import harness

ROOT = Path(__file__).parents[1]
MINIMUM_SECONDS = 15
# Files whose tests, or kernels, have not run on a GPU as they are.
NEW_TESTS = ("unknown_aware_loss", "loss_at_once", "csr_products")


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
            130,
            {"MAX_JOBS": jobs, "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"},
        ),
        Stage("tests-new", [*tests, *parallel, *(f"python_tests/test_{name}.py" for name in NEW_TESTS)], 60),
    ]
    found += suites(
        folder,
        ("gpu-loss", "bench_gpu_unknown_aware_loss", 40),
        ("gpu-csr", "bench_gpu_csr", 30),
        ("gpu-training", "bench_gpu_training", 60),
        ("gpu-networks", "bench_gpu_networks", 90),
        ("gpu-small", "bench_gpu_small", 20),
        ("crossovers", "gpu_crossovers", 30),
    )
    found.append(Stage("tests", [*tests, *parallel], 120))
    if sanitizer := shutil.which("compute-sanitizer"):
        # Without torch's allocator, which hides accesses past the end of a tensor in its own blocks.
        few = "test_triton and ((matches and float32 and (16 or 64)) or uneven or keep_active or geometries)"
        few = f"({few}) or (test_cuda_masked_linear and (matches or strides)) or (test_unknown_aware_loss and mean)"
        command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *tests, "-k", few]
        found.append(Stage("sanitizer", command, 70, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    found.append(Stage("warm", [python, "-m", "benchmarks.gpu_warm"], 60))
    found += suites(
        folder,
        ("gpu-linear", "bench_gpu_masked_linear", 50),
        ("gpu-conv", "bench_gpu_masked_conv2d", 40),
        ("gpu-step", "bench_gpu_step", 30),
        ("gpu-topk", "bench_gpu_topk_indices", 10),
    )
    found.append(Stage("plots", [python, "-m", "benchmarks.gpu_plots", "--folder", str(folder)], 30))
    return found


def suites(folder: Path, *named: tuple[str, str, int]) -> list[Stage]:
    """Of names, modules, and seconds after which a suite begins no further cell. One that is begun is ended: those of
    whole networks are compiled by inductor before they are timed."""
    return [
        Stage(
            name,
            [sys.executable, "-m", f"benchmarks.{module}", "--seconds", str(seconds), "--folder", str(folder)],
            seconds + (60 if name in ("gpu-networks", "gpu-training") else 25),
        )
        for name, module, seconds in named
    ]


def ordered(found: list[Stage], only: list[str] | None, first: list[str]) -> list[Stage]:
    """The stages that run. Those of `first` come after the build, which they need; names that are none are an error."""
    names = [stage.name for stage in found]
    if wrong := [name for name in (*(only or ()), *first) if name not in names]:
        sys.exit(f"gpu-check: expected stages of {', '.join(names)}, got {', '.join(wrong)}.")
    found = sorted(found, key=lambda stage: (stage.name not in ("facts", "build"), stage.name not in first))
    return [stage for stage in found if only is None or stage.name in only]


def pack(folder: Path, archive: Path) -> None:
    """Everything in the folder as one file, which is whole at any time."""
    part = archive.with_name(f".{archive.name}.part")
    with tarfile.open(part, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    part.replace(archive)


def run(stage: Stage, folder: Path, limit: float) -> dict[str, object]:
    """Runs a stage with its output in ``<folder>/<name>.log``; ends it, and what it started, at the limit."""
    begin = time.monotonic()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(stage.environment or {})}
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
    parser.add_argument("--archive", type=Path, help="a .tgz of the folder, made anew after each stage")
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
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
        facts = {"machine": harness.machine(), "stages": results}
        (folder / "stages.json").write_text(json.dumps(facts, indent=1) + "\n")
        if arguments.archive:
            pack(folder, arguments.archive)
    for result in results:
        print(f"{result['stage']:12} {result['result']!s:14} {result['seconds']} s")
    sys.exit(any(result["result"] != 0 for result in results))


if __name__ == "__main__":
    main()
