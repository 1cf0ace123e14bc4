"""The demo's speed: a sparse network beside the same network dense, call by call in one process."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import uasparse_kernels as ua
from uasparse_kernels.training.config import FitConfig
from uasparse_kernels.training.recipe import build_network

SECONDS = 8.0  # of measuring, for each of the two comparisons
WARM_UP = 2  # calls of each that are not counted


@dataclass(frozen=True)
class Speed:
    """Median seconds a call, each for a whole batch; dense is torch's faster memory layout."""

    batch: int
    train_dense: float
    train_sparse: float
    infer_dense: float
    infer_sparse: float


def measure_speed(sparse: nn.Module, config: FitConfig, images: Tensor, seconds: float = SECONDS) -> Speed:
    """Times a training step (forward, backward, SGD) and inference of `sparse`, as `config` says it was trained.

    images: float32 [N, C, H, W], one batch, on the CPU. One thread is used. `sparse` is left as it is. Dense is the
    network of `config` without sparsity, by torch, in NCHW and in channels_last.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(sparse, config, images, seconds)
    finally:
        torch.set_num_threads(threads)


def _measure(sparse: nn.Module, config: FitConfig, images: Tensor, seconds: float) -> Speed:
    head = sparse(images[:1]).shape[1] - config.has_unknown_output
    dense, _ = build_network(replace(config, method="dense"), head, images.shape[1], images.shape[-1])
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    images_last = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(len(images)) % head
    steps = {
        "dense": _step(dense.train(), images, labels, config),
        "dense, channels_last": _step(last.train(), images_last, labels, config),
        "sparse": _step(copy.deepcopy(sparse).train(), images, labels, config),
    }
    train = _medians(steps, seconds)
    optimized = ua.optimize_for_inference(sparse.eval(), images)
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: dense(images),
        "dense, channels_last": lambda: last(images_last),
        "sparse": lambda: optimized(images),
    }
    dense.eval(), last.eval()
    with torch.no_grad():
        infer = _medians(calls, seconds)
    return Speed(len(images), *_pair(train), *_pair(infer))


def _step(model: nn.Module, x: Tensor, y: Tensor, config: FitConfig) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, config.momentum, nesterov=True)

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _medians(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each call; they take turns, so that what else the machine does falls on all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while min(map(len, times.values())) <= WARM_UP or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[WARM_UP:]) for name, taken in times.items()}


def _pair(medians: dict[str, float]) -> tuple[float, float]:
    return min(t for name, t in medians.items() if name != "sparse"), medians["sparse"]
