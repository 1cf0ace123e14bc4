"""Synthetic unknowns made from the batch itself: no OOD data, no extra forward.

The published loss (arXiv 2403.20047) has an output for "unknown" but never a target for it. Here a few images of each
batch lose their class: their patches are permuted, so that local statistics stay and the thing itself goes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.errors import TrainingError

UNKNOWNS = ("none", "patch-shuffle")


class PatchShuffle:
    """Replaces the first `share` of a batch by patch-shuffled images with the label `unknown_label`.

    The image is cut into `grid` x `grid` patches, which are permuted; every second one is also turned by 90 degrees.
    Called as (x [B, C, H, W], y [B], generator) -> (x, y) of the same shapes; the inputs are left as they were.
    """

    def __init__(self, unknown_label: int, *, share: float = 0.125, grid: int = 4) -> None:
        if not 0 < share < 1:
            raise TrainingError(f"Expected a share of unknowns between 0 and 1, got {share}.")
        if grid < 2:
            raise TrainingError(f"Expected at least 2 patches a side, got {grid}.")
        self.unknown_label, self.share, self.grid = unknown_label, share, grid

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        num = round(len(x) * self.share)
        if num == 0:
            return x, y
        shuffled = shuffle_patches(x[:num], self.grid, generator)
        if x.shape[-1] == x.shape[-2]:
            shuffled[::2] = shuffled[::2].rot90(1, (2, 3))
        x = torch.cat([shuffled, x[num:]])
        y = torch.cat([torch.full_like(y[:num], self.unknown_label), y[num:]])
        return x, y


def shuffle_patches(x: Tensor, grid: int, generator: torch.Generator) -> Tensor:
    """Permutes the grid x grid patches of each image of [B, C, H, W], each image by its own permutation.

    Raises TrainingError unless H and W are multiples of `grid`. The permutations come from `generator` (on the CPU).
    """
    num, channels, height, width = x.shape
    if height % grid or width % grid:
        raise TrainingError(
            f"Expected a grid of patches that divides {height}x{width} images, got {grid}: see --unknown-grid."
        )
    order = torch.rand(num, grid * grid, generator=generator).argsort(1).to(x.device, non_blocking=True)
    cut = x.view(num, channels, grid, height // grid, grid, width // grid)
    patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(num, grid * grid, channels, height // grid, width // grid)
    patches = patches[torch.arange(num, device=x.device)[:, None], order]
    patches = patches.view(num, grid, grid, channels, height // grid, width // grid)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(num, channels, height, width)
