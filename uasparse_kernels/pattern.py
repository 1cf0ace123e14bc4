"""Which weights of one layer are active: the sparsity pattern that every op, layer and topology update shares."""

from __future__ import annotations

import itertools
import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from uasparse_kernels import _grid, _library

_SAVED = ("layout", "crow", "col")
_ANOTHERS = (
    "Expected weights of this sparsity pattern, got some that came with another (its signature differs): they were "
    "averaged, copied or broadcast while the topology differed between models or processes. Load weight and pattern "
    "together with load_state_dict(), average only once the topology is frozen, and give every process the same "
    "pattern."
)

Index = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # crow, col, ccol, row, perm


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

    It is an ``nn.Module``, so that it moves, copies, pickles and is saved with the layer that owns it. Its tensors are
    not buffers: an average over buffers, a cast, ``to_empty()`` or a write into the values of a ``state_dict()`` does
    not reach them (a state_dict holds copies: ``layout``, which is shape and block, ``crow`` and ``col``). They are
    checked when you pass them in, and changed only by :meth:`assign_`, :meth:`set_blocks_`, a topology update and
    ``load_state_dict``. New tensors are made only when the number of active blocks changes.

    The one buffer, ``signature``, goes wherever the weight goes and tells whether the weight belongs to this pattern.
    It holds eight powers of two, a hash of the active blocks. An average over one pattern keeps them; an average over
    two patterns, or a copy of another pattern's weights, does not. :meth:`tensors`, which every op calls, compares.

    On the meta device, where a layer has no values, the pattern's tensors stay on the device that they came from.
    """

    signature: Tensor
    _held: Index
    _served: Index
    _mask: Tensor | None
    changes = 0  # how often it was signed
    _numbers: list[float] | None

    def __init__(self, shape: Sequence[int], crow: Tensor, col: Tensor, *, block: Sequence[int] = (1, 1)):
        super().__init__()
        self.shape, self.block = _grid.check_shape(shape, block)
        _grid.check_csr(crow, col, self.grid)
        crow, col = (t.detach().to(torch.int32).contiguous() for t in (crow, col))
        self._held = (crow, col, *_grid.transpose(crow, col, self.grid[1]))
        self._served = self._held  # on the meta device: without values
        self.register_buffer("signature", torch.empty(_grid.SIGNATURE, dtype=torch.float64, device=crow.device))
        self.changed_()

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
        if not isinstance(density, numbers.Real):
            raise TypeError(f"Expected a density in (0, 1], got a {type(density).__name__}.")
        if not 0 < density <= 1:
            raise ValueError(f"Expected a density in (0, 1], got {density}.")
        shape, block = _grid.check_shape(shape, block)
        total = math.prod(_grid.size_of(shape, block))
        count = min(total, max(1, round(density * total)))
        return cls.from_blocks(shape, _grid.sample_indices(total, count, generator), block=block).to(device)

    @classmethod
    def from_mask(cls, mask: Tensor, *, block: Sequence[int] = (1, 1)) -> SparsityPattern:
        """The pattern of a mask of the weight's shape (non-zero is active; numpy's too), made of whole blocks.

        Raises:
            ValueError: if a block is only partly active.
        """
        mask = torch.as_tensor(mask)
        shape, block = _grid.check_shape(mask.shape, block)
        blocks = _grid.to_grid(mask != 0, block)
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
        return cls(shape, *_grid.csr(blocks, _grid.size_of(*_grid.check_shape(shape, block))), block=block)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], prefix: str = "") -> SparsityPattern:
        """The pattern saved in a state_dict under ``prefix``.

        Raises:
            ValueError: if entries are missing, are no whole numbers (an average of checkpoints of different patterns),
                or do not agree with each other.
        """
        absent = [prefix + name for name in _SAVED if prefix + name not in state_dict]
        if absent:
            raise ValueError(f"Expected the pattern's {', '.join(absent)} in the state_dict.")
        layout, crow, col = (_grid.whole_numbers(prefix + name, state_dict[prefix + name]) for name in _SAVED)
        if layout.dim() != 1 or layout.numel() not in (4, 6):
            raise ValueError(f"Expected {prefix}layout of 4 or 6 sizes, got shape {tuple(layout.shape)}.")
        sizes = layout.tolist()
        pattern = cls(sizes[:-2], crow, col, block=sizes[-2:])
        signature = state_dict.get(prefix + "signature")
        if signature is not None and not pattern._is_mine(signature):
            raise ValueError(
                f"Expected {prefix}signature to be that of {prefix}crow and {prefix}col, got another one: the "
                "state_dict was damaged, put together from several, or averaged over checkpoints of different patterns."
            )
        return pattern

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of blocks."""
        return _grid.size_of(self.shape, self.block)

    @property
    def num_blocks(self) -> int:
        """Number of active blocks."""
        return self._served[1].shape[0]  # in a graph, no tensor more to be guarded

    @property
    def nnz(self) -> int:
        """Number of active weights."""
        return self.num_blocks * self.block[0] * self.block[1]

    @property
    def density(self) -> float:
        """Share of active weights."""
        total = math.prod(self.shape)
        return self.nnz / total if total else 1.0

    @property
    def device(self) -> torch.device:
        return self._served[0].device

    # Read-only: a value of the same content may be put in their place (functional_call does), another is refused.
    crow = property(lambda self: self._served[0], lambda self, value: self._refuse_other(value, 0))
    col = property(lambda self: self._served[1], lambda self, value: self._refuse_other(value, 1))
    ccol = property(lambda self: self._served[2], lambda self, value: self._refuse_other(value, 2))
    row = property(lambda self: self._served[3], lambda self, value: self._refuse_other(value, 3))
    perm = property(lambda self: self._served[4], lambda self, value: self._refuse_other(value, 4))

    @property
    def layout(self) -> Tensor:
        """Shape and block in one row, int64: how they are saved."""
        return torch.tensor([*self.shape, *self.block], device=self.device)

    @layout.setter
    def layout(self, value: Tensor) -> None:
        if value.tolist() != [*self.shape, *self.block]:
            raise ValueError(f"Expected the layout {[*self.shape, *self.block]}, got {value.tolist()}.")

    def tensors(self) -> Index:
        """``crow, col, ccol, row, perm``, for the ops.

        Raises:
            RuntimeError: if the signature beside the weight is another pattern's. On a GPU, where reading it waits, it
                is read when its version has changed; in a graph of ``torch.compile`` for a GPU it is not.
        """
        if torch.compiler.is_compiling():
            self._check_in_graph()
        elif torch._C._get_tracing_state() is None:
            self._check_signature()
        return self._served

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

    def mask_(self, dense: Tensor) -> None:
        """Zeroes the inactive entries of a dense tensor of the weight's shape, in place, unseen by autograd."""
        dense = dense.detach()
        if dense.is_meta:
            return
        mask = self.kept_mask(dense)
        if mask is not None:
            torch.ops.uasparse.mask_(dense, mask)
        elif _library.has_kernel("keep_active_", dense):
            torch.ops.uasparse.keep_active_(dense, self.crow, self.col, self.block)
        else:
            dense.masked_fill_(~self.to_mask(), 0)

    def is_masked(self, dense: Tensor, *, sampled: bool = False) -> bool:
        """Whether the inactive entries of a dense tensor are zero; False where only a slow way to look is at hand.

        Args:
            sampled: looks at a few hundred entries only.
        """
        mask = self.kept_mask(dense)
        return mask is not None and torch.ops.uasparse.is_masked.default(dense, mask, sampled)

    def kept_mask(self, dense: Tensor) -> Tensor | None:
        """The mask, kept until the pattern changes, where the CPU kernels that read it serve a tensor."""
        if dense.device.type != "cpu" or not dense.is_contiguous() or not _library.has_kernel("mask_", dense):
            return None
        if self._mask is None:
            self._mask = self.to_mask()
        return self._mask

    def mask_of(self, blocks: Tensor) -> Tensor:
        """A bool mask of the weight's shape of any blocks, given by flat grid index (int64 ``[n]``)."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        mask.view(-1)[self._entries(blocks).view(-1)] = True
        return mask

    def pack(self, dense: Tensor) -> Tensor:
        """The active entries of ``dense`` (of the weight's shape), as packed values. Differentiable."""
        if tuple(dense.shape) != self.shape:
            raise ValueError(f"Expected a dense tensor of shape {self.shape}, got {tuple(dense.shape)}.")
        if self._has_kernel("pack", dense):
            return torch.ops.uasparse.pack(dense, self.crow, self.col, self.block)
        return dense.reshape(-1)[self.indices()]

    def unpack(self, values: Tensor) -> Tensor:
        """A dense tensor of the weight's shape, ``values`` at the active entries and zero elsewhere. Differentiable."""
        if tuple(values.shape) != self.packed_shape:
            raise ValueError(f"Expected packed values of shape {self.packed_shape}, got {tuple(values.shape)}.")
        if self._has_kernel("unpack", values):
            return torch.ops.uasparse.unpack(values, self.crow, self.col, self.shape, self.block)
        flat = values.new_zeros(math.prod(self.shape))
        return flat.index_put((self.indices().view(-1),), values.reshape(-1)).view(self.shape)

    def _has_kernel(self, op: str, tensor: Tensor) -> bool:
        if 0 in self.shape or not _library.has_kernel(op, tensor):
            return False
        # A transform or forward-mode AD needs what torch's own ops have.
        return torch.compiler.is_compiling() or not (
            torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        )

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
        """Takes over the active blocks of ``other`` (same shape, block and count), in place.

        A layer's packed values stay as they are, and stand for the new blocks then: to give a layer another pattern and
        keep its weights, call ``sparsify(model, sparsity, overrides={name: {"pattern": other}})``.
        """
        if (self.shape, self.block, self.num_blocks) != (other.shape, other.block, other.num_blocks):
            raise ValueError(
                f"Expected a pattern of shape {self.shape}, block {self.block} and {self.num_blocks} blocks, got "
                f"{other.shape}, {other.block} and {other.num_blocks}."
            )
        for mine, theirs in zip(self._held, other._held, strict=True):
            mine.copy_(theirs)
        return self.changed_()

    @torch.no_grad()
    def set_blocks_(self, blocks: Tensor) -> SparsityPattern:
        """Takes other active blocks, of any number: flat grid indices, int64, distinct and ascending (not checked).

        In place where the number stays the same; otherwise the tensors are replaced. Packed values stay, as with
        :meth:`assign_`. No host sync.
        """
        crow, col = _grid.csr(blocks, self.grid)
        new = (crow, col, *_grid.transpose(crow, col, self.grid[1]))
        if blocks.numel() == self.num_blocks:
            for mine, theirs in zip(self._held, new, strict=True):
                mine.copy_(theirs)
        else:
            _free_sizes_in_graphs()
            self._take(new)
        return self.changed_()

    @torch.no_grad()
    def changed_(self) -> SparsityPattern:
        """Signs the pattern anew, after its tensors were changed in place by an op. No host sync on a GPU."""
        self._code = _grid.signature(self._held[0], self._held[1], (*self.shape, *self.block))
        self._numbers = self._code.tolist() if self._code.device.type == "cpu" else None
        self.signature.copy_(self._code)
        self._seen = (self.signature, _version(self.signature))
        self._mask = None  # made where a dense-stored weight needs it
        self.changes += 1
        return self

    def _take(self, tensors: Index) -> None:
        self._held = tensors
        self._served = _to(tensors, "meta") if self.signature.is_meta else tensors

    def _check_signature(self) -> None:
        signature: Any = self._buffers["signature"]  # not as an attribute, which nn.Module looks up slowly
        try:
            if self._numbers is not None:
                if signature.is_cpu and signature.tolist() == self._numbers:
                    return
            elif self._seen[0] is signature and self._seen[1] == _version(signature):
                return
        except RuntimeError:  # a tensor without values: on the meta device, fake, or batched by vmap
            pass
        if signature.is_meta or isinstance(signature, FakeTensor):
            return
        if signature.device != self.device:
            # Moved as a buffer, without the module (fully_shard): the rest follows.
            self._take(_to(self._held, signature.device))
            self._code = self._code.to(signature.device)
            self._numbers = self._code.tolist() if self._code.device.type == "cpu" else None
        if not self._is_mine(signature):
            raise RuntimeError(_ANOTHERS)
        self._seen = (signature, _version(signature))

    def _check_in_graph(self) -> None:
        """The same as an assertion in the graph. Not for a GPU, whose context does not survive one; an exported program
        has weight and pattern of its own."""
        transformed = torch._C._are_functorch_transforms_active()
        if not (_library.is_exporting() or transformed or self.signature.device.type != "cpu"):
            error = (self.signature.to(torch.float64) - self._code).abs()
            torch._assert_async((error <= 1e-6 * self._code).all(), _ANOTHERS)

    def _is_mine(self, signature: Tensor) -> bool:
        """Whether a signature is this pattern's, up to the rounding of an average; of a batch (vmap), each one."""
        while torch._C._functorch.is_functorch_wrapped_tensor(signature):
            signature = torch._C._functorch.get_unwrapped(signature)
        # Of a batch the numbers are the last dimension, but vmap may have put it first.
        if signature.shape[-1:] != (_grid.SIGNATURE,) and signature.shape[:1] == (_grid.SIGNATURE,):
            signature = signature.movedim(0, -1)
        if signature.shape[-1:] != (_grid.SIGNATURE,) or not signature.is_floating_point():
            return False
        error = (signature.detach().to(self._code) - self._code).abs()
        return bool((error <= 1e-6 * self._code).all())

    def _refuse_other(self, value: Tensor, place: int) -> None:
        mine = self._served[place]
        if value is not mine and not (value.shape == mine.shape and torch.equal(value.to(mine), mine)):
            raise ValueError(
                "Expected the pattern's own indices, got others; change a pattern with load_state_dict(), assign_() or "
                "set_blocks_()."
            )

    def _apply(self, fn, recurse=True):
        """What moves and casts modules: the indices follow to the signature's device; dtype and values stay."""
        mine = self.signature.is_meta or self._is_mine(self.signature)
        super()._apply(fn, recurse)
        device = self.signature.device
        if device.type != "meta":
            if device != self._held[0].device:
                self._held = _to(self._held, device)
            if self.signature.dtype != torch.float64:
                self.signature = self.signature.to(torch.float64)
        self._take(self._held)
        # Emptied (to_empty) or cast: signed anew. One that was another pattern's before stays that.
        return self.changed_() if mine else self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in zip(_SAVED, (self.layout, self.crow.clone(), self.col.clone()), strict=True):
            destination[prefix + name] = tensor

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        """The signature; and for torch.distributed.checkpoint, which renames and broadcasts only the entries of a
        state_dict that it finds here, the names of the others."""
        found = super().named_buffers(prefix, recurse, remove_duplicate)
        if sys._getframe(1).f_globals.get("__name__") != "torch.distributed.checkpoint.state_dict":
            return found
        # Without values: those of an entry that is missing in what is loaded would be taken for loaded ones.
        nothing = torch.empty(0, dtype=torch.int32, device=self.signature.device)
        return itertools.chain(found, ((".".join(filter(None, (prefix, name))), nothing.clone()) for name in _SAVED))

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
        """Takes another pattern of any number of blocks; a bad or an incomplete one is an error and changes nothing."""
        known = {prefix + name for name in (*_SAVED, "signature")}
        unexpected += [key for key in state_dict if key.startswith(prefix) and key not in known] if strict else []
        absent = [prefix + name for name in _SAVED if prefix + name not in state_dict]
        if absent:
            missing += absent
            return
        try:
            new = self.from_state_dict(state_dict, prefix)
            self.check_fits(new)
        except ValueError as error:
            errors.append(f"{prefix.rstrip('.')}: {error}")
            return
        self.become_(new)

    def check_fits(self, other: SparsityPattern) -> None:
        """Raises ValueError if a pattern has another shape or block."""
        if (other.shape, other.block) != (self.shape, self.block):
            raise ValueError(
                f"Expected a pattern of shape {self.shape} and block {self.block}, got {other.shape} and {other.block}."
            )

    @torch.no_grad()
    def become_(self, other: SparsityPattern) -> SparsityPattern:
        """Takes over the active blocks, of any number, of a pattern of the same shape and block; the device stays."""
        self.check_fits(other)
        if other.num_blocks == self.num_blocks:
            return self.assign_(other)
        device = self._held[0].device
        _free_sizes_in_graphs()
        self._take(_to(other._held, device, copy=True))
        return self.changed_()


def _free_sizes_in_graphs() -> None:
    """torch.compile takes the sizes of a module's tensors for constants, and would compile anew at every change until
    it gives up. Once a pattern has changed its size, sizes that change are symbols."""
    import torch._dynamo  # not above: it takes a second, which who only serves need not wait

    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.force_nn_module_property_static_shapes = False


def _to(tensors: Index, device: torch.device | str, copy: bool = False) -> Index:
    crow, col, ccol, row, perm = (t.to(device, copy=copy) for t in tensors)
    return crow, col, ccol, row, perm


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@_library.register_fake("pack")
def _pack_fake(dense, crow, col, block):
    return dense.new_empty((col.numel(),) if tuple(block) == (1, 1) else (col.numel(), *block))


@_library.register_fake("unpack")
def _unpack_fake(values, crow, col, shape, block):
    return values.new_empty(shape)


@_library.register_fake("pattern_hash")
def _hash_fake(crow, col, seed):
    return crow.new_empty((), dtype=torch.int64)


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
