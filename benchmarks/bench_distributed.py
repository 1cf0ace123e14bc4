"""Suite distributed: training steps of two processes (gloo, one core each) under DistributedDataParallel.

    python -m benchmarks distributed

Says what a process gives to the all-reduce a step, which for sparse layers is the active weights and nothing else, and
how long a step takes. Processes on one machine talk through its memory: over a network the bytes count for more.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import uasparse_kernels as ua
from benchmarks import harness
from benchmarks.bench_step import mlp
from uasparse_kernels.training.models import build_model

WORLD = 2
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-1024-1024-11": (mlp, (64, 784)),
    "WRN-22-2": (lambda: build_model("wrn-22-2", 11, 3, 32), (16, 3, 32, 32)),
}


def run(seconds: float = 1.0) -> list[dict[str, Any]]:
    return harness.rows(row(name, sparsity, seconds) for name in NETWORKS for sparsity in (0.9, 0.95))


def row(name: str, sparsity: float, seconds: float, rounds: int = 5) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    args = (port, name, sparsity, seconds, rounds, results)
    torch.multiprocessing.start_processes(_worker, args, nprocs=WORLD, start_method="spawn")
    times, sent, active = results.get()
    return {
        "shape": f"{name}, {WORLD} processes",
        "pass": "step",
        "sparsity": sparsity,
        **harness.compare(times),
        "bytes_sent": sent,
        "bytes_of_active_weights": active,
    }


def _worker(rank: int, port: int, name: str, sparsity: float, seconds: float, rounds: int, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})
    torch.set_num_threads(1)
    ua.keep_freed_memory()
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    build, shape = NETWORKS[name]
    sent = dict.fromkeys(("dense", "ours"), 0)
    steps, active = {}, 0
    for kind in sent:
        torch.manual_seed(0)
        model = build()
        if kind == "ours":
            model = ua.sparsify(model, sparsity, distribution="uniform", storage="packed")
            active = sum(p.numel() * p.element_size() for p in model.parameters())
        steps[kind] = _step(DistributedDataParallel(model), kind, torch.randn(shape), sent)
    for step in steps.values():
        step()  # buckets are put in order after the first
    sent.update(dict.fromkeys(sent, 0))
    start = time.perf_counter()
    for step in steps.values():
        step()
    # All processes must take as many steps.
    count = torch.tensor(max(rounds, int(len(steps) * seconds / (time.perf_counter() - start))))
    dist.broadcast(count, 0)
    bytes_sent = dict(sent)
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(int(count)):
        for kind, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            times[kind].append(time.perf_counter() - start)
    if rank == 0:
        results.put(({kind: statistics.median(values) for kind, values in times.items()}, bytes_sent, active))
    dist.destroy_process_group()
    os._exit(0)  # Python's shutdown may be ended by SIGABRT, where a thread of torch's still holds an object of its


def _step(model: DistributedDataParallel, kind: str, x: torch.Tensor, sent: dict[str, int]) -> Callable[[], None]:
    """A training step, which adds the bytes of what it gives to the all-reduce to ``sent``."""

    def counted(state, bucket):  # without annotations: DDP compares them, and here they are strings
        buffer = bucket.buffer()
        sent[kind] += buffer.numel() * buffer.element_size()
        work = dist.all_reduce(buffer.div_(WORLD), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, counted)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    target = torch.arange(len(x)) % 11

    def step() -> None:
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
