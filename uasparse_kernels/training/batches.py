"""Batches of normalised, lightly augmented images, made with whole-batch tensor operations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from uasparse_kernels.training.data import ImageSet
from uasparse_kernels.training.errors import TrainingError
from uasparse_kernels.training.normalise import Normalise
from uasparse_kernels.unknowns import PatchShuffle

AUGMENTATIONS = ("auto", "none", "crop", "crop-flip", "shift-flip")


class Batches:
    """Iterable over one epoch of training batches (x float32 [B, C, H, W], y int64 [B]).

    Order, crops and flips come from `generator` (on the CPU), so its state at the start of an epoch fixes the epoch.
    All batches have the same size: the last, smaller one is left out (another shuffle brings its images back).
    `unknowns` replaces some images of each batch by synthetic unknowns with the label `unknown_label`.
    """

    def __init__(
        self,
        data: ImageSet,
        normalise: Normalise,
        *,
        batch_size: int,
        generator: torch.Generator,
        augment: str = "none",
        unknowns: PatchShuffle | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise TrainingError(f"Expected augment to be one of {AUGMENTATIONS}, got {augment!r}.")
        if augment == "auto":  # a mirrored digit is no digit, a mirrored photograph is a photograph
            augment = "crop-flip" if data.images.shape[1] == 3 else "crop"
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.batch_size = min(batch_size, len(data))
        self.normalise, self.generator, self.augment, self.unknowns = normalise, generator, augment, unknowns
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator).to(self.device, non_blocking=True)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            index = order[start : start + self.batch_size]
            x, y = self.images[index], self.labels[index]
            if self.augment in ("crop", "crop-flip"):
                x = random_crop(x, self.generator)
            elif self.augment == "shift-flip":
                x = random_crop(x, self.generator, share=16, mode="reflect")
            if self.augment.endswith("flip"):
                x = random_flip(x, self.generator)
            x = self.normalise(x)
            if self.unknowns is not None:
                x, y = self.unknowns(x, y, self.generator)
            yield x, y


def random_crop(images: Tensor, generator: torch.Generator, *, share: int = 8, mode: str = "constant") -> Tensor:
    """Shifts each image of [B, C, H, W] by up to H/share pixels each way (4 of 32 by default).

    The border is filled with zeros, or with `mode` "reflect" with the mirrored image (see F.pad).
    """
    num, _, height, width = images.shape
    pad = height // share
    windows = F.pad(images, (pad, pad, pad, pad), mode).unfold(2, height, 1).unfold(3, width, 1)  # a view
    shift = torch.randint(2 * pad + 1, (2, num), generator=generator).to(images.device, non_blocking=True)
    return windows[torch.arange(num, device=images.device), :, shift[0], shift[1]]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors each image with probability 1/2."""
    flip = (torch.rand(len(images), generator=generator) < 0.5).to(images.device, non_blocking=True)
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
