"""Suite gpu-training: steps of the study's `cifar` suite (ResNet-18, batches of 128, 90 %), one run, and three at once.

    python -m benchmarks.bench_gpu_training [--seconds 90] [--folder DIR]

What a step of all runs takes tells whether a training of 100 epochs fits into the minutes that there are
(`minutes_of_100_epochs`: of 390 steps each, for all runs together). Random images; everything else is as in a run, an
update of the topology included. Compiling is not timed: `seconds_to_start` has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks import gpu
from uasparse_kernels.training.config import FitConfig, with_arm
from uasparse_kernels.training.data import ImageSet, TrainTest
from uasparse_kernels.training.recipe import Trainer
from uasparse_kernels.training.study.suites import SUITES

STEPS, EPOCH_STEPS, EPOCHS = 100, 390, 100


class Cell(NamedTuple):
    runs: int
    mode: str  # eager or compiled
    kind: str = "bf16"
    block: int = 1
    step: bool = True


def cells() -> Iterator[Cell]:
    yield from (Cell(3, "compiled"), Cell(1, "compiled"), Cell(3, "eager"), Cell(1, "eager"))


def config_of(mode: str) -> FitConfig:
    config = with_arm(SUITES["cifar"].config, "rigl+vote+hard-shuffle")
    return replace(config, sparsity=0.9, compile=mode == "compiled")


def timed(config: FitConfig, steps: int, ready: Callable[[], Any]) -> float:
    """Milliseconds of a training step, once `ready` returns; what is compiled is so before it is called."""
    images = torch.randint(256, (config.batch_size * steps, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(len(images)) % 10
    train = ImageSet("random", images, labels, tuple("0123456789"))
    trainer = Trainer(config, TrainTest(train, train.select(slice(0, 100))), gpu.DEVICE)
    trainer.train_epoch()
    ready()
    seconds = min(trainer.train_epoch()["seconds"] for _ in range(2))  # it ends by reading its loss
    return 1e3 * seconds / steps


def measure(cell: Cell, clock: Any, roof: dict[str, float]) -> dict[str, Any]:
    begin = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.bench_gpu_training", "--worker", cell.mode]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(cell.runs)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.readline() != "ready\n":
                raise RuntimeError("a run ended before its first epoch did")
        started = time.monotonic() - begin
        for worker in workers:
            assert worker.stdin is not None
            print("go", file=worker.stdin, flush=True)
        ms = [json.loads(worker.stdout.readline()) for worker in workers if worker.stdout is not None]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return {
        **cell._asdict(),
        "ms": {"step": max(ms)},
        "images_per_second": 1e3 * 128 * sum(1 / one for one in ms),
        "minutes_of_100_epochs": max(ms) * EPOCH_STEPS * EPOCHS / 6e4,
        "seconds_to_start": started,
    }


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['runs']} runs, {row['mode']}: {row['ms']['step']:.2f} ms a step of each, "
        f"{row['images_per_second']:.0f} images/s, {row['minutes_of_100_epochs']:.1f} minutes for 100 epochs of all, "
        f"{row['seconds_to_start']:.0f} s to start",
        flush=True,
    )


def _work(mode: str) -> None:
    torch.set_num_threads(1)

    def ready() -> None:
        print("ready", flush=True)
        input()

    print(json.dumps(timed(config_of(mode), STEPS, ready)), flush=True)


def main() -> None:
    parser = gpu.parser(__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments.worker)
        return
    gpu.run_suite("gpu-training", gpu.only(cells(), arguments), measure, show, arguments)


if __name__ == "__main__":
    main()
