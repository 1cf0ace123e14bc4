"""Measures where sparse kernels stop paying on this machine, and keeps it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from uasparse_kernels import _crossovers, _library
from uasparse_kernels.ops import _common, _cpu, _cuda_crossovers
from uasparse_kernels.pattern import SparsityPattern

# What a cell is measured on: vectors of a linear layer of _SIZE x _SIZE; channels in and out, taps a side and the
# image's side of a conv.
_VECTORS = {"1": 1, "2-16": 8, ">16": 256}
_CONVS = {"one tap, 256": (256, 256, 1, 28), "one tap, 1024": (1024, 1024, 1, 7), "taps": (128, 128, 3, 16)}
_SIZE = 1024
_STEPS = 5


def tune(device: torch.device | str = "cpu", *, verbose: bool = True) -> _crossovers.Table:
    """Measures the densities at which the dense kernels become faster than the sparse ones on a device.

    It takes about a minute; nothing else should run on the machine. The CPU is measured with the current number of
    threads. The densities are stored in a file in the platform's cache folder, for this process and later ones. If the
    file cannot be written, they hold for this process only, and a warning says so.

    Args:
        device: the CPU, or a CUDA device.
        verbose: prints each density as it is found (for a CUDA device the whole table).

    Returns:
        For the CPU, ``table[op][dtype][structure][vectors]``; for a CUDA device, ``table[op][arithmetic][block]``.
        Densities are in (0, 1]; 1 means that the sparse kernel is faster at all of them. ``structure`` is "1x1" or
        "blocks"; ``vectors`` is the number of vectors that the weight is multiplied with (for a convolution "taps", or
        "one tap" and the channels, between which others lie); ``arithmetic`` is "half", "tf32" or "fp32".

    Raises:
        RuntimeError: if the package was built without compiled kernels.
    """
    if _library.compiled is None:
        raise RuntimeError("tune() measures compiled kernels, and there are none: install with a C++ compiler present.")
    device = torch.device(device)
    if device.type == "cuda":
        table = _cuda_crossovers.measure_crossovers(device)
        if verbose:
            print(table)
        return _keep(torch.cuda.get_device_name(device), table, verbose)
    table = {}
    for op, dtypes in _cpu.DEFAULT.items():
        for dtype, structures in dtypes.items():
            for structure, widths in structures.items():
                for width in widths:
                    density = _measure(op, getattr(torch, dtype), structure, width)
                    table.setdefault(op, {}).setdefault(dtype, {}).setdefault(structure, {})[width] = density
                    if verbose:
                        print(f"{op} {dtype} {structure}, {_name(width)}: {density:.2f}", flush=True)
    return _keep(_cpu.processor(), table, verbose)


def _keep(name: str, table: _crossovers.Table, verbose: bool) -> _crossovers.Table:
    file = _crossovers.save(name, table)
    if verbose and file is not None:
        print(f"kept in {file}")
    return table


def _name(width: str) -> str:
    return f"{width} vectors" if width in _VECTORS else width


def _measure(op: str, dtype: torch.dtype, structure: str, width: str) -> float:
    """The crossover of a cell by bisection: 2 ** -_STEPS is its resolution."""
    low, high = 0.0, 1.0
    if _sparse_is_faster(op, dtype, structure, width, 1.0):
        return 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if _sparse_is_faster(op, dtype, structure, width, middle):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _sparse_is_faster(op: str, dtype: torch.dtype, structure: str, width: str, density: float) -> bool:
    sparse, dense = (_call(op, dtype, structure, width, density, kernel) for kernel in ("cpu", "dense"))
    times: dict[Callable[[], None], list[float]] = {sparse: [], dense: []}
    for call in times:
        call()
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end or len(times[dense]) < 5:
        for call, taken in times.items():
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[sparse]) < statistics.median(times[dense])


def _call(op: str, dtype: torch.dtype, structure: str, width: str, density: float, kernel: str) -> Callable[[], None]:
    """A layer's forward, with its backward for a wide input, by the given kernel."""
    from uasparse_kernels.nn import SparseConv2d, SparseLinear

    block = (1, 1) if structure == "1x1" else (8, 1)
    layer: nn.Module
    if op == "masked_linear":
        pattern = SparsityPattern.random((_SIZE, _SIZE), density, block=block)
        layer = SparseLinear(_SIZE, _SIZE, bias=False, pattern=pattern, dtype=dtype, storage="packed")
        x = torch.randn(_VECTORS[width], _SIZE, dtype=dtype)
    else:
        channels, outputs, size, side = _CONVS[width]
        pattern = SparsityPattern.random((outputs, channels, size, size), density, block=block)
        options = {"padding": size // 2, "bias": False, "pattern": pattern, "dtype": dtype, "storage": "packed"}
        layer = SparseConv2d(channels, outputs, size, **options)  # type: ignore[arg-type]
        x = torch.randn(16, channels, side, side, dtype=dtype)
    if width in ("1", "2-16"):

        def infer() -> None:
            with _common.forced(kernel), torch.inference_mode():
                layer(x)

        return infer
    x.requires_grad_()
    grad = torch.randn_like(layer(x))

    def step() -> None:
        x.grad = layer.weight.grad = None
        with _common.forced(kernel):
            layer(x).backward(grad)

    return step
