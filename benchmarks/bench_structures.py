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
from uasparse_kernels.training.study.suites import SUITES, Suite, plan

BATCH = 128
IMAGE = (1, 28, 28)
PASSES = ("step", "forward", "serving, batch 128", "serving, batch 1")


def networks(suite: Suite, runs: Path | None) -> Iterator[tuple[FitConfig, nn.Module]]:
    """The networks of the first seed that are trained from scratch: the dense one, then by structure and sparsity."""
    for run in plan(suite):
        if run.config.seed == suite.seeds[0] and not run.start:
            if runs is None:
                torch.manual_seed(run.config.seed)
                yield run.config, build_network(run.config, 10, IMAGE[0], IMAGE[-1])[0]
            else:
                yield run.config, load_model(runs / run.folder)[0]


def calls(model: nn.Module, which: str, x: Tensor) -> Callable[[], Any]:
    """One of PASSES; the model may change."""
    if which == "step":
        return step(model, x)
    if which == "forward":
        return harness.forward_call(model, x)
    served, few = ua.optimize_for_inference(model.eval(), x), x[: int(which.rsplit(" ", 1)[1])].contiguous()
    return lambda: served(few)


def rows(suite: Suite, runs: Path | None, seconds: float, passes: tuple[str, ...] = PASSES) -> Iterator[dict[str, Any]]:
    x, last = torch.randn(BATCH, *IMAGE), {"memory_format": torch.channels_last}
    found = list(networks(suite, runs))
    for which in passes:
        variants: dict[Any, Callable[[], Any]] = {}
        for config, model in found:
            if config.method == "dense":
                few = x[:1] if which.endswith(" 1") else x
                plain: Any = {"step": step}.get(which, harness.forward_call)
                variants["dense"] = plain(copy.deepcopy(model), few)
                variants["dense channels_last"] = plain(copy.deepcopy(model).to(**last), few.to(**last))
                continue
            variants[structure_of(config), config.sparsity] = calls(copy.deepcopy(model), which, x)
        times = harness.interleave(variants, seconds=seconds, rounds=5)
        dense = {name: s for name, s in times.items() if isinstance(name, str)}
        for (structure, sparsity), spent in (pair for pair in times.items() if isinstance(pair[0], tuple)):
            compared = harness.compare(dense | {"ours": spent})
            yield {"shape": structure, "sparsity": sparsity, "pass": which} | compared


def structure_of(config: FitConfig) -> str:
    """As the study names it."""
    named = {"srigl": "fan-in", "2:4": "2:4"}.get(config.method, config.block)
    return "unstructured" if named == "1x1" else named


def run(seconds: float) -> list[dict[str, Any]]:
    folder = os.environ.get("UASPARSE_STRUCTURES_RUNS")
    return harness.rows(rows(SUITES["structures"], Path(folder) if folder else None, seconds))
