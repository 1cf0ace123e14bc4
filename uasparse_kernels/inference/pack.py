"""Weights in the order of the kernels (csrc/cpu/serve.h).

A convolution's nonzeros are listed by blocks of input channels, then output channels, then input channels and taps.
For each stands its plane (input channel and phase) and its tap's row and column among the planes, which make the offset
once the planes' pitch is known: values and lists serve every batch size.
"""

from __future__ import annotations

import dataclasses

import numpy as np

GROUP = 4  # kRowGroup: output channels that share offsets
WINDOW = 64  # kRowWindow: output channels that are sorted by their nonzeros in a block


@dataclasses.dataclass
class PackedConv:
    """A convolution's weight, packed; a linear layer's is one of 1x1."""

    values: np.ndarray  # [entries * group]
    plane: np.ndarray  # int32 [entries]
    tap: np.ndarray  # uint8 [entries], into dy and dx
    order: np.ndarray  # int32 [blocks, rows]: rows by windows, those with most nonzeros in the block first
    ptr: np.ndarray  # int32 [blocks, rows / group + 1], by the order
    dy: np.ndarray  # int32 [taps]
    dx: np.ndarray
    phases: np.ndarray  # int32: y * stride_w + x
    group: int
    rows: int
    kernel: tuple[int, int]
    nnz: int

    @property
    def blocks(self) -> int:
        return self.ptr.shape[0]

    def offsets(self, plane: int, pitch: int) -> np.ndarray:
        shift = (self.dy * pitch + self.dx).astype(np.int32)
        return self.plane * np.int32(plane) + shift[self.tap]


def pack_conv(
    weight: np.ndarray,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    channel_block: int | None = None,
) -> PackedConv:
    """Packs ``weight [out, in / groups, kh, kw]``; ``channel_block`` input channels make a block (default: all)."""
    out, per_group, kh, kw = weight.shape
    channels = per_group * groups
    ty, tx = np.arange(kh) * dilation[0] - padding[0], np.arange(kw) * dilation[1] - padding[1]
    phase_of = (ty % stride[0])[:, None] * stride[1] + (tx % stride[1])[None]
    phases = np.array(sorted(set(phase_of.ravel().tolist())))
    phase_index = np.searchsorted(phases, phase_of)
    dy = np.repeat(ty // stride[0], kw).astype(np.int32)
    dx = np.tile(tx // stride[1], kh).astype(np.int32)

    group = GROUP if _in_groups(weight, groups) else 1
    active = (weight != 0).reshape(out // group, group, per_group, kh, kw).any(1)
    o, c, y, x = np.nonzero(active)
    values = weight.reshape(out // group, group, per_group, kh, kw)[o, :, c, y, x]
    channel = c + (o * group) // (out // groups) * per_group
    block = channel // (channel_block or channels)
    blocks = -(-channels // (channel_block or channels))
    rows = out // group
    counts = np.bincount(block * rows + o, minlength=blocks * rows)
    row = np.arange(rows)
    by_count = np.stack([np.lexsort((-c, row // WINDOW)) if group == 1 else row for c in counts.reshape(blocks, rows)])
    rank = np.empty_like(by_count)
    np.put_along_axis(rank, by_count, row[None], axis=1)
    order = np.argsort(block * rows + rank[block, o], kind="stable")
    counts = np.take_along_axis(counts.reshape(blocks, rows), by_count, axis=1).reshape(-1)
    ends = np.concatenate([[0], np.cumsum(counts)])
    ptr = np.stack([ends[b * rows : (b + 1) * rows + 1] for b in range(blocks)])
    plane = channel * len(phases) + phase_index[y, x]
    return PackedConv(
        values=np.ascontiguousarray(values[order]).reshape(-1),
        plane=plane[order].astype(np.int32),
        tap=(y * kw + x)[order].astype(np.uint8 if kh * kw <= 256 else np.int32),
        order=by_count.astype(np.int32),
        ptr=ptr.astype(np.int32),
        dy=dy,
        dx=dx,
        phases=phases.astype(np.int32),
        group=group,
        rows=out,
        kernel=(kh, kw),
        nnz=int(np.count_nonzero(weight)),
    )


def _in_groups(weight: np.ndarray, groups: int) -> bool:
    """True where taking output channels in fours is faster: dense weights, blocks of rows."""
    out = weight.shape[0]
    if out % GROUP or (out // groups) % GROUP:
        return False
    active = (weight != 0).reshape(out // GROUP, GROUP, -1)
    # In fours, a weight takes less than half the time (benchmarks/bench_serve.py), zeros of a four included.
    return bool(active.any(1).sum() * GROUP <= 2 * active.sum())


@dataclasses.dataclass
class PackedRows:
    """A linear layer's weight for a few rows: by output features, columns of 16 bits."""

    values: np.ndarray
    columns: np.ndarray  # uint16 [nnz]
    ptr: np.ndarray  # int32 [rows + 1]
    rows: int
    nnz: int


def pack_rows(weight: np.ndarray) -> PackedRows:
    """Packs ``weight [out, in]``, in <= 65536."""
    row, column = np.nonzero(weight)
    ptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=weight.shape[0]))])
    return PackedRows(weight[row, column], column.astype(np.uint16), ptr.astype(np.int32), weight.shape[0], len(row))


LOOKUP = 128  # kLookupRows: rows and columns of a tile
_LANES = 16


@dataclasses.dataclass
class PackedLookup:
    """A linear layer's weight for the kernel that looks numbers up in registers (ServeLookup)."""

    values: np.ndarray  # [slots, 16]
    index: np.ndarray  # uint8 [slots, 16]
    place: np.ndarray  # uint8 [windows, blocks, 128]
    ptr: np.ndarray  # int32 [windows * blocks * 8 + 1]


def pack_lookup(weight: np.ndarray) -> PackedLookup:
    """Packs ``weight [out, in]``. Slots that no nonzero needs hold a zero and look up the block's first number."""
    windows, blocks = (-(-size // LOOKUP) for size in weight.shape)
    row, column = np.nonzero(weight)
    tile = row // LOOKUP * blocks + column // LOOKUP
    order = np.lexsort((row, tile))
    row, column, tile = row[order], column[order], tile[order]
    cell = tile * LOOKUP + row % LOOKUP
    counts = np.bincount(cell, minlength=windows * blocks * LOOKUP)
    number = np.arange(len(row)) - (np.cumsum(counts) - counts)[cell]  # of a nonzero in its row of the tile
    counts = counts.reshape(-1, LOOKUP)
    sorted_rows = np.argsort(-counts, axis=1, kind="stable")
    place = np.empty_like(sorted_rows)
    np.put_along_axis(place, sorted_rows, np.arange(LOOKUP)[None], axis=1)
    most = np.take_along_axis(counts, sorted_rows, axis=1)[:, ::_LANES].reshape(-1)  # slots of each 16 rows
    ptr = np.concatenate([[0], np.cumsum(most)])
    at = place.reshape(-1)[cell]
    slot = ptr[tile * (LOOKUP // _LANES) + at // _LANES] + number
    values, index = np.zeros((ptr[-1], _LANES), weight.dtype), np.zeros((ptr[-1], _LANES), np.uint8)
    values[slot, at % _LANES] = weight[row, column]
    index[slot, at % _LANES] = column % LOOKUP
    return PackedLookup(values, index, place.astype(np.uint8), ptr.astype(np.int32))
