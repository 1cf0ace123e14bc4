"""The grid of blocks that a weight is cut into: its size, the orders of its active blocks, and checks of both.

What a :class:`SparsityPattern` computes with: functions of sizes and index tensors that know no pattern. Blocks are
given by their flat index into the grid, or by rows as ``crow`` and ``col`` (CSR).
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uasparse_kernels import _library

INDEX_LIMIT = 2**31 - 1
SIGNATURE = 8  # numbers of a signature; 4 bits of the hash each


def check_sparsity(sparsity: Any, where: str = "") -> None:
    """Raises TypeError for what is no number, and ValueError for one outside of [0, 1). `where` begins the message."""
    said = f"{where}: expected" if where else "Expected"
    if not isinstance(sparsity, numbers.Real):
        raise TypeError(f"{said} a sparsity in [0, 1), got a {type(sparsity).__name__}.")
    if not 0 <= sparsity < 1:
        percent = f"; {sparsity:g} % is {sparsity / 100:g}" if 1 < sparsity < 100 else ""
        raise ValueError(f"{said} a sparsity in [0, 1), got {sparsity}{percent}.")


def check_block(block: Any, where: str = "") -> None:
    """Raises ValueError for a block that is not (1, 1), (r, 1) or (b, b). `where` begins the message."""
    fits = isinstance(block, Sequence) and len(block) == 2 and all(isinstance(b, numbers.Integral) for b in block)
    if not fits or min(block) < 1 or (block[1] != 1 and block[0] != block[1]):
        said = f"{where}: expected" if where else "Expected"
        raise ValueError(f"{said} a block (1, 1), (r, 1) or (b, b), got {block!r}.")


def check_shape(shape: Sequence[int], block: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """A weight's shape and block as tuples of ints. Raises ValueError where they do not go together."""
    check_block(block)
    shape, block = tuple(operator.index(s) for s in shape), tuple(operator.index(b) for b in block)
    if len(shape) not in (2, 4) or min(shape) < 0:
        raise ValueError(f"Expected a weight shape [out, in] or [out, in, kh, kw], got {shape}.")
    if shape[0] % block[0] or shape[1] % block[1]:
        raise ValueError(
            f"Expected a block that divides the weight's output and input sizes {shape[:2]}, got {block}; "
            "choose a divisor of both sizes."
        )
    if math.prod(shape) > INDEX_LIMIT * 64 or math.prod(shape[1:]) > INDEX_LIMIT:
        raise ValueError(f"The weight shape {shape} is too large for 32-bit indices.")
    return shape, (block[0], block[1])


def check_csr(crow: Tensor, col: Tensor, grid: tuple[int, int]) -> None:
    """Raises ValueError unless ``crow`` and ``col`` give active blocks of a grid, in order."""
    rows, columns = grid
    for name, tensor in (("crow", crow), ("col", col)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"Expected {name} of integers, got {tensor.dtype}.")
    if crow.device != col.device or crow.is_meta:
        raise ValueError(f"Expected crow and col with values on one device, got {crow.device} and {col.device}.")
    if crow.dim() != 1 or crow.numel() != rows + 1 or col.dim() != 1:
        raise ValueError(
            f"Expected crow of {rows + 1} and col of one dimension, got {tuple(crow.shape)} and {tuple(col.shape)}."
        )
    if col.numel() > INDEX_LIMIT:
        raise ValueError(f"Expected at most {INDEX_LIMIT} active blocks, got {col.numel()}.")
    counts = crow[1:] - crow[:-1]
    if int(crow[0]) != 0 or int(crow[-1]) != col.numel() or bool((counts < 0).any()):
        raise ValueError("Expected crow to rise from 0 to the number of active blocks.")
    if col.numel():
        if int(col.min()) < 0 or int(col.max()) >= columns:
            raise ValueError(f"Expected columns in [0, {columns}), got {int(col.min())} to {int(col.max())}.")
        rises = col[1:] > col[:-1]
        starts = crow[1:-1].to(torch.int64)
        starts = starts[(starts > 0) & (starts < col.numel())]
        rises[starts - 1] = True
        if not bool(rises.all()):
            raise ValueError("Expected the columns of each row to be distinct and ascending.")


def whole_numbers(name: str, tensor: Tensor) -> Tensor:
    """A saved tensor as int64. An average of equal checkpoints is whole up to rounding."""
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        raise ValueError(f"Expected {name} to be a tensor with values, got {tensor}.")
    if not tensor.is_floating_point():
        return tensor.to(torch.int64)
    whole = tensor.to(torch.float64).round()
    # Half a unit in the 20th bit: float32 holds no more of an index of a million.
    if not bool(((tensor.to(torch.float64) - whole).abs() <= 1e-3 + whole.abs() * 2**-21).all()):
        raise ValueError(f"Expected {name} of whole numbers, got an average over different patterns, or a damaged one.")
    return whole.to(torch.int64)


def signature(crow: Tensor, col: Tensor, layout: Sequence[int]) -> Tensor:
    """Eight powers of two, float64: 32 bits of a sum of mixed indices. O(blocks), no host sync.

    Powers of two, for then an average ``d * x + (1 - d) * x`` gives ``x``, and half precision holds them.
    """
    seed = 0
    for size in layout:
        seed = (seed * 1_000_003 + size + 1) % 2**61
    if crow.device.type == "cpu" and _library.has_kernel("pattern_hash", crow):
        total = torch.ops.uasparse.pattern_hash(crow, col, seed)
    else:
        total = hash_of(crow, col, seed)
    nibbles = torch.arange(SIGNATURE, device=crow.device) * 4 + 16
    bits = (total >> nibbles) & 15
    return torch.pow(2.0, bits.to(torch.float64))


def hash_of(crow: Tensor, col: Tensor, seed: int) -> Tensor:
    """The sum of each block's flat position among rows of 2^31, mixed by multiplication and shifts (the finalizer of
    splitmix64)."""
    rows = torch.arange(crow.numel() - 1, device=crow.device)
    rows = torch.repeat_interleave(rows, (crow[1:] - crow[:-1]).to(torch.int64), output_size=col.numel())
    mixed = rows.mul_(2**31).add_(col).add_(seed)
    for factor, shift in ((-0x61C8864680B583EB, 30), (-0x40A7B892E31B1A47, 27), (-0x6B2FB644ECCEEE15, 31)):
        mixed = mixed.mul_(factor).bitwise_xor_(mixed >> shift)
    return mixed.sum()


def size_of(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns."""
    return shape[0] // block[0], shape[1] // block[1] * math.prod(shape[2:])


def to_grid(dense: Tensor, block: tuple[int, int]) -> Tensor:
    """A dense weight as ``[rows, columns, bh * bw]``."""
    bh, bw = block
    out, inp = dense.shape[:2]
    view = dense.reshape(out // bh, bh, inp // bw, bw, -1).permute(0, 2, 4, 1, 3)
    return view.reshape(out // bh, -1, bh * bw)


def csr(blocks: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """``crow`` and ``col`` (int32) of ascending flat indices."""
    ends = torch.arange(grid[0] + 1, device=blocks.device) * grid[1]
    crow = torch.searchsorted(blocks.contiguous(), ends, out_int32=True)
    return crow, (blocks % max(1, grid[1])).to(torch.int32)


def transpose(crow: Tensor, col: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order by columns of blocks given by rows: ``ccol``, ``row``, ``perm`` (int32). No host sync."""
    by_column, perm = torch.sort(col, stable=True)
    ends = torch.arange(columns + 1, dtype=col.dtype, device=col.device)
    ccol = torch.searchsorted(by_column, ends, out_int32=True)
    rows = torch.arange(crow.numel() - 1, device=col.device)
    rows = torch.repeat_interleave(rows, (crow[1:] - crow[:-1]).to(torch.int64), output_size=col.numel())
    return ccol, rows[perm].to(torch.int32), perm.to(torch.int32)


def sample_indices(total: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` distinct indices below ``total``, uniformly at random: int64, ascending, on the CPU.

    Memory grows with ``count``, not with ``total``, where the draw is sparse.
    """
    if not 0 <= count <= total:
        raise ValueError(f"Expected 0 <= count <= {total}, got {count}.")
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    if count > total // 8:
        return torch.randperm(total, generator=generator, device="cpu")[:count].sort().values
    # Distinct draws are kept in the order they came, so that every subset of this size is equally likely.
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while True:
        more = torch.randint(total, (2 * count + 16,), generator=generator, device="cpu")
        drawn = torch.cat([drawn, more])
        values, inverse = torch.unique(drawn, return_inverse=True)
        if values.numel() >= count:
            first = torch.full_like(values, drawn.numel()).scatter_reduce_(
                0, inverse, torch.arange(drawn.numel(), device="cpu"), "amin"
            )
            return values[first.argsort()[:count]].sort().values
