"""Suite profile: where a sparse training step goes, and what memory alone takes for what stands between its layers.

python -m benchmarks profile

A row is a part of a step: what torch's profiler counts (each op without those that it calls), the bytes of the tensors
that its ops read and write, in place or not, and the time of a copy that reads and writes as many. Convolutions and
linear layers calculate: for them bytes are no roof, and none are given.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import uasparse_kernels as ua
from benchmarks import harness
from benchmarks.bench_networks import NETWORKS, Network, step

NAMES = ("ResNet-50 224 b8", "ResNet-18 CIFAR b64")
SPARSITY = 0.9
STEPS = 5
OPTIMIZER = "optimiser"
# Parts of a step, by the names of ops; what is in none is the rest.
PARTS = {
    "sparse layers, forward": ("uasparse::masked_conv2d", "uasparse::masked_linear"),
    "sparse layers, backward": ("uasparse::masked_conv2d_backward", "uasparse::masked_linear_backward"),
    "dense layers": (
        "aten::convolution", "aten::convolution_backward", "aten::conv2d", "aten::linear", "aten::addmm", "aten::mm",
    ),
    "batch norm, forward": ("uasparse::batch_norm", "aten::native_batch_norm", "aten::batch_norm"),
    "batch norm and what is gated with it, backward": (
        "uasparse::batch_norm_backward", "uasparse::batch_norm_relu_backward", "uasparse::batch_norm_backward_",
        "aten::native_batch_norm_backward",
    ),
    "ReLU, forward": ("uasparse::relu_", "aten::relu", "aten::relu_"),
    "ReLU alone, backward": ("aten::threshold_backward",),
    "additions of maps and of their gradients": ("aten::add", "aten::add_"),
    "pooling": (
        "uasparse::max_pool2d", "aten::max_pool2d_with_indices", "aten::max_pool2d_with_indices_backward", "aten::mean",
        "aten::div", "aten::expand",
    ),
}  # fmt: skip
PART_OF = {name: part for part, names in PARTS.items() for name in names}
COMPUTES = {"sparse layers, forward", "sparse layers, backward", "dense layers", "rest"}


class Bytes(TorchDispatchMode):
    """Counts, by parts, the bytes of what ops take and give; what one writes in place it takes and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        part = PART_OF.get(func.name().split(".")[0])
        if part is not None and "expand" not in func.name():  # which moves nothing
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.found[part] += sum(t.nbytes for t in tensors)
        return result


def moved(model: nn.Module, x: torch.Tensor) -> Counter[str]:
    """Bytes by parts of a step."""
    target = torch.randint(10, (x.shape[0],))
    with Bytes() as count:
        F.cross_entropy(model(x), target).backward()
    # SGD with momentum reads weight, gradient and momentum, and writes the first and the last.
    count.found[OPTIMIZER] = 5 * sum(p.nbytes for p in model.parameters())
    return count.found


def spent(call: Any) -> dict[str, float]:
    """Milliseconds of a call by parts."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(STEPS):
            call()
    found: Counter[str] = Counter()
    for event in profiled.events() or ():
        found[_part_of(event)] += event.self_cpu_time_total / 1e3 / STEPS
    return dict(found)


def _part_of(event: Any) -> str:
    part = "rest"
    while event is not None:
        if event.name.startswith("Optimizer."):
            return OPTIMIZER
        if part == "rest":
            part = PART_OF.get(event.name, part)
        event = event.cpu_parent
    return part


def rows(network: Network, seconds: float, gb_per_s: float) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    model = ua.sparsify(network.model(), SPARSITY, distribution="uniform", exempt=network.exempt)
    x = torch.randn(network.input)
    call = step(model, x)
    for _ in range(2):
        call()
    ms = spent(call)
    size = moved(copy.deepcopy(model), x)
    head = {"network": network.name, "sparsity": SPARSITY}
    for part in (*PARTS, OPTIMIZER, "rest"):
        row = head | {"part": part, "ms": ms.get(part, 0.0)}
        if part not in COMPUTES:
            row |= {"mb": size[part] / 1e6, "copy_ms": size[part] / 1e6 / gb_per_s}
        yield row
    yield head | {"part": "step, without the profiler", "ms": 1e3 * harness.interleave({"": call}, seconds=seconds)[""]}


def run(seconds: float = 1.0) -> list[dict[str, Any]]:
    rate = harness.copy_roof()
    networks = [network for network in NETWORKS if network.name in NAMES]
    return [row for network in networks for row in harness.rows(rows(network, seconds, rate))]
