"""The normalisation of images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalise:
    """(pixel / 255 - mean) / std a channel. Called on uint8 [N, C, H, W], gives float32."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: Tensor) -> Normalise:
        """Takes the statistics of uint8 images [N, C, H, W]; a channel that is constant gets std 1."""
        counts = torch.stack(
            [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
        ).double()
        levels = torch.arange(256, dtype=torch.float64) / 255
        weights = counts / counts.sum(1, keepdim=True)
        mean = weights @ levels
        std = (weights @ levels.square() - mean.square()).clamp(min=0).sqrt()
        std = torch.where(std < 1e-6, torch.ones_like(std), std)
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = (_levels(values, images.device) for values in (self.mean, self.std))
        return images.float().sub_(mean).div_(std)


@lru_cache(maxsize=64)
def _levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """On the device once: a copy at every batch would make the host wait for a GPU."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).mul(255).view(1, -1, 1, 1)
