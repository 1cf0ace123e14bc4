"""Which kernel serves a masked product on a CUDA device: the table of crossovers, and the choice made from it."""

from __future__ import annotations

import functools
import math

import torch

from uasparse_kernels import _crossovers, _library
from uasparse_kernels.ops._common import Choice, surely
from uasparse_kernels.pattern import SparsityPattern
from uasparse_kernels.triton import settings

BLOCKS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The densities up to which the sparse kernel of a block (1: unstructured) is taken before the vendor's dense one, by
# op, arithmetic and block. Keys are strings throughout, as in the file that keeps what was measured.
#
# PREDICTED serves what was not measured on a device: 60 % of the roofline of a training step (docs/gpu-kernels.md); of
# unstructured weights what an H200 gave, where dense was faster in 16 bits at every density that was tried. In "fp32"
# (no tensor cores) arithmetic bounds both sides of the block kernels.
#
# "csr": the density up to which torch's CSR kernel is faster than ours for unstructured float32 weights, in any
# precision of float32 products. Nowhere, until it is measured.
PREDICTED: _crossovers.Table = {
    "masked_linear": {
        "half": {"1": 0.0, "16": 0.05, "32": 0.10, "64": 0.20, "128": 0.35},
        "tf32": {"1": 0.001, "16": 0.05, "32": 0.10, "64": 0.20, "128": 0.35},
        "fp32": {"1": 0.13, "16": 0.15, "32": 0.25, "64": 0.30, "128": 0.30, "csr": 0.0},
    },
    # Unstructured: 1x1 kernels, which are linear layers of the pixels.
    "masked_conv2d": {
        "half": {"1": 0.0, "16": 0.04, "32": 0.08, "64": 0.15, "128": 0.25},
        "tf32": {"1": 0.001, "16": 0.04, "32": 0.08, "64": 0.15, "128": 0.25},
        "fp32": {"1": 0.13, "16": 0.10, "32": 0.20, "64": 0.25, "128": 0.25},
    },
}
# By device name, two digits of benchmarks/results/*/gpu-crossovers.json. Cells that there was no time for are missing,
# and those where the search ended at its limit.
MEASURED: dict[str, _crossovers.Table] = {
    "NVIDIA H200": {
        "masked_linear": {
            "half": {"16": 0.055, "32": 0.19, "64": 0.36},
            "tf32": {"1": 0.0013},
            "fp32": {"1": 0.13},
        },
        "masked_conv2d": {
            "half": {"16": 0.073, "32": 0.18, "64": 0.39, "128": 0.38},
            "tf32": {"1": 0.0013, "16": 0.17, "32": 0.29, "64": 0.29, "128": 0.33},
            "fp32": {"1": 0.13},
        },
    },
}
# Multiply-adds of the dense product below which a dense-stored weight goes to the vendor's kernel: it ends before a
# Python launcher has packed the weight. Predicted too.
LAUNCH_FLOOR = 2**32
# Fewer tokens stay with our kernel: the crossover is measured with 8192.
CSR_TOKENS = 2048


@_library.constant_when_compiled
def crossover(op: str, arithmetic: str, block: int | str) -> tuple[float, str]:
    """The density up to which the sparse kernel is faster on the current device, and where that is known from."""
    return _crossover(op, arithmetic, str(block), torch.cuda.current_device() if torch.cuda.is_available() else None)


@functools.lru_cache
def _crossover(op: str, arithmetic: str, block: str, device: int | None) -> tuple[float, str]:
    """What was measured on this machine, then what is known of the device's kind, then the prediction."""
    if device is not None:
        name = torch.cuda.get_device_name(device)
        for table, source in (
            (_crossovers.load(name, PREDICTED, partial=True), "measured on this machine"),
            (MEASURED.get(name), f"measured on {name}"),
        ):
            found = (table or {}).get(op, {}).get(arithmetic, {}).get(block)
            if found is not None:
                return found, source
    return PREDICTED[op][arithmetic][block], "predicted"


_crossovers.on_change(_crossover.cache_clear)


@_library.constant_when_compiled
def arithmetic(op: str, dtype: torch.dtype) -> str:
    """ "half" (16-bit types), "tf32" (tensor cores on float32) or "fp32"."""
    if dtype != torch.float32:
        return "half"
    return "fp32" if settings.resolve_float32_precision(op) == "ieee" else "tf32"


def is_packed_by_default(op: str, pattern: SparsityPattern) -> bool:
    """Whether a layer on a GPU keeps packed values where nobody said how.

    Blocks do. Unstructured weights do where their kernel serves them in every arithmetic, since a layer cannot know
    under which autocast it will be called; elsewhere they are dense-stored, and what that costs the unstructured
    kernel, a gather of its values, is little.
    """
    if pattern.block != (1, 1):
        return True
    return pattern.shape[2:] in ((), (1, 1)) and pattern.density <= crossover(op, "half", 1)[0]


def takes_csr(dtype: torch.dtype, density: float, tokens: int) -> bool:
    """Whether torch's CSR kernel serves a product with an unstructured weight, forward or to the input's gradient.

    It may add in another order in every run, so not under ``torch.use_deterministic_algorithms``, and nobody has seen
    it in a CUDA graph, so not in a capture.
    """
    if dtype != torch.float32 or tokens < CSR_TOKENS or torch.are_deterministic_algorithms_enabled():
        return False
    if density > crossover("masked_linear", "fp32", "csr")[0]:
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def choose_cuda(
    op: str, dtype: torch.dtype, pattern: SparsityPattern, work: int, *, packed: bool, linear: bool = True
) -> Choice:
    """ "triton" (block kernel), "cuda" (unstructured kernel), for which a dense-stored weight is packed, or "dense".

    Args:
        work: multiply-adds of the dense product.
        linear: whether the op is a product of matrices: a linear layer, or a convolution by a 1x1 kernel.
    """
    rows, columns = pattern.block
    how = "decoded to the vendor's kernel" if packed else "vendor's kernel on the masked weight"
    if pattern.block == (1, 1):
        kernel, name = "cuda", "unstructured kernel"
        if not linear:
            return Choice("dense", f"{how}: the unstructured kernel serves only 1x1 convolutions")
        if not _library.has_kernel_for("sparse_product_out", "cuda"):
            return Choice("dense", f"{how}: the unstructured kernel was not built (no nvcc)")
    elif rows == columns and rows in BLOCKS:
        kernel, name = "triton", "block kernel"
    else:
        return Choice("dense", f"{how}: no tensor-core kernel for {rows}x{columns} blocks")
    if dtype not in DTYPES:
        return Choice("dense", f"{how}: no {name} for {dtype}")
    limit, source = crossover(op, arithmetic(op, dtype), rows)
    if torch.compiler.is_compiling():  # as in choose_cpu
        small = not packed and surely(work < LAUNCH_FLOOR)
        return Choice("dense" if small or pattern.density > limit else kernel, source)
    if pattern.density > limit:
        return Choice("dense", f"{how}: density {pattern.density:.3g} over the crossover of {limit:.3g} ({source})")
    if not packed and work < LAUNCH_FLOOR:
        return Choice("dense", f"{how}: {work:.2g} multiply-adds are too few to pay for packing (predicted)")
    tokens = work // math.prod(pattern.shape)
    if kernel == "cuda" and takes_csr(dtype, pattern.density, tokens):
        name = "torch's CSR kernel (grad-weight: the unstructured kernel)"
    return Choice(kernel, f"{name}: density {pattern.density:.3g} up to the crossover of {limit:.3g} ({source})")
