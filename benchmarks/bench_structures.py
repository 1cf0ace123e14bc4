"""Suite structures: one network in every structure, beside the dense one: a training step, a forward pass, and serving.

    python -m benchmarks structures --folder benchmarks/results/zen5

The network and the structures are those of the study `python -m training compare --suite structures`, which has their
accuracies. UASPARSE_STRUCTURES_RUNS names its folder: then the networks that it trained are timed (seed 0), else ones
with random patterns. A step is that of SGD with momentum, without updates of the topology; serving is
`optimize_for_inference`. The rival is the dense network in the faster of torch's two layouts.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import uasparse_kernels as ua
from benchmarks import harness
from benchmarks.bench_networks import step
from uasparse_kernels.training.config import FitConfig
from uasparse_kernels.training.evaluate import load_model
from uasparse_kernels.training.recipe import build_network
from uasparse_kernels.training.study.structures import FORWARD, SERVED, STEP, structure_of
from uasparse_kernels.training.study.suites import SUITES, Suite, plan

BATCH = 128
IMAGE = (1, 28, 28)
PASSES = (STEP, FORWARD, *SERVED)


def networks(suite: Suite, runs: Path | None) -> Iterator[tuple[FitConfig, nn.Module]]:
    """The networks of the first seed that are trained from scratch: the dense one, and by structure and sparsity."""
    for run in plan(suite):
        if run.config.seed == suite.seeds[0] and not run.start and run.config.drop == "magnitude":
            if runs is None:
                torch.manual_seed(run.config.seed)
                yield run.config, build_network(run.config, 10, IMAGE[0], IMAGE[-1])[0]
            else:
                yield run.config, load_model(runs / run.folder)[0]


def rows(suite: Suite, runs: Path | None, seconds: float, passes: tuple[str, ...] = PASSES) -> Iterator[dict[str, Any]]:
    x, last = torch.randn(BATCH, *IMAGE), {"memory_format": torch.channels_last}
    found = {(structure_of(config), config.sparsity): model for config, model in networks(suite, runs)}
    dense = found.pop(("dense", 0.0))
    served: dict[tuple[str, float], nn.Module] = {}
    if any(which.startswith("serving") for which in passes):
        served = {key: ua.optimize_for_inference(copy.deepcopy(model).eval(), x) for key, model in found.items()}
    for which in passes:
        few = x[: int(which.rsplit(" ", 1)[1])] if which in PASSES[2:] else x
        plain: Callable[[nn.Module, Tensor], Callable[[], Any]] = step if which == "step" else harness.forward_call
        variants = {"dense": plain(copy.deepcopy(dense), few)}
        variants["dense channels_last"] = plain(copy.deepcopy(dense).to(**last), few.to(**last))
        ours = {key: f"{key[0]} at {key[1]:.0%}" for key in found}
        for key, name in ours.items():
            variants[name] = harness.forward_call(served[key], few) if which in PASSES[2:] else plain(found[key], few)
        times = harness.interleave(variants, seconds=seconds, rounds=5)
        rivals = {name: times[name] for name in ("dense", "dense channels_last")}
        for (structure, sparsity), name in ours.items():
            compared = harness.compare(rivals | {"ours": times[name]})
            yield {"shape": structure, "sparsity": sparsity, "pass": which} | compared


def run(seconds: float) -> list[dict[str, Any]]:
    folder = os.environ.get("UASPARSE_STRUCTURES_RUNS")
    return harness.rows(rows(SUITES["structures"], Path(folder) if folder else None, seconds))
