"""The demo: RigL beside the whole method on Fashion-MNIST at 90 % sparsity, and what was gained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from uasparse_kernels.training.config import ARM_PARTS
from uasparse_kernels.training.study.compare import auroc_table, compare
from uasparse_kernels.training.study.suites import SUITES, Suite

BASELINE = "rigl"
OWN_SCORE = {"moon": "moon"} | dict.fromkeys(ARM_PARTS["unknowns"], "u")  # the score that a part of an arm brings
SCORES_SHOWN = ("msp", "energy", "moon", "u")
EXPLAINED = {
    "rigl": "RigL, cross entropy",
    "rigl+moon+vote": "RigL + MOON as published (unknown-aware loss, vote)",
    "rigl+vote+hard-shuffle": "RigL + vote + synthetic unknowns (shuffled patches) as targets of the unknown output",
}


def demo(
    out_dir: Path, *, suite: Suite | None = None, device: str = "auto", console: Console | None = None
) -> dict[str, Any]:
    """Runs the suite "demo" (what is finished in out_dir is not run again) and prints tables and a verdict."""
    console = console or Console()
    suite = suite or SUITES["demo"]
    for arm in suite.arms:
        console.print(f"  [bold]{arm}[/bold]: {EXPLAINED.get(arm, arm)}", highlight=False)
    summary = compare(suite, out_dir, device=device, console=console)
    console.print(cost_table(summary))
    console.print(auroc_table(summary, SCORES_SHOWN))
    for line in verdict(summary):
        console.print(line, highlight=False, soft_wrap=True)
    console.print("\nResults: " + str(out_dir / "summary.json"), soft_wrap=True)
    console.print("Figures: " + str(out_dir / "comparison.png"), soft_wrap=True)
    for figure in sorted(out_dir.glob("*/seed*/*.png")):
        console.print("         " + str(figure), soft_wrap=True)
    return summary


def cost_table(summary: dict[str, Any]) -> Table:
    """Accuracy, calibration and what the network costs, a row an arm."""
    table = Table(title="Accuracy and cost (memory: parameters + optimiser state, and of it against dense)")
    for column in (
        "arm",
        "accuracy %",
        "ECE %",
        "s / epoch",
        "active parameters",
        "memory KiB",
        "index KiB",
        "of dense",
    ):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for label, arm in summary["arms"].items():
        cost = arm["cost"]
        table.add_row(
            label,
            f"{arm['known']['accuracy']['mean'] * 100:.2f}",
            f"{arm['known']['ece']['mean'] * 100:.2f}",
            f"{arm['seconds_per_epoch']['mean']:.1f}",
            f"{cost['active_parameters']:,} of {cost['dense_parameters']:,}",
            f"{cost['memory_bytes'] / 1024:.1f}",
            f"{cost['index_bytes'] / 1024:.1f}",
            f"{(cost['memory_bytes'] + cost['index_bytes']) / cost['dense_memory_bytes']:.0%}",
        )
    return table


def verdict(summary: dict[str, Any]) -> list[str]:
    """What each method gained over the best score of the baseline, in plain words."""
    arms = summary["arms"]
    if BASELINE not in arms or not summary["unknown"]:
        return []
    scores = {name: cell["mean"] * 100 for name, cell in arms[BASELINE]["mean_auroc"].items()}
    best = max(scores, key=lambda name: scores[name])
    num_sets, num_seeds = len(summary["unknown"]), len(arms[BASELINE]["seeds"])
    lines = [
        f"\nMean AUROC over {num_sets} OOD sets, each method by the score it brings, against the best score of plain "
        f"RigL ({best}, {scores[best]:.1f}):"
    ]
    for label, arm in arms.items():
        own = next((score for part, score in OWN_SCORE.items() if part in label.split("+")), None)
        if own is None or own not in arm["mean_auroc"]:
            continue
        auroc = arm["mean_auroc"][own]["mean"] * 100
        accuracy, ece = (
            (arm["known"][m]["mean"] - arms[BASELINE]["known"][m]["mean"]) * 100 for m in ("accuracy", "ece")
        )
        lines.append(
            f"  {label}: {auroc:.1f} by {own} ({auroc - scores[best]:+.1f}), accuracy {accuracy:+.2f}, "
            f"ECE {ece:+.2f} points"
        )
    seeds = "one seed" if num_seeds == 1 else f"{num_seeds} seeds"
    lines.append(f"({seeds} and a short training: differences of a few points are noise. `compare` takes more seeds.)")
    return lines
