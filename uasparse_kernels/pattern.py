"""Which weights of one layer are active: the sparsity pattern that every op, layer and topology update shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from uasparse_kernels import _library

_INDEX_LIMIT = 2**31 - 1


class SparsityPattern(nn.Module):
    """The active blocks of a weight of shape ``[out, in]`` or ``[out, in, kh, kw]``.

    The weight is seen as ``[out, in, positions]`` (one position for a linear layer, ``kh * kw`` for a convolution) and
    cut into blocks of ``block = (bh, bw)`` output by input channels at one position: a grid of ``out / bh`` rows and
    ``in / bw * positions`` columns, column ``c * positions + p`` being channel block ``c`` at position ``p``. The block
    is (1, 1) for unstructured sparsity, (r, 1) for columns shared by r output rows, or (b, b).

    The active blocks are held in two orders, as int32 tensors, so that neither a product with the weight nor one with
    its transpose moves values:

    * ``crow [rows + 1]``, ``col [num_blocks]``: by rows (CSR), the order of packed values;
    * ``ccol [columns + 1]``, ``row [num_blocks]``, ``perm [num_blocks]``: by columns, ``perm`` being each block's place
      in the order by rows.

    It is an ``nn.Module`` without parameters, so that it moves, copies, pickles and is saved with the layer that owns
    it; ``crow``, ``col`` and ``layout`` (shape and block) are saved. A topology update changes the tensors in place;
    only one that changes the number of active blocks (:meth:`set_blocks_`) makes new ones.
    """

    layout: Tensor
    crow: Tensor
    col: Tensor
    ccol: Tensor
    row: Tensor
    perm: Tensor

    def __init__(self, shape: Sequence[int], crow: Tensor, col: Tensor, *, block: Sequence[int] = (1, 1)):
        super().__init__()
        self.shape, self.block = _check_shape(shape, block)
        _check_csr(crow, col, self.grid)
        self.register_buffer("layout", torch.tensor([*self.shape, *self.block], device=crow.device))
        self.register_buffer("crow", crow.to(torch.int32))
        self.register_buffer("col", col.to(torch.int32))
        for name, tensor in zip(("ccol", "row", "perm"), _transpose(self.crow, self.col, self.grid[1]), strict=True):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def random(
        cls,
        shape: Sequence[int],
        density: float,
        *,
        block: Sequence[int] = (1, 1),
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> SparsityPattern:
        """A uniformly random pattern of exactly ``round(density * blocks)`` active blocks (at least one).

        Args:
            density: share of active weights, in (0, 1].
            generator: CPU generator of the draw (the draw does not depend on ``device``).
        """
        if not 0 < density <= 1:
            raise ValueError(f"Expected a density in (0, 1], got {density}.")
        shape, block = _check_shape(shape, block)
        total = math.prod(_grid(shape, block))
        count = max(1, round(density * total))
        return cls.from_blocks(shape, sample_indices(total, count, generator), block=block).to(device)

    @classmethod
    def from_mask(cls, mask: Tensor, *, block: Sequence[int] = (1, 1)) -> SparsityPattern:
        """The pattern of a mask of the weight's shape (non-zero is active), made of whole blocks.

        Raises:
            ValueError: if a block is only partly active.
        """
        shape, block = _check_shape(mask.shape, block)
        blocks = _to_grid(mask != 0, block)
        active, whole = blocks.any(-1), blocks.all(-1)
        if not torch.equal(active, whole):
            count = int((active != whole).sum())
            raise ValueError(
                f"Expected a mask made of whole {block[0]}x{block[1]} blocks, got one with {count} partly active "
                "blocks; use a smaller block or fill these blocks."
            )
        return cls.from_blocks(shape, active.reshape(-1).nonzero().squeeze(1), block=block)

    @classmethod
    def from_blocks(cls, shape: Sequence[int], blocks: Tensor, *, block: Sequence[int] = (1, 1)) -> SparsityPattern:
        """The pattern of the active blocks' flat indices into the grid (``[num_blocks]``, ascending, distinct)."""
        return cls(shape, *_csr(blocks, _grid(*_check_shape(shape, block))), block=block)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], prefix: str = "") -> SparsityPattern:
        """The pattern saved in a state_dict under ``prefix``."""
        layout = state_dict[prefix + "layout"].tolist()
        return cls(layout[:-2], state_dict[prefix + "crow"], state_dict[prefix + "col"], block=layout[-2:])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of blocks."""
        return _grid(self.shape, self.block)

    @property
    def num_blocks(self) -> int:
        """Number of active blocks."""
        return self._buffers["col"].shape[0]

    @property
    def nnz(self) -> int:
        """Number of active weights."""
        return self.num_blocks * self.block[0] * self.block[1]

    @property
    def density(self) -> float:
        """Share of active weights."""
        return self.nnz / math.prod(self.shape) if math.prod(self.shape) else 1.0

    @property
    def device(self) -> torch.device:
        return self._buffers["crow"].device

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of packed values: ``[nnz]`` for 1x1 blocks, else ``[num_blocks, bh, bw]``."""
        return (self.nnz,) if self.block == (1, 1) else (self.num_blocks, *self.block)

    def blocks(self) -> Tensor:
        """Flat indices of the active blocks into the grid: int64 ``[num_blocks]``, ascending."""
        rows = torch.arange(self.grid[0], device=self.device)
        counts = (self.crow[1:] - self.crow[:-1]).to(torch.int64)
        rows = torch.repeat_interleave(rows, counts, output_size=self.num_blocks)
        return rows * self.grid[1] + self.col

    def indices(self) -> Tensor:
        """Flat indices of the active weights into the dense weight, in packed order: int64 of ``packed_shape``."""
        return self._entries(self.blocks())

    def to_mask(self) -> Tensor:
        """The pattern as a bool mask of the weight's shape."""
        return self.mask_of(self.blocks())

    def mask_of(self, blocks: Tensor) -> Tensor:
        """A bool mask of the weight's shape of any blocks, given by flat grid index (int64 ``[n]``)."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        mask.view(-1)[self._entries(blocks).view(-1)] = True
        return mask

    def pack(self, dense: Tensor) -> Tensor:
        """The active entries of ``dense`` (of the weight's shape), as packed values. Differentiable."""
        if tuple(dense.shape) != self.shape:
            raise ValueError(f"Expected a dense tensor of shape {self.shape}, got {tuple(dense.shape)}.")
        if _library.has_kernel("pack", dense):
            return torch.ops.uasparse.pack(dense, self.crow, self.col, self.block)
        return dense.reshape(-1)[self.indices()]

    def unpack(self, values: Tensor) -> Tensor:
        """A dense tensor of the weight's shape, ``values`` at the active entries and zero elsewhere. Differentiable."""
        if tuple(values.shape) != self.packed_shape:
            raise ValueError(f"Expected packed values of shape {self.packed_shape}, got {tuple(values.shape)}.")
        if _library.has_kernel("unpack", values):
            return torch.ops.uasparse.unpack(values, self.crow, self.col, self.shape, self.block)
        flat = values.new_zeros(math.prod(self.shape))
        return flat.index_put((self.indices().view(-1),), values.reshape(-1)).view(self.shape)

    def is_packed(self, weight: Tensor) -> bool:
        """Whether ``weight`` is packed (True) or dense-stored (False).

        Raises:
            ValueError: if its shape is neither the packed nor the dense one.
        """
        shape = tuple(weight.shape)
        if shape == self.shape:
            return False
        if shape == self.packed_shape:
            return True
        raise ValueError(
            f"Expected a weight of shape {self.shape} (dense-stored) or {self.packed_shape} (packed), got {shape}."
        )

    def equal(self, other: SparsityPattern) -> bool:
        """Whether the two patterns have the same shape, block and active blocks."""
        same = self.shape == other.shape and self.block == other.block and self.num_blocks == other.num_blocks
        return same and torch.equal(self.crow, other.crow) and torch.equal(self.col, other.col)

    @torch.no_grad()
    def assign_(self, other: SparsityPattern) -> SparsityPattern:
        """Takes over the active blocks of ``other`` (same shape, block and count), in place."""
        if (self.shape, self.block, self.num_blocks) != (other.shape, other.block, other.num_blocks):
            raise ValueError(
                f"Expected a pattern of shape {self.shape}, block {self.block} and {self.num_blocks} blocks, got "
                f"{other.shape}, {other.block} and {other.num_blocks}."
            )
        for mine, theirs in zip(self.buffers(), other.buffers(), strict=True):
            mine.copy_(theirs)
        return self

    @torch.no_grad()
    def set_blocks_(self, blocks: Tensor) -> SparsityPattern:
        """Takes other active blocks, of any number: flat grid indices, int64, distinct and ascending (not checked).

        In place where the number stays the same; otherwise the tensors are replaced. No host sync.
        """
        crow, col = _csr(blocks, self.grid)
        new = {"crow": crow, "col": col}
        new |= dict(zip(("ccol", "row", "perm"), _transpose(crow, col, self.grid[1]), strict=True))
        if blocks.numel() == self.num_blocks:
            for name, tensor in new.items():
                getattr(self, name).copy_(tensor)
        else:
            for name, tensor in new.items():
                setattr(self, name, tensor)
        return self

    def _entries(self, blocks: Tensor) -> Tensor:
        """Flat indices into the dense weight of the entries of blocks: ``[n]`` for 1x1, else ``[n, bh, bw]``."""
        if self.block == (1, 1):
            return blocks
        (bh, bw), positions, columns = self.block, math.prod(self.shape[2:]), self.grid[1]
        row, column = blocks // columns, blocks % columns
        channel, position = column // positions, column % positions
        out = row[:, None] * bh + torch.arange(bh, device=self.device)
        inp = channel[:, None] * bw + torch.arange(bw, device=self.device)
        return (out[:, :, None] * self.shape[1] + inp[:, None, :]) * positions + position[:, None, None]

    def extra_repr(self) -> str:
        structure = "unstructured" if self.block == (1, 1) else f"blocks {self.block[0]}x{self.block[1]}"
        return f"{'x'.join(map(str, self.shape))}, density={self.density:.4g}, {structure}"

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """Takes another pattern of any number of blocks; a bad one is an error and changes nothing."""
        absent = [prefix + name for name in self.state_dict() if prefix + name not in state_dict]
        if absent:
            missing += absent
            return
        try:
            new = self.from_state_dict(state_dict, prefix).to(self.device)
            if (new.shape, new.block) != (self.shape, self.block):
                raise ValueError(
                    f"Expected a pattern of shape {self.shape} and block {self.block}, got {new.shape} and {new.block}."
                )
        except ValueError as error:
            errors.append(f"{prefix.rstrip('.')}: {error}")
            return
        if new.num_blocks == self.num_blocks:
            self.assign_(new)
        else:
            for name, tensor in new.named_buffers():
                setattr(self, name, tensor)


def sample_indices(total: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` distinct indices below ``total``, uniformly at random: int64, ascending, on the CPU.

    Memory grows with ``count``, not with ``total``, where the draw is sparse.
    """
    if not 0 <= count <= total:
        raise ValueError(f"Expected 0 <= count <= {total}, got {count}.")
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    if count > total // 8:
        return torch.randperm(total, generator=generator)[:count].sort().values
    # Distinct draws are kept in the order they came, so that every subset of this size is equally likely.
    drawn = torch.empty(0, dtype=torch.int64)
    while True:
        more = torch.randint(total, (2 * count + 16,), generator=generator)
        drawn = torch.cat([drawn, more])
        values, inverse = torch.unique(drawn, return_inverse=True)
        if values.numel() >= count:
            first = torch.full_like(values, drawn.numel()).scatter_reduce_(
                0, inverse, torch.arange(drawn.numel()), "amin"
            )
            return values[first.argsort()[:count]].sort().values


def _check_shape(shape: Sequence[int], block: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, int]]:
    shape, block = tuple(int(s) for s in shape), tuple(int(b) for b in block)
    if len(shape) not in (2, 4) or min(shape) < 1:
        raise ValueError(f"Expected a weight shape [out, in] or [out, in, kh, kw] of positive sizes, got {shape}.")
    if len(block) != 2 or min(block) < 1 or (block[1] != 1 and block[0] != block[1]):
        raise ValueError(f"Expected a block (1, 1), (r, 1) or (b, b), got {block}.")
    if shape[0] % block[0] or shape[1] % block[1]:
        raise ValueError(
            f"Expected a block that divides the weight's output and input sizes {shape[:2]}, got {block}; "
            "choose a divisor of both sizes."
        )
    if math.prod(shape) > _INDEX_LIMIT * 64 or math.prod(shape[1:]) > _INDEX_LIMIT:
        raise ValueError(f"The weight shape {shape} is too large for 32-bit indices.")
    return shape, (block[0], block[1])


def _check_csr(crow: Tensor, col: Tensor, grid: tuple[int, int]) -> None:
    rows, columns = grid
    if crow.dim() != 1 or crow.numel() != rows + 1 or col.dim() != 1:
        raise ValueError(
            f"Expected crow of {rows + 1} and col of one dimension, got {tuple(crow.shape)} and {tuple(col.shape)}."
        )
    if col.numel() > _INDEX_LIMIT:
        raise ValueError(f"Expected at most {_INDEX_LIMIT} active blocks, got {col.numel()}.")
    if crow.device.type == "meta":
        return
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


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    return shape[0] // block[0], shape[1] // block[1] * math.prod(shape[2:])


def _to_grid(dense: Tensor, block: tuple[int, int]) -> Tensor:
    """A dense weight as ``[rows, columns, bh * bw]``."""
    bh, bw = block
    out, inp = dense.shape[:2]
    view = dense.reshape(out // bh, bh, inp // bw, bw, -1).permute(0, 2, 4, 1, 3)
    return view.reshape(out // bh, -1, bh * bw)


def _csr(blocks: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """``crow`` and ``col`` (int32) of ascending flat indices."""
    ends = torch.arange(grid[0] + 1, device=blocks.device) * grid[1]
    crow = torch.searchsorted(blocks.contiguous(), ends, out_int32=True)
    return crow, (blocks % grid[1]).to(torch.int32)


def _transpose(crow: Tensor, col: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order by columns of blocks given by rows: ``ccol``, ``row``, ``perm`` (int32). No host sync."""
    by_column, perm = torch.sort(col, stable=True)
    ends = torch.arange(columns + 1, dtype=col.dtype, device=col.device)
    ccol = torch.searchsorted(by_column, ends, out_int32=True)
    rows = torch.arange(crow.numel() - 1, device=col.device)
    rows = torch.repeat_interleave(rows, (crow[1:] - crow[:-1]).to(torch.int64), output_size=col.numel())
    return ccol, rows[perm].to(torch.int32), perm.to(torch.int32)


@_library.register_fake("pack")
def _pack_fake(dense, crow, col, block):
    return dense.new_empty((col.numel(),) if tuple(block) == (1, 1) else (col.numel(), *block))


@_library.register_fake("unpack")
def _unpack_fake(values, crow, col, shape, block):
    return values.new_empty(shape)


def _pack_setup(ctx, inputs, output):
    dense, crow, col, ctx.block = inputs
    ctx.shape = dense.shape
    ctx.save_for_backward(crow, col)


def _unpack_setup(ctx, inputs, output):
    _, crow, col, _, ctx.block = inputs
    ctx.save_for_backward(crow, col)


def _pack_backward(ctx, grad):
    return torch.ops.uasparse.unpack(grad, *ctx.saved_tensors, ctx.shape, ctx.block), None, None, None


def _unpack_backward(ctx, grad):
    return torch.ops.uasparse.pack(grad, *ctx.saved_tensors, ctx.block), None, None, None, None


_library.register_autograd("pack", _pack_backward, _pack_setup)
_library.register_autograd("unpack", _unpack_backward, _unpack_setup)
