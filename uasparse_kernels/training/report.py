"""Figures (PNG, matplotlib) and tables (rich) of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from sklearn.metrics import roc_curve

from uasparse_kernels._table import bytes_of
from uasparse_kernels.training.checkpoint import write_atomically
from uasparse_kernels.unknowns.scores import SCORES

if TYPE_CHECKING:
    from uasparse_kernels.training.evaluate import Evaluation


def draw_run(run_dir: Path, history: Sequence[dict[str, Any]], judged: Evaluation) -> list[Path]:
    """Draws training curves, reliability diagram, and for the OOD sets ROC curves and score histograms."""
    figures = {"reliability.png": reliability_diagram(judged.results["known"])}
    if history:
        figures["training.png"] = training_curves(history)
    if len(judged.scores) > 1:
        figures["roc.png"] = roc_curves(judged)
        figures["scores.png"] = score_histograms(judged)
    return [save_figure(figure, run_dir / name) for name, figure in figures.items()]


def training_curves(history: Sequence[dict[str, Any]]) -> Figure:
    """Loss, accuracy and learning rate by epoch; also alpha and the mean u of test images, if the run has them."""
    panels = [("loss", ["train_loss"]), ("accuracy", ["train_accuracy", "test_accuracy"]), ("learning rate", ["lr"])]
    panels += [(key, [key]) for key in ("alpha", "test_mean_u") if key in history[0]]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3), layout="constrained")
    epochs = [record["epoch"] for record in history]
    for axis, (title, keys) in zip(axes, panels, strict=True):
        for key in keys:
            axis.plot(epochs, [record[key] for record in history], marker=".", label=key)
        axis.set(title=title, xlabel="epoch", yscale="log" if title == "test_mean_u" else "linear")
        if len(keys) > 1:
            axis.legend()
    return figure


def roc_curves(judged: Evaluation) -> Figure:
    """One panel per OOD set, one curve per score; unknown is positive."""
    sets = [name for name in judged.scores if name != "known"]
    figure, axes = _panels(len(sets))
    for axis, name in zip(axes, sets, strict=True):
        for score, values in judged.scores[name].items():
            known = judged.scores["known"][score]
            truth = np.r_[np.zeros(len(known)), np.ones(len(values))]
            fpr, tpr, _ = roc_curve(truth, np.r_[known.numpy(), values.numpy()])
            axis.plot(fpr, tpr, label=f"{score} {judged.results['unknown'][name][score]['auroc'] * 100:.1f}")
        axis.plot([0, 1], [0, 1], color="0.8", zorder=0)
        axis.set(title=name, xlabel="known images flagged", ylabel="unknown images caught")
        axis.legend(title="AUROC", fontsize="x-small")
    return figure


def score_histograms(judged: Evaluation) -> Figure:
    """One panel per score: the known test images against each OOD set."""
    scores = list(judged.scores["known"])
    figure, axes = _panels(len(scores))
    for axis, score in zip(axes, scores, strict=True):
        everything = np.concatenate([values[score].numpy() for values in judged.scores.values()])
        low, high = np.quantile(everything, (0.001, 0.999))
        bins = np.linspace(low, high if high > low else low + 1, 60)
        for name, values in judged.scores.items():
            kind = "stepfilled" if name == "known" else "step"
            color = "0.75" if name == "known" else None
            clipped = values[score].numpy().clip(bins[0], bins[-1])
            axis.hist(clipped, bins, histtype=kind, density=True, color=color, label=name)
        axis.set(title=SCORES[score].title, xlabel="more unknown →", yticks=[])
        axis.legend(fontsize="x-small")
    return figure


def reliability_diagram(known: dict[str, Any]) -> Figure:
    """Accuracy against confidence in 15 bins; the diagonal is perfect calibration."""
    bins = known["reliability"]
    filled = [k for k, share in enumerate(bins["share"]) if share > 0]
    width = 1 / len(bins["share"])
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(4, 4.6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    upper.bar([(k + 0.5) * width for k in filled], [bins["accuracy"][k] for k in filled], width, edgecolor="white")
    upper.plot([bins["confidence"][k] for k in filled], [bins["accuracy"][k] for k in filled], "k.")
    upper.plot([0, 1], [0, 1], color="0.6")
    upper.set(title=f"ECE {known['ece']:.2%}, accuracy {known['accuracy']:.2%}", ylabel="accuracy", xlim=(0, 1))
    lower.bar(
        [(k + 0.5) * width for k in filled], [bins["share"][k] for k in filled], width, color="0.7", edgecolor="white"
    )
    lower.set(xlabel="confidence", ylabel="share of images")
    return figure


def comparison_bars(summary: dict[str, Any]) -> Figure:
    """A panel per OOD set, bars per arm and score: mean AUROC over the seeds, whiskers one standard deviation."""
    arms, sets = list(summary["arms"]), summary["unknown"]
    figure, axes = _panels(len(sets))
    scores = list(dict.fromkeys(s for arm in summary["arms"].values() for s in next(iter(arm["unknown"].values()), {})))
    colors = {score: f"C{k}" for k, score in enumerate(scores)}
    for axis, name in zip(axes, sets, strict=True):
        for row, arm in enumerate(arms):
            cells = summary["arms"][arm]["unknown"].get(name, {})
            for k, (score, cell) in enumerate(cells.items()):
                auroc = cell["auroc"]
                at = row + 0.8 * ((k + 0.5) / len(cells) - 0.5)
                axis.barh(at, auroc["mean"] * 100, 0.8 / len(cells), xerr=auroc["std"] * 100, color=colors[score])
        axis.axvline(50, color="0.6", linewidth=0.8)
        axis.set(title=name, xlabel="AUROC", xlim=(0, 100), yticks=range(len(arms)), yticklabels=arms)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize="x-small")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    figure.legend(handles, list(colors), loc="outside lower center", ncols=len(colors), fontsize="small")
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG and closes the figure. Raises CheckpointError where it cannot be written."""
    try:
        write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    finally:
        plt.close(figure)
    return path


def detection_table(results: dict[str, Any]) -> Table:
    """AUROC and FPR95 of one run: a row per score, a column per OOD set."""
    table = Table(title="Unknown inputs: AUROC / FPR95 (unknown is positive), %")
    table.add_column("score")
    sets = list(results["unknown"])
    for name in sets:
        table.add_column(name, justify="right")
    for score in results["unknown"][sets[0]] if sets else ():
        cells = [results["unknown"][name][score] for name in sets]
        table.add_row(score, *(f"{c['auroc'] * 100:.1f} / {c['fpr95'] * 100:.1f}" for c in cells))
    return table


def known_table(rows: Iterable[tuple[str, dict[str, float]]]) -> Table:
    """Accuracy, ECE, NLL, Brier, and ECE and NLL after temperature scaling: a row per network."""
    table = Table(title="Known images")
    columns = ("arm", "accuracy %", "ECE %", "NLL", "Brier", "best temperature", "ECE % with it", "NLL with it")
    for column in columns:
        is_name = column == "arm"
        table.add_column(column, justify="left" if is_name else "right", overflow="fold" if is_name else "ellipsis")
    for arm, known in rows:
        table.add_row(
            arm,
            *(f"{known[name] * 100:.2f}" for name in ("accuracy", "ece")),
            *(f"{known[name]:.4f}" for name in ("nll", "brier")),
            f"{known['temperature']:.3f}",
            f"{known['ece_scaled'] * 100:.2f}",
            f"{known['nll_scaled']:.4f}",
        )
    return table


def cost_line(cost: dict[str, float]) -> str:
    """What `training_cost` counts, in a sentence."""
    return (
        f"{cost['active_parameters']:,} of {cost['dense_parameters']:,} parameters are active ({cost['density']:.1%}). "
        f"Parameters and optimiser state take {bytes_of(cost['memory_bytes'])}, and {bytes_of(cost['index_bytes'])} of "
        f"indices; dense {bytes_of(cost['dense_memory_bytes'])}."
    )


def _panels(count: int) -> tuple[Figure, list[Any]]:
    """A figure with `count` axes, up to four in a row."""
    columns = min(4, max(1, count))
    rows = -(-max(1, count) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.8 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])
