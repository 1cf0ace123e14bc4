"""The table and the picture of the README, from the stored results of the suites networks and serve."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import harness

TRAIN = "zen5/networks"
SERVE = "serve"
PICTURE = harness.RESULTS / "overview.png"
LEVELS = (0.8, 0.9, 0.95)
Rows = list[tuple[str, list[float | None], list[float | None]]]
# What a network is called here, in the suite networks (one thread, uniform density), and in the suite serve.
NETWORKS = (
    ("ResNet-50", "ResNet-50 224 b8 uniform, 1 thread", "resnet50, batch 1"),
    ("ResNet-18", "ResNet-18 224 b8 uniform, 1 thread", "resnet18, batch 1"),
    ("ResNet-18, CIFAR", "ResNet-18 CIFAR b64 uniform, 1 thread", ""),
    ("MobileNetV2", "MobileNetV2 224 b8 uniform, 1 thread", "mobilenet_v2, batch 1"),
    ("ViT-S/16, ViT-B/16", "ViT-S/16 b8 uniform, 1 thread", "vit_b_16, batch 1"),
    ("BERT-base", "BERT-base encoder b8x128 uniform, 1 thread", "bert_base_encoder_128, batch 1"),
    ("MLP", "MLP b128 uniform, 1 thread", "mlp, batch 128"),
)


def speedups(name: str) -> dict[tuple[str, float], float]:
    """Over the fastest dense rival, by shape and sparsity, of one file of results."""
    rows: list[dict[str, Any]] = json.loads((harness.RESULTS / f"{name}.json").read_text())["rows"]
    return {
        (row["shape"], row["sparsity"]): row["speedup_over"]["dense"]
        for row in rows
        if "dense" in row.get("speedup_over", {})
    }


def overview() -> Rows:
    """A row a network: its name, and the speed-up of a training step and of inference at each of LEVELS."""
    train, serve = speedups(TRAIN), speedups(SERVE)
    rows = []
    for name, step, inference in NETWORKS:
        rows.append((name, [train.get((step, s)) for s in LEVELS], [serve.get((inference, s)) for s in LEVELS]))
    return rows


def markdown(rows: Rows) -> str:
    names = [f"{kind} {level:.0%}" for kind in ("training", "serving") for level in LEVELS]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, train, serve in rows:
        cells = ("" if value is None else f"**{value:.1f}**" for value in (*train, *serve))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: Rows) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    colors = ("#9ecae1", "#4292c6", "#08519c")
    for axis, title, column in zip(axes, ("a training step", "inference"), (1, 2), strict=True):
        for number, level in enumerate(LEVELS):
            places = [place + (number - 1) * 0.26 for place in range(len(rows))]
            values = [row[column][number] or 0.0 for row in rows]
            bars = axis.barh(places, values, 0.26, color=colors[number], label=f"{level:.0%} sparse")
            axis.bar_label(bars, [f"{v:.1f}" if v else "" for v in values], fontsize=6, padding=2)
        axis.axvline(1, color="0.4", linewidth=0.8, linestyle="--")
        axis.set(
            title=f"Times as fast as dense: {title}", yticks=range(len(rows)), yticklabels=[row[0] for row in rows]
        )
    axes[0].invert_yaxis()
    axes[1].legend(loc="center right", bbox_to_anchor=(1, 0.62), fontsize="small")
    figure.savefig(PICTURE, dpi=130)
    plt.close(figure)
