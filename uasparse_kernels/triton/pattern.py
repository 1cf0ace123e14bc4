"""pack, unpack and keep_active_ on CUDA devices: values between packed and dense storage, and masked in place.

A program takes a part of the active entries of one row of the grid of blocks, in packed order: entry e of the row is
(block e / (bh * bw), row of the block, column of the block). The dense side is addressed by three strides (output,
input, kernel position), so that a contiguous and a channels_last weight are both read and written where they lie.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024


@triton.jit(do_not_specialize=["positions", "programs"])
def move_kernel(
    dense, values, crow, col, positions, programs, stride_out, stride_in, stride_position,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TO_DENSE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Copies the active entries between dense and values; ``programs`` share a row."""
    area: tl.constexpr = BLOCK_ROWS * BLOCK_COLUMNS
    r = tl.program_id(0) // programs
    start = tl.load(crow + r)
    count = (tl.load(crow + r + 1) - start).to(tl.int64) * area
    for step in range(tl.program_id(0) % programs * TILE, count, programs * TILE):
        e = step + tl.arange(0, TILE)
        live = e < count
        i = start + e // area
        column = tl.load(col + i, live, 0)
        out = r * BLOCK_ROWS + e % area // BLOCK_COLUMNS
        inp = column // positions * BLOCK_COLUMNS + e % BLOCK_COLUMNS
        spot = (
            dense + out.to(tl.int64) * stride_out + inp.to(tl.int64) * stride_in + column % positions * stride_position
        )
        slot = values + start.to(tl.int64) * area + e
        if TO_DENSE:
            tl.store(spot, tl.load(slot, live), live)
        else:
            tl.store(slot, tl.load(spot, live), live)


def pack(dense: Tensor, crow: Tensor, col: Tensor, block: list[int]) -> Tensor:
    """``uasparse::pack``."""
    size = (col.numel(),) if tuple(block) == (1, 1) else (col.numel(), *block)
    values = torch.empty(size, dtype=dense.dtype, device=dense.device)
    _move(dense if _strides(dense) else dense.contiguous(), values, crow, col, block, to_dense=False)
    return values


def unpack(values: Tensor, crow: Tensor, col: Tensor, shape: list[int], block: list[int]) -> Tensor:
    """``uasparse::unpack``."""
    dense = torch.zeros(shape, dtype=values.dtype, device=values.device)
    _move(dense, values.contiguous(), crow, col, block, to_dense=True)
    return dense


def keep_active_(dense: Tensor, crow: Tensor, col: Tensor, block: list[int]) -> None:
    """``uasparse::keep_active_``: zeroes the inactive entries of a fresh gradient, in place.

    The active entries are read, all are zeroed, the active ones are written back: three launches, on an H200 faster
    than one kernel that did all this a row at a time.
    """
    values = pack(dense, crow, col, block)
    if _strides(dense):
        dense.zero_()
        _move(dense, values, crow, col, block, to_dense=True)
    else:
        dense.copy_(unpack(values, crow, col, list(dense.shape), block))


def _strides(dense: Tensor) -> tuple[int, int, int] | None:
    """Strides over outputs, inputs and kernel positions; None where the positions have no single one."""
    if dense.dim() == 2:
        return dense.stride(0), dense.stride(1), 0
    if dense.shape[2] > 1 and dense.stride(2) != dense.shape[3] * dense.stride(3):
        return None
    return dense.stride(0), dense.stride(1), dense.stride(3)


def _move(dense: Tensor, values: Tensor, crow: Tensor, col: Tensor, block: list[int], *, to_dense: bool) -> None:
    if values.numel() == 0:
        return
    rows, strides = crow.numel() - 1, _strides(dense)
    assert strides is not None
    programs = max(1, min(64, values.numel() // rows // _TILE))
    if dense.dtype == torch.bool:
        dense, values = dense.view(torch.uint8), values.view(torch.uint8)
    move_kernel[(rows * programs,)](
        dense, values, crow, col, math.prod(dense.shape[2:]), programs, *strides,
        BLOCK_ROWS=block[0], BLOCK_COLUMNS=block[1], TO_DENSE=to_dense, TILE=_TILE, num_warps=4,
    )  # fmt: skip
