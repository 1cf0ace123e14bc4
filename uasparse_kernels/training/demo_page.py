"""The demo's one picture: speed, memory, accuracy, ROC curves, and images with what the network says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecFromSubplotSpec
from sklearn.metrics import roc_curve
from torch import Tensor, nn

from uasparse_kernels.training.data import ImageSet, TrainTest
from uasparse_kernels.training.demo_speed import Speed
from uasparse_kernels.training.normalise import Normalise
from uasparse_kernels.training.predict import SCORES

COLUMNS, ROWS = 8, 2  # of images
ACCEPTED = 0.95  # share of the known images under the threshold
DENSE, SPARSE, GOOD, BAD = "0.65", "tab:blue", "tab:green", "tab:red"


def draw_page(
    summary: Mapping[str, Any], speed: Speed, curves: Mapping[str, tuple[Path, str]], pictures: Sequence[Any]
) -> Figure:
    """`curves`: by an arm's title its scores.npz and the score to draw; `pictures`: what `answers` gives."""
    figure = plt.figure(figsize=(11, 8.5), layout="constrained")
    grid = figure.add_gridspec(3, 4, height_ratios=(1, 1.5, 1.3))
    arms = summary["arms"]
    cost = next(iter(arms.values()))["cost"]
    held = (cost["memory_bytes"] + cost["index_bytes"]) / 2**20
    pairs = (
        (f"Training step, ms (batch {speed.batch})", speed.train_dense * 1e3, speed.train_sparse * 1e3),
        (f"Inference, ms (batch {speed.batch})", speed.infer_dense * 1e3, speed.infer_sparse * 1e3),
        ("Weights and optimiser, MiB", cost["dense_memory_bytes"] / 2**20, held),
    )
    for column, (title, dense, sparse) in enumerate(pairs):
        axis = figure.add_subplot(grid[0, column])
        bars = axis.barh(["sparse", "dense"], [sparse, dense], color=[SPARSE, DENSE])
        axis.bar_label(bars, fmt="%.3g", padding=2)
        axis.set_title(title, fontsize="medium")
        axis.set_xlim(0, 1.25 * max(dense, sparse))
    axis = figure.add_subplot(grid[0, 3])
    accuracy = [arm["known"]["accuracy"]["mean"] * 100 for arm in arms.values()]
    bars = axis.barh(list(curves), accuracy, color=SPARSE)
    axis.bar_label(bars, fmt="%.1f", padding=-30, color="white")
    axis.invert_yaxis()
    axis.set_title("Accuracy, %", fontsize="medium")
    axis.set_xlim(0, 100)
    _draw_curves(figure, grid[1, :], curves)
    inner = GridSpecFromSubplotSpec(ROWS, COLUMNS, grid[2, :])
    for number, (image, says, right) in enumerate(pictures):
        axis = figure.add_subplot(inner[number // COLUMNS, number % COLUMNS])
        axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(says, fontsize=8, color=GOOD if right else BAD)
        axis.set(xticks=[], yticks=[])
    figure.suptitle(
        "A network with 90 % of its weights absent. Above: one CPU thread, dense by torch. Below: what it says of "
        "images,\nthe first row of kinds that it was trained on, the second of others (green: right)",
        fontsize="medium",
    )
    return figure


def _draw_curves(figure: Figure, place: Any, curves: Mapping[str, tuple[Path, str]]) -> None:
    """One panel per OOD set, one curve per arm, by its own score; unknown is positive."""
    stored = {title: (np.load(file), score) for title, (file, score) in curves.items()}
    first = next(iter(stored.values()))[0]
    sets = list(dict.fromkeys(name.split("/")[0] for name in first.files if not name.startswith("known/")))
    inner = GridSpecFromSubplotSpec(1, len(sets), place)
    for column, name in enumerate(sets):
        axis = figure.add_subplot(inner[0, column])
        for title, (arrays, score) in stored.items():
            known, unknown = arrays[f"known/{score}"], arrays[f"{name}/{score}"]
            truth = np.r_[np.zeros(len(known)), np.ones(len(unknown))]
            false, true, _ = roc_curve(truth, np.r_[known, unknown])
            axis.plot(false, true, label=f"{title} ({score})")
        axis.plot([0, 1], [0, 1], color="0.8", zorder=0)
        axis.set(title=name, xlabel="known images flagged", yticks=(0, 0.5, 1))
        if column == 0:
            axis.set_ylabel("unknown images caught")
            axis.legend(fontsize="x-small", loc="lower right")


@torch.no_grad()
def answers(
    model: nn.Module, normalise: Normalise, data: TrainTest, unknown: Sequence[ImageSet], score: str, known: Tensor
) -> list[tuple[Tensor, str, bool]]:
    """Images uint8 [C, H, W], what the network says of each, and whether this is right.

    The first row is of the test images, the second of the sets in turn, all by a fixed shuffle. An image is "unknown"
    if its score is above that of 95 % of the known test images, whose scores are `known` [N].
    """
    threshold = float(known.double().quantile(ACCEPTED))
    k = data.test.num_classes
    generator = torch.Generator().manual_seed(0)
    shown = [(data.test, i) for i in torch.randperm(len(data.test), generator=generator)[:COLUMNS].tolist()]
    for n in range(COLUMNS if unknown else 0):
        images = unknown[n % len(unknown)]
        shown.append((images, int(torch.randint(len(images), (), generator=generator))))
    logits = model.cpu().eval()(normalise(torch.stack([images.images[i] for images, i in shown]))).double()
    flagged = SCORES[score](logits, k) > threshold
    rows = []
    for n, (images, i) in enumerate(shown):
        label = int(logits[n, :k].argmax())
        says = "unknown" if flagged[n] else data.test.classes[label]
        is_known = images is data.test
        right = (not flagged[n] and label == int(images.labels[i])) if is_known else bool(flagged[n])
        rows.append((images.images[i], says, bool(right)))
    return rows
