"""Suite compile: training steps of whole networks, dense and sparse, eager and through torch.compile (inductor).

python -m benchmarks compile                     one thread; minutes go into compiling

``UASPARSE_BENCH_NETWORKS``: other networks of the suite of that name, by parts of their names, separated by commas.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import uasparse_kernels as ua
from benchmarks import harness
from benchmarks.bench_networks import NETWORKS, Network, step

SMALL = ("ResNet-50 224 b8", "ResNet-18 CIFAR b64", "ViT-S/16 b8", "MLP b128")
SPARSITY, DISTRIBUTION = 0.9, "uniform"


def variants(network: Network) -> dict[str, Any]:
    """Steps by name. Dense convolutions are measured in both layouts, of which the faster one is the rival."""
    torch._dynamo.reset()  # sizes of another network are no reason to take them for symbols
    dense, x = network.model(), torch.randn(network.input)
    sparse = ua.sparsify(copy.deepcopy(dense), SPARSITY, distribution=DISTRIBUTION, exempt=network.exempt)
    layouts = {"": dict[str, Any](), " channels_last": {"memory_format": torch.channels_last}}
    found = {}
    for name, layout in layouts.items() if x.dim() == 4 else [("", {})]:
        found["dense" + name] = step(copy.deepcopy(dense).to(**layout), x.to(**layout))
        found["dense compiled" + name] = step(_compiled(copy.deepcopy(dense).to(**layout)), x.to(**layout))
    found["sparse"] = step(copy.deepcopy(sparse), x)
    found["sparse compiled"] = step(_compiled(sparse), x)
    return found


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, fullgraph=True, dynamic=False)  # type: ignore[return-value]


def rows(network: Network, seconds: float) -> Iterator[dict[str, Any]]:
    times = harness.interleave(variants(network), seconds=seconds, rounds=3)
    ours = times.pop("sparse compiled")
    eager = min(s for name, s in times.items() if name in ("dense", "dense channels_last"))
    compiled = min(s for name, s in times.items() if name.startswith("dense compiled"))
    shown = {"ms": {name: 1e3 * value for name, value in (times | {"ours": ours}).items()}}
    speedups = {"dense": eager / ours, "dense compiled": compiled / ours, "sparse": times["sparse"] / ours}
    yield {"shape": network.name, "sparsity": SPARSITY, "pass": "step"} | shown | {"speedup_over": speedups}


def run(seconds: float = 1.0) -> list[dict[str, Any]]:
    wanted = os.environ.get("UASPARSE_BENCH_NETWORKS", ",".join(SMALL)).split(",")
    found = []
    for network in NETWORKS:
        if any(part in network.name for part in wanted):
            found += harness.rows(rows(network, seconds))
    return found
