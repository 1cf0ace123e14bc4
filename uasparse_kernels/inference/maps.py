"""Feature maps in the arena: how results lie as planes (csrc/cpu/serve.h), and where.

Maps that a convolution connects share pitch and rows (a Space); these are known once all steps have said what they
need.
"""

from __future__ import annotations

import dataclasses


def up(value: int, to: int = 16) -> int:
    return -(-value // to) * to


class Space:
    """Pitch, rows and gap of the maps that convolutions connect."""

    def __init__(self, images: int):
        self.images = images
        self.pitch = self.rows = self.height = self.reach_y = self.reach_x = 0
        self._parent: Space | None = None

    def root(self) -> Space:
        space = self
        while space._parent is not None:
            space = space._parent
        return space

    def need(self, pitch: int, rows: int, height: int, reach_y: int = 0, reach_x: int = 0) -> None:
        root = self.root()
        root.pitch, root.rows, root.height = max(root.pitch, pitch), max(root.rows, rows), max(root.height, height)
        root.reach_y, root.reach_x = max(root.reach_y, reach_y), max(root.reach_x, reach_x)

    def join(self, other: Space) -> None:
        a, b = self.root(), other.root()
        if a is not b:
            b._parent = a
            a.need(b.pitch, b.rows, b.height, b.reach_y, b.reach_x)

    @property
    def body(self) -> int:
        root = self.root()
        return up(((root.images - 1) * root.rows + root.height) * root.pitch)

    @property
    def gap(self) -> int:
        root = self.root()
        gap = up(root.reach_y * root.pitch + root.reach_x)
        # Planes a multiple of 4 KiB apart would meet in a few lines of the cache. All between them is zero.
        return gap + 16 if (self.body + gap) % 1024 == 0 else gap

    @property
    def plane(self) -> int:
        return self.body + self.gap


@dataclasses.dataclass(eq=False)
class Map:
    """A result in the arena: an "image" (planes of NCHW), "tokens" (planes whose pixels are the rows of
    [..., channels]), or "rows" (as torch has them, for the kernel of a few)."""

    images: int
    channels: int
    height: int
    width: int
    space: Space
    kind: str = "image"
    first: int = -1
    last: int = -1
    position: int = -1

    @property
    def as_rows(self) -> bool:
        return self.kind == "rows"

    def size(self) -> int:
        if self.as_rows:
            return up(self.width * self.channels)
        return up(self.space.gap) + self.channels * self.space.plane + 64

    @property
    def body(self) -> int:
        """Where the first plane's body begins."""
        return self.position if self.as_rows else self.position + self.space.gap

    def strides(self) -> tuple[int, int, int, int]:
        if self.as_rows:
            return 0, 1, 0, self.channels
        root = self.space.root()
        return root.rows * root.pitch, self.space.plane, root.pitch, 1


def place(maps: list[Map]) -> int:
    """Gives maps their places in the arena, the first gap among those that live at the same time; returns its size."""
    placed: list[Map] = []
    for map in sorted(maps, key=lambda m: -m.size()):
        near = sorted((m for m in placed if m.first <= map.last and map.first <= m.last), key=lambda m: m.position)
        position = 0
        for other in near:
            if position + map.size() <= other.position:
                break
            position = max(position, other.position + other.size())
        map.position = position
        placed.append(map)
    return max((m.position + m.size() for m in placed), default=0) + 1024
