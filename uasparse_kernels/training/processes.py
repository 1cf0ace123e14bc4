"""Several processes (torchrun) that train one network: who they are, and what one does for all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from uasparse_kernels.training.errors import TrainingError


def rank_and_world() -> tuple[int, int]:
    """Which of how many processes this is."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this process writes files and to the screen."""
    return rank_and_world()[0] == 0


def wait_for_all() -> None:
    """Returns when all processes have come here."""
    if rank_and_world()[1] > 1:
        dist.barrier()


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Joins the processes that torchrun started, if it did; yields this one's device.

    Raises TrainingError for a device that all of them would share.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield device
        return
    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if ":" in device:
        raise TrainingError(f"Expected a device of cpu, cuda or auto for several processes, got {device!r}.")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise TrainingError(f"Expected a GPU for each process, got {torch.cuda.device_count()}; give --device cpu.")
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield f"cuda:{local_rank}" if on_gpu else "cpu"
    finally:
        dist.destroy_process_group()
