"""Tensors held by their nonzeros, in files (files.py) and in a loaded model: a zero costs a bit or less."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Compact:
    """A tensor's shape, its nonzeros' values, and where these stand: a bitmask (1 bit an entry), or ascending indices
    (int32), whichever is smaller."""

    shape: tuple[int, ...]
    values: Tensor
    bitmask: Tensor | None = None  # uint8, the lowest bit first
    indices: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def numel(self) -> int:
        return math.prod(self.shape)

    def place(self) -> Tensor:
        """Where the nonzeros stand in the flat tensor, int64."""
        if self.bitmask is None:
            assert self.indices is not None
            return self.indices.long()
        bits = np.unpackbits(self.bitmask.numpy(), count=self.numel(), bitorder="little")
        return torch.from_numpy(np.flatnonzero(bits))

    def dense(self) -> Tensor:
        """A new tensor."""
        dense = self.values.new_zeros(self.numel())
        dense[self.place()] = self.values
        return dense.view(self.shape)


Constant = Tensor | Compact


def compact(tensor: Constant) -> Constant:
    """The tensor in its smaller form."""
    if isinstance(tensor, Compact):
        return tensor
    flat = tensor.detach().cpu().contiguous().view(-1)
    nonzeros = int(flat.count_nonzero()) if flat.is_floating_point() else flat.numel()
    bitmask, indices = -(-flat.numel() // 8), 4 * nonzeros
    if flat.numel() < 64 or nonzeros * flat.element_size() + min(bitmask, indices) >= flat.nbytes:
        return tensor
    place = flat.nonzero().view(-1)
    if bitmask <= indices or flat.numel() > 1 << 31:
        bits = torch.from_numpy(np.packbits((flat != 0).numpy(), bitorder="little"))
        return Compact(tuple(tensor.shape), flat[place], bitmask=bits)
    return Compact(tuple(tensor.shape), flat[place], indices=place.int())


def dense(tensor: Constant) -> Tensor:
    return tensor.dense() if isinstance(tensor, Compact) else tensor
