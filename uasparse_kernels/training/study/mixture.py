"""The unknown-aware loss on a Gaussian mixture: confidence on points of no class, against alpha (arXiv 2403.20047).

The paper argues on Gaussian classes that the loss lowers the confidence on out-of-distribution points. Here three
classes overlap in the plane, a small dense network is trained on them with a fixed alpha, and its confidence (largest
probability of a known class among all K+1) is taken on points of the classes, between them, and far from all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import uasparse_kernels as ua
from uasparse_kernels.training.checkpoint import write_json
from uasparse_kernels.training.report import save_figure

ALPHAS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
NUM_CLASSES, SIGMA, NUM_POINTS, STEPS, HIDDEN = 3, 0.8, 1000, 600, 32
REGIONS = ("classes", "between", "far")


def class_means() -> Tensor:
    """[K, 2]: the corners of a triangle around the origin, at distance 1."""
    angle = torch.arange(NUM_CLASSES) * (2 * math.pi / NUM_CLASSES) + math.pi / 2
    return torch.stack([angle.cos(), angle.sin()], 1)


def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points [N, 2] of the mixture (isotropic, deviation SIGMA) and their classes [N]."""
    y = torch.randint(NUM_CLASSES, (NUM_POINTS,), generator=generator)
    return class_means()[y] + SIGMA * torch.randn(NUM_POINTS, 2, generator=generator), y


def regions(generator: torch.Generator) -> dict[str, Tensor]:
    """Points [N, 2]: of the classes, between them (the disc around the centre), and far (a ring of radius 4 to 6)."""

    def ring(low: float, high: float) -> Tensor:
        angle, r = torch.rand(2, NUM_POINTS, generator=generator)
        radius, angle = low + (high - low) * r, 2 * math.pi * angle
        return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)

    return {"classes": sample(generator)[0], "between": ring(0, 0.3), "far": ring(4, 6)}


def train(alpha: float, seed: int) -> nn.Module:
    """Trains 2-32-32-4 with Adam on all points at once, with the loss at a fixed alpha."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x, y = sample(generator)
    model = nn.Sequential(
        nn.Linear(2, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, NUM_CLASSES + 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        loss, _ = ua.ops.unknown_aware_loss(model(x), y, alpha)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@dataclass(frozen=True)
class Result:
    """Means over the points, one value per seed: confidence and u by region, accuracy on new points of the classes."""

    alpha: float
    confidence: dict[str, list[float]]
    u: dict[str, list[float]]
    accuracy: list[float]


@torch.no_grad()
def measure(alpha: float, seeds: Sequence[int]) -> tuple[Result, nn.Module]:
    """Trains one network per seed; returns their results, and the first network."""
    result = Result(alpha, {r: [] for r in REGIONS}, {r: [] for r in REGIONS}, [])
    models = []
    for seed in seeds:
        with torch.enable_grad():
            models.append(train(alpha, seed))
        generator = torch.Generator().manual_seed(1000 + seed)
        for region, points in regions(generator).items():
            p = models[-1](points).softmax(1)
            result.confidence[region].append(float(p[:, :NUM_CLASSES].amax(1).mean()))
            result.u[region].append(float(p[:, NUM_CLASSES].mean()))
        x, y = sample(generator)
        result.accuracy.append(float((models[-1](x)[:, :NUM_CLASSES].argmax(1) == y).float().mean()))
    return result, models[0]


def mixture(out_dir: Path, alphas: Sequence[float] = ALPHAS, seeds: Sequence[int] = (0, 1, 2)) -> list[dict[str, Any]]:
    """Measures every alpha; writes out_dir/mixture.json and mixture.png, returns what mixture.json holds."""
    measured = [measure(alpha, seeds) for alpha in alphas]
    results = [vars(result) for result, _ in measured]
    write_json(out_dir / "mixture.json", results)
    maps = [(result.alpha, model) for result, model in (measured[0], measured[-1])]
    save_figure(draw([result for result, _ in measured], maps), out_dir / "mixture.png")
    return results


def draw(results: Sequence[Result], maps: Sequence[tuple[float, nn.Module]]) -> Figure:
    """Confidence and u against alpha, and maps of the confidence in the plane for two alphas."""
    figure, axes = plt.subplots(1, 2 + len(maps), figsize=(4 * (2 + len(maps)), 3.6), layout="constrained")
    alphas = [result.alpha for result in results]
    for axis, kind in zip(axes, ("confidence", "u"), strict=False):
        for region in REGIONS:
            values = torch.tensor([getattr(result, kind)[region] for result in results])
            spread = values.std(1) if values.shape[1] > 1 else torch.zeros(len(values))
            axis.errorbar(alphas, values.mean(1).tolist(), spread.tolist(), marker="o", capsize=3, label=region)
        axis.set(xlabel="alpha", title=f"mean {kind}")
        axis.legend()
    for axis, (alpha, model) in zip(axes[2:], maps, strict=True):
        _draw_map(axis, alpha, model)
    return figure


@torch.no_grad()
def _draw_map(axis: Any, alpha: float, model: nn.Module) -> None:
    line = torch.linspace(-6, 6, 150)
    grid = torch.cartesian_prod(line, line)
    confidence = model(grid).softmax(1)[:, :NUM_CLASSES].amax(1).view(150, 150).T
    image = axis.imshow(confidence.numpy(), origin="lower", extent=(-6, 6, -6, 6), vmin=0, vmax=1, cmap="viridis")
    x, y = sample(torch.Generator().manual_seed(0))
    axis.scatter(*x[:400].T.numpy(), c=y[:400].numpy(), s=3, cmap="autumn")
    axis.set(title=f"confidence, alpha {alpha:g}")
    axis.figure.colorbar(image, ax=axis, shrink=0.8)
