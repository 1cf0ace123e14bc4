"""Synthetic unknowns made from the batch itself: no OOD data, no extra forward.

The published loss (arXiv 2403.20047) has an output for "unknown" but never a target for it. Here a few images of each
batch lose their class: their patches are permuted, so that local statistics stay and the thing itself goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from uasparse_kernels.unknowns.errors import UnknownsError

UNKNOWNS = ("none", "patch-shuffle")


class PatchShuffle:
    """Replaces the first `share` of a batch by patch-shuffled images with the label `unknown_label`.

    The image is cut into g x g patches, which are permuted; every second one is also turned by 90 degrees. With several
    `grids` each takes its part of the images, with its own of the `seams` (or all with the one): see `shuffle_patches`.
    A grid of 0 permutes single pixels.
    Called as (x [B, C, H, W], y [B], generator) -> (x, y) of the same shapes; the inputs are left as they were. The
    share is rounded to whole images: of a batch that is too small none is replaced (`check` tells before).
    """

    def __init__(
        self, unknown_label: int, *, share: float = 0.125, grids: Sequence[int] = (4,), seams: Sequence[int] = (0,)
    ) -> None:
        if not 0 < share < 1:
            raise UnknownsError(f"Expected a share of unknowns between 0 and 1, got {share}.")
        if not grids or any(grid < 2 and grid != 0 for grid in grids):
            listed = ", ".join(map(str, grids)) or "none"
            raise UnknownsError(f"Expected at least 2 patches a side, or 0 for single pixels, got {listed}.")
        if any(seam < 0 for seam in seams):
            raise UnknownsError(f"Expected seams of 0 pixels or more, got {', '.join(map(str, seams))}.")
        if len(seams) not in (1, len(grids)):
            raise UnknownsError(f"Expected one seam, or one for each of {len(grids)} grids, got {len(seams)}.")
        self.unknown_label, self.share, self.grids = unknown_label, share, tuple(grids)
        self.seams = tuple(seams) * (len(grids) if len(seams) == 1 else 1)

    def check(self, batch_size: int, height: int, width: int) -> None:
        """Raises UnknownsError unless batches of such images can be given unknowns, and keep some known images."""
        num = round(batch_size * self.share)
        if not 0 < num < batch_size:
            raise UnknownsError(
                f"Expected a share of unknowns that takes some but not all images of a batch of {batch_size}, got "
                f"{self.share}, which takes {num}."
            )
        for grid, seam in zip(self.grids, self.seams, strict=True):
            _patch_size(height, width, grid, seam)

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        if x.dim() != 4 or not x.is_floating_point() or y.shape != x.shape[:1] or y.is_floating_point():
            raise UnknownsError(
                f"Expected images [B, C, H, W] of floating point and labels [B] of class indices, got {list(x.shape)} "
                f"of {x.dtype} and {list(y.shape)} of {y.dtype}: give a batch its unknowns before its labels are mixed."
            )
        num = round(len(x) * self.share)
        if num == 0:
            return x, y
        parts = x[:num].tensor_split(len(self.grids))
        shuffled = torch.cat(
            [shuffle_patches(p, g, generator, s) for p, g, s in zip(parts, self.grids, self.seams, strict=True)]
        )
        if x.shape[-1] == x.shape[-2]:
            shuffled[::2] = shuffled[::2].rot90(1, (2, 3))
        x = torch.cat([shuffled, x[num:]])
        y = torch.cat([torch.full_like(y[:num], self.unknown_label), y[num:]])
        return x, y


def shuffle_patches(x: Tensor, grid: int, generator: torch.Generator | None = None, seam: int = 0) -> Tensor:
    """Permutes the grid x grid patches (0: all pixels) of each image of [B, C, H, W], each by its own permutation.

    With a `seam`, patches are cut that many pixels larger on every side and fade into their neighbours over 2 * seam
    pixels, so that no edge gives the shuffling away. Raises UnknownsError unless H and W are multiples of `grid` and
    patches are at least 2 * seam wide. The permutations come from `generator` (on the CPU; torch's own without).
    """
    if x.dim() != 4:
        raise UnknownsError(f"Expected images [B, C, H, W], got shape {tuple(x.shape)}.")
    num, channels, height, width = x.shape
    rows, columns = (grid, grid) if grid else (height, width)
    stride = _patch_size(height, width, grid, seam)
    size, padded = (stride[0] + 2 * seam, stride[1] + 2 * seam), (height + 2 * seam, width + 2 * seam)
    order = torch.rand(num, rows * columns, generator=generator).argsort(1).to(x.device, non_blocking=True)
    patches = F.unfold(F.pad(x, (seam,) * 4, mode="replicate") if seam else x, size, stride=stride)
    patches = patches.gather(2, order[:, None].expand_as(patches))
    if seam == 0:
        return F.fold(patches, padded, size, stride=stride)
    window, weight = _blend(channels, stride, grid, seam, x.dtype, x.device)
    mixed = F.fold(patches.mul_(window), padded, size, stride=stride)
    return mixed[..., seam:-seam, seam:-seam] / weight


def _patch_size(height: int, width: int, grid: int, seam: int) -> tuple[int, int]:
    rows, columns = (grid, grid) if grid else (height, width)
    if height % rows or width % columns:
        raise UnknownsError(
            f"Expected a grid of patches that divides {height}x{width} images, got {grid} (grids= of "
            "PatchShuffle, --unknown-grid on the command line)."
        )
    size = height // rows, width // columns
    if not 0 <= 2 * seam <= min(size):
        raise UnknownsError(f"Expected a seam of at most half of the {size[0]}x{size[1]} patches, got {seam}.")
    return size


@lru_cache(maxsize=16)
def _blend(
    channels: int, stride: tuple[int, int], grid: int, seam: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The weights of a patch with its margins [1, channels * pixels, 1], and what they add up to at every pixel."""
    sides = []
    for length in stride:
        rise = (torch.arange(length + 2 * seam, device=device, dtype=dtype) + 0.5) / (2 * seam)
        sides.append(torch.minimum(rise, rise.flip(0)).clamp(max=1))
    window = torch.outer(*sides).flatten().repeat(channels)[None, :, None]
    padded, size = (tuple(count * s + 2 * seam for s in stride) for count in (grid, 1))
    weight = F.fold(window.expand(1, -1, grid * grid), padded, size, stride=stride)
    return window, weight[..., seam:-seam, seam:-seam]
