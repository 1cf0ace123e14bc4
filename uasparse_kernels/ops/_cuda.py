"""Which kernel serves a masked product on a CUDA device: the table of crossovers, and the choice made from it."""

from __future__ import annotations

import functools

import torch

from uasparse_kernels.ops._common import Choice
from uasparse_kernels.pattern import SparsityPattern
from uasparse_kernels.triton import settings

BLOCKS = (16, 32, 64, 128)

# The densities up to which the block kernel is taken before the vendor's dense one, by op, arithmetic and block.
#
# PREDICTED, not measured: 60 % of the roofline of a training step (docs/gpu-kernels.md), against dense bf16. "cores" is
# float32 without tensor cores, where both sides are bound by arithmetic.
PREDICTED: dict[str, dict[str, dict[int, float]]] = {
    "masked_linear": {
        "tensor cores": {16: 0.05, 32: 0.10, 64: 0.20, 128: 0.35},
        "cores": {16: 0.15, 32: 0.25, 64: 0.30, 128: 0.30},
    },
    "masked_conv2d": {
        "tensor cores": {16: 0.04, 32: 0.08, 64: 0.15, 128: 0.25},
        "cores": {16: 0.10, 32: 0.20, 64: 0.25, 128: 0.25},
    },
}
# The same by device name, from benchmarks/results/; none yet.
MEASURED: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
# Multiply-adds of the dense product below which a dense-stored weight goes to the vendor's kernel: it ends before a
# Python launcher has packed the weight. Predicted too.
LAUNCH_FLOOR = 2**32


@torch.compiler.assume_constant_result
def crossover(op: str, arithmetic: str, block: int) -> tuple[float, str]:
    """The density up to which blocks are faster on the current device, and where that is known from."""
    return _crossover(op, arithmetic, block, torch.cuda.current_device() if torch.cuda.is_available() else None)


@functools.lru_cache
def _crossover(op: str, arithmetic: str, block: int, device: int | None) -> tuple[float, str]:
    name = torch.cuda.get_device_name(device) if device is not None else ""
    found = MEASURED.get(name, {}).get(op, {}).get(arithmetic, {}).get(block)
    return (PREDICTED[op][arithmetic][block], "predicted") if found is None else (found, f"measured on {name}")


@torch.compiler.assume_constant_result
def arithmetic(op: str, dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "tensor cores"
    return "cores" if settings.resolve_float32_precision(op) == "ieee" else "tensor cores"


def choose_cuda(op: str, dtype: torch.dtype, pattern: SparsityPattern, work: int, *, packed: bool) -> Choice:
    """ "triton" (block kernel; a dense-stored weight is packed for it) or "dense".

    Args:
        work: multiply-adds of the dense product.
    """
    rows, columns = pattern.block
    how = "decoded to the vendor's kernel" if packed else "vendor's kernel on the masked weight"
    if rows != columns or rows not in BLOCKS:
        structure = "unstructured weights" if pattern.block == (1, 1) else f"{rows}x{columns} blocks"
        return Choice("dense", f"{how}: no tensor-core kernel for {structure}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Choice("dense", f"{how}: no block kernel for {dtype}")
    limit, source = crossover(op, arithmetic(op, dtype), rows)
    if pattern.density > limit:
        return Choice("dense", f"{how}: density {pattern.density:.3g} over the crossover of {limit:.3g} ({source})")
    if not packed and work < LAUNCH_FLOOR:
        return Choice("dense", f"{how}: {work:.2g} multiply-adds are fewer than pay for packing (predicted)")
    return Choice(
        "triton", f"block kernel: density {pattern.density:.3g} up to the crossover of {limit:.3g} ({source})"
    )
