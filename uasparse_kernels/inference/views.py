"""Views of maps: reshapes, transposes and slices of a result that lies in planes, none of which moves a number.

A map has four axes: images, channels, rows, columns. A dimension of a view is a product of atoms (size, axis, step),
the first the slowest; it has none where its size is 1. That a dimension may have several is what lets
[time, batch, channels] be flattened to rows although its numbers lie as [batch, time].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Atom = tuple[int, int, int]
Dim = tuple[Atom, ...]
IMAGE, CHANNEL, ROW, COLUMN = range(4)
_SHAPES = (
    "aten.reshape.default", "aten.flatten.using_ints", "aten.unflatten.int", "aten.squeeze.dim", "aten.squeeze.dims",
    "aten.squeeze.default", "aten.unsqueeze.default",
)  # fmt: skip
_COPIES = ("aten.clone.default", "aten.alias.default", "aten.contiguous.default", "aten.detach.default")


class View(NamedTuple):
    map: Any  # maps.Map
    dims: tuple[Dim, ...]
    start: tuple[int, ...] = (0, 0, 0, 0)

    def sizes(self) -> tuple[int, int, int, int]:
        return self.map.images, self.map.channels, self.map.height, self.map.width

    def is_like(self, other: View) -> bool:
        """True where equal indices mean equal places, whatever the channels of the two."""
        same = self.dims[:-1] == other.dims[:-1] and self.start == other.start
        a, b = self.sizes(), other.sizes()
        return same and (a[0], *a[2:]) == (b[0], *b[2:])

    def is_rows(self) -> bool:
        """True where the last dimension is all channels, and the others name each position once."""
        channels = self.map.channels
        if any(self.start) or not self.dims or self.dims[-1] != (((channels, CHANNEL, 1),) if channels > 1 else ()):
            return False
        covered = [1, 1, 1, 1]
        for size, axis, step in sorted((atom for dim in self.dims[:-1] for atom in dim), key=lambda atom: atom[2]):
            if step != covered[axis]:
                return False
            covered[axis] *= size
        return tuple(covered) == (self.map.images, 1, self.map.height, self.map.width)


def plain(map: Any, shape: list[int]) -> View:
    """A map as what it was made for: an image [N, C, H, W], or tokens [..., C]."""
    if map.kind == "image":
        return View(map, tuple(_dim([(size, axis, 1)]) for axis, size in enumerate(shape)))
    steps = [int(np.prod(shape[i + 1 : -1])) for i in range(len(shape) - 1)]
    leading = tuple(_dim([(size, COLUMN, step)]) for size, step in zip(shape, steps, strict=False))
    return View(map, (*leading, _dim([(shape[-1], CHANNEL, 1)])))


def view_of(target: str, view: View, args: list[Any], kwargs: dict[str, Any], shape: list[int]) -> View | None:
    """What an op makes of a view, where that is a view; ``shape`` is that of the result."""
    rank = len(view.dims)
    if target in _COPIES:
        return view
    if target in _SHAPES:
        dims = _regroup([atom for dim in view.dims for atom in dim], shape)
        return None if dims is None else view._replace(dims=dims)
    if target == "aten.transpose.int":
        order = list(range(rank))
        a, b = args[1] % rank, args[2] % rank
        order[a], order[b] = b, a
        return view._replace(dims=tuple(view.dims[i] for i in order))
    if target == "aten.permute.default":
        return view._replace(dims=tuple(view.dims[i % rank] for i in args[1]))
    if target == "aten.select.int" and isinstance(args[2], int):
        dim = args[1] % rank
        index = args[2] + (_size(view.dims[dim]) if args[2] < 0 else 0)
        part = _narrow(view, dim, index, 1)
        return None if part is None else part._replace(dims=part.dims[:dim] + part.dims[dim + 1 :])
    if target == "aten.slice.Tensor" and len(args) < 5 and not kwargs:
        dim = args[1] % rank if len(args) > 1 else 0
        first = args[2] if len(args) > 2 and args[2] is not None else 0
        if not isinstance(first, int):
            return None
        first += _size(view.dims[dim]) if first < 0 else 0
        return _narrow(view, dim, first, shape[dim])
    return None


def parts_of(target: str, view: View, args: list[Any], shape: list[int]) -> list[View] | None:
    """The results of an op that takes a tensor apart along a dimension."""
    rank = len(view.dims)
    if target == "aten.unbind.int":
        dim = (args[1] if len(args) > 1 else 0) % rank
        found = [_narrow(view, dim, i, 1) for i in range(shape[dim])]
        return None if None in found else [v._replace(dims=v.dims[:dim] + v.dims[dim + 1 :]) for v in found if v]
    if target not in ("aten.split.Tensor", "aten.chunk.default", "aten.split_with_sizes.default"):
        return None
    dim = (args[2] if len(args) > 2 else 0) % rank
    if target == "aten.split_with_sizes.default":
        sizes = list(args[1])
    else:
        size = args[1] if target == "aten.split.Tensor" else -(-shape[dim] // args[1])
        if not isinstance(size, int):
            return None
        sizes = [min(size, shape[dim] - i) for i in range(0, shape[dim], size)]
    if not all(isinstance(size, int) for size in sizes):
        return None
    starts = np.cumsum([0, *sizes[:-1]])
    found = [_narrow(view, dim, int(start), size) for start, size in zip(starts, sizes, strict=True)]
    return None if None in found else [v for v in found if v]


def _size(dim: Dim) -> int:
    return int(np.prod([size for size, _, _ in dim], initial=1))


def _dim(atoms: list[Atom]) -> Dim:
    """Atoms of one dimension, joined where they are one."""
    joined: list[Atom] = []
    for size, axis, step in atoms:
        if size == 1:
            continue
        if joined and joined[-1][1] == axis and joined[-1][2] == size * step:
            joined[-1] = (joined[-1][0] * size, axis, step)
        else:
            joined.append((size, axis, step))
    return tuple(joined)


def _regroup(atoms: list[Atom], shape: list[int]) -> tuple[Dim, ...] | None:
    left = list(_dim(atoms))[::-1]
    dims = []
    for size in shape:
        need, taken = size, []
        while need > 1:
            if not left:
                return None
            many, axis, step = left.pop()
            if need % many == 0:
                taken.append((many, axis, step))
                need //= many
            elif many % need == 0:
                rest = many // need
                taken.append((need, axis, step * rest))
                left.append((rest, axis, step))
                need = 1
            else:
                return None
        dims.append(_dim(taken))
    return None if left else tuple(dims)


def _narrow(view: View, dim: int, first: int, size: int) -> View | None:
    """Indices [first, first + size) of a dimension that is one atom."""
    if len(view.dims[dim]) > 1:
        return None
    if not view.dims[dim]:
        return view if size == 1 else None
    whole, axis, step = view.dims[dim][0]
    if first < 0 or size < 1 or first + size > whole:
        return None
    start = list(view.start)
    start[axis] += first * step
    dims = list(view.dims)
    dims[dim] = _dim([(size, axis, step)])
    return View(view.map, tuple(dims), tuple(start))
