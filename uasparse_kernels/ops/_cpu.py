"""Which kernel serves a masked product on the CPU: the densities up to which the sparse one is faster than dense."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

from uasparse_kernels import _crossovers, _library
from uasparse_kernels.ops._common import Choice, surely
from uasparse_kernels.pattern import SparsityPattern

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# The density up to which the sparse kernel is faster than unpacking, the vendor's dense kernel and packing gradients:
# by op, dtype, structure and, of a linear layer, how many vectors the weight meets (forward alone up to 16, else a
# training step), of a convolution, whether it has one tap, and then its channels (see _of_one_tap).
# Measured by uasparse_kernels.tune(), one thread, on AMD EPYCs: Zen 4 (AVX-512, bfloat16 arithmetic) and Zen 3 (AVX2);
# on a Zen 5 float32 linear layers of training beside oneDNN (AVX-512), and float32 convolutions of one tap by steps of
# 17 layers, at batch 8 with either instruction set and at 32 with AVX-512, and those in bfloat16 by steps of 19 layers
# (docs/cpu-kernels.md); those in blocks are not measured, and no higher.
_AVX512: _crossovers.Table = {
    "masked_linear": {
        "float32": {"1x1": {"1": 0.98, "2-16": 0.89, ">16": 0.45}, "blocks": {"1": 1.0, "2-16": 1.0, ">16": 0.6}},
        "bfloat16": {"1x1": {"1": 0.36, "2-16": 0.39, ">16": 0.27}, "blocks": {"1": 1.0, "2-16": 1.0, ">16": 0.42}},
    },
    "masked_conv2d": {
        "float32": {
            "1x1": {"one tap, 256": 0.72, "one tap, 1024": 0.48, "taps": 0.7},
            "blocks": {"one tap, 256": 0.72, "one tap, 1024": 0.48, "taps": 0.61},
        },
        "bfloat16": {
            "1x1": {"one tap, 256": 0.54, "one tap, 1024": 0.27, "taps": 0.4},
            "blocks": {"one tap, 256": 0.3, "one tap, 1024": 0.3, "taps": 0.3},
        },
    },
}
_AVX2: _crossovers.Table = {
    "masked_linear": {
        "float32": {"1x1": {"1": 1.0, "2-16": 1.0, ">16": 0.48}, "blocks": {"1": 1.0, "2-16": 1.0, ">16": 0.58}},
        "bfloat16": {"1x1": {"1": 0.36, "2-16": 1.0, ">16": 1.0}, "blocks": {"1": 1.0, "2-16": 1.0, ">16": 1.0}},
    },
    "masked_conv2d": {
        "float32": {
            "1x1": {"one tap, 256": 0.75, "one tap, 1024": 0.6, "taps": 0.64},
            "blocks": {"one tap, 256": 0.7, "one tap, 1024": 0.55, "taps": 0.61},
        },
        "bfloat16": {
            "1x1": {"one tap, 256": 1.0, "one tap, 1024": 1.0, "taps": 1.0},
            "blocks": {"one tap, 256": 1.0, "one tap, 1024": 1.0, "taps": 1.0},
        },
    },
}
DEFAULT = _AVX512 if _library.compiled is not None and _library.compiled.cpu_isa() == "avx512" else _AVX2


def choose_cpu(op: str, dtype: torch.dtype, pattern: SparsityPattern, vectors: int, *, packed: bool) -> Choice:
    """ "cpu" (the compiled sparse kernel) or "dense".

    Args:
        vectors: that the weight is multiplied with: the batch of a linear layer, batch times positions of a conv.
    """
    if dtype not in DTYPES:
        return Choice("dense", f"no sparse kernel for {dtype}")
    if torch.compiler.is_compiling():
        few, one = surely(vectors <= 16), surely(vectors <= 1)
    else:
        few, one = vectors <= 16, vectors <= 1
    width = wide(pattern.shape) if op == "masked_conv2d" or not few else "1" if one else "2-16"
    if not packed and width in ("1", "2-16"):
        return Choice("dense", "dense-stored: packing the weight would cost as much as the product")
    limit, source = crossover(op, dtype, "1x1" if pattern.block == (1, 1) else "blocks", width)
    if torch.compiler.is_compiling():  # the number of active weights may be a symbol, which words would make a constant
        return Choice("dense" if pattern.density > limit else "cpu", source)
    return _by_known_crossover(pattern.density, limit, source)


def _by_crossover(density: float, limit: float, source: str) -> Choice:
    if density > limit:
        return Choice("dense", f"density {density:.3g} over the crossover of {limit:.3g} ({source})")
    return Choice("cpu", f"sparse kernel: density {density:.3g} up to the crossover of {limit:.3g} ({source})")


_by_known_crossover = functools.lru_cache(_by_crossover)  # formatting would cost more than all the rest


def wide(shape: tuple[int, ...]) -> str | float:
    """What the crossover of a training step depends on beside the structure, of a weight of this shape: the cell of the
    table or, of a convolution of one tap, the harmonic mean of its channels."""
    if len(shape) == 2:
        return ">16"
    if set(shape[2:]) != {1}:
        return "taps"
    return 2 * shape[0] * shape[1] / max(1, shape[0] + shape[1])


@_library.constant_when_compiled
def crossover(op: str, dtype: torch.dtype, structure: str, width: str | float) -> tuple[float, str]:
    """The density up to which the sparse kernel is faster, and where that is known from."""
    return _crossover(op, "bfloat16" if dtype == torch.bfloat16 else "float32", structure, width)


@functools.lru_cache
def _crossover(op: str, dtype: str, structure: str, width: str | float) -> tuple[float, str]:
    found = _crossovers.load(processor(), DEFAULT)
    cells = (DEFAULT if found is None else found)[op][dtype][structure]
    source = "measured on this machine" if found is not None else _DEFAULT_SOURCE
    return cells[width] if isinstance(width, str) else _of_one_tap(cells, width), source


_DEFAULT_SOURCE = "default; uasparse_kernels.tune() measures this machine's"


def _of_one_tap(cells: _crossovers.Table, channels: float) -> float:
    """The crossover of a convolution of one tap, from those of two that are measured.

    A position of ``in`` and ``out`` channels costs work of ``in * out`` and memory of ``in + out``, which the sparse
    kernel moves less often than the dense one. Where both take equally long, the density is so
    ``a + b * (1 / in + 1 / out)``; the number of positions, and so the batch, does not count.
    """
    if channels <= 0:
        return 1.0
    few, many = 256, 1024
    share = (1 / channels - 1 / many) / (1 / few - 1 / many)
    low, high = (cells[f"one tap, {n}"] for n in (many, few))
    return min(1.0, max(0.0, low + share * (high - low)))


_crossovers.on_change(_crossover.cache_clear)


@functools.cache
def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, value in (line.split(":", 1) for line in lines if ":" in line)}
    name = fields.get("model name", platform.machine())
    # Some virtual machines hide the model's name.
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})" if name == "AMD EPYC" else name
