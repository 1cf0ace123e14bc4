"""What the Triton kernels share on the host side: device facts, precision of float32 products, the choice of a tile."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from uasparse_kernels.triton import settings


class Config(NamedTuple):
    """A tile and how a kernel is compiled for it."""

    tile: int  # output rows (product kernels) or summed rows a step (sampled kernels)
    depth: int  # of a step of the inner product; 0 where the tile says all
    warps: int
    stages: int


class Device(NamedTuple):
    """What a launch needs to know of its device."""

    name: str
    processors: int


@functools.lru_cache
def _cuda_device(index: int) -> Device:
    facts = torch.cuda.get_device_properties(index)
    return Device(facts.name, facts.multi_processor_count)


def device_of(tensor: Tensor) -> Device:
    """Facts of the tensor's device; small ones for the CPU, where Triton's interpreter runs."""
    if tensor.is_cuda:
        return _cuda_device(tensor.device.index)
    return Device("interpreter", 2)


def precision(dtype: torch.dtype, op: str) -> str:
    """``input_precision`` of tl.dot. Narrow types ignore it, but must not be told "tf32x3", which splits float32."""
    return settings.resolve_float32_precision(op) if dtype == torch.float32 else "ieee"


def size_class(size: int) -> int:
    """Sizes within a factor of two share their tuned tile."""
    return max(size, 1).bit_length()


def density_class(blocks: int, rows: int) -> int:
    """Mean blocks of a row, by powers of two."""
    return round(math.log2(max(blocks, 1) / max(rows, 1)))


_tuned: dict[tuple, Config] = {}


def launch_tuned(key: tuple, sample: Tensor, configs: Sequence[Config], launch: Callable[[Config], None]) -> None:
    """Runs ``launch`` with the fastest of ``configs``, measured once per device and ``key``.

    The first config is taken unmeasured where a measurement is impossible (capture of a CUDA graph, the interpreter)
    or unwanted (UASPARSE_AUTOTUNE=0, or torch's deterministic mode, since tiles differ in the order of their sums).
    ``launch`` must write every output and read none, so that repeats are harmless.
    """
    key = (device_of(sample).name, *key)
    config = _tuned.get(key)
    if config is None:
        config = configs[0]
        if len(configs) > 1 and _may_measure(sample):
            config = _tuned[key] = min(configs, key=lambda candidate: _measure_ms(launch, candidate))
    launch(config)


def _may_measure(sample: Tensor) -> bool:
    return (
        sample.is_cuda
        and os.environ.get("UASPARSE_AUTOTUNE", "1") != "0"
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def _measure_ms(launch: Callable[[Config], None], config: Config) -> float:
    try:
        launch(config)
        return triton.testing.do_bench(lambda: launch(config), warmup=5, rep=25, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return math.inf


# By tensor, then by stream: the version of the tensor and the order.
_orders: dict[tuple, dict[int, tuple[int, Tensor]]] = {}


def longest_first(offsets: Tensor) -> Tensor | None:
    """The rows of ``offsets`` (crow or ccol) by falling length, so that the last programs of a grid are short ones.

    Kept per tensor, version of its contents and stream (another stream might read it before it is there). Any
    permutation gives right results, so that one that went stale (a topology update while a CUDA graph replays, a freed
    tensor's address used again) costs speed at most. While a graph is captured nothing new may be kept: what is there
    already serves, or None.
    """
    key = (offsets.device, offsets.data_ptr(), offsets.numel())
    kept = _orders.get(key, {})
    if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        # Complete, whatever stream it was made on: torch.cuda.graph waits for the device before it captures.
        return next(iter(kept.values()))[1] if kept else None
    stream = torch.cuda.current_stream(offsets.device).cuda_stream if offsets.is_cuda else 0
    version = -1 if offsets.is_inference() else offsets._version
    found = kept.get(stream)
    if found is None or found[0] != version:
        if len(_orders) > 4096:
            _orders.clear()
        order = torch.argsort(offsets[1:] - offsets[:-1], descending=True, stable=True).to(torch.int32)
        found = _orders.setdefault(key, {})[stream] = version, order
    return found[1]


def splits(device: Device, programs: int, steps: int) -> int:
    """In how many parts a long sum is cut so that ``programs`` of them fill the device: at least 4 steps a part."""
    wanted = -(-4 * device.processors // max(programs, 1))
    return max(1, min(wanted, steps // 4, 256))
