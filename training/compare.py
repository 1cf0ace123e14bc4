"""`compare`: arms x sparsities x seeds, each a run of `fit` in its own folder; mean and spread over the seeds.

Resumable: a run with results.json is read, a run with last.pt goes on. A new study is one more entry of SUITES.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from training import report
from training.checkpoint import read_json, write_json
from training.config import FIXED_SPARSITY, FitConfig, with_arm
from training.data import TrainTest
from training.errors import CheckpointError, NonFiniteLossError
from training.evaluate import evaluate_checkpoint, load_data
from training.run import fit, pick_device
from training.scores import CHEAP_SCORES, SCORES

KNOWN_METRICS = ("accuracy", "ece", "nll", "brier")


@dataclass(frozen=True)
class Suite:
    """A study: `config` is what its runs share."""

    config: FitConfig
    arms: tuple[str, ...]
    unknowns: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    sparsities: tuple[float, ...] = (0.9,)
    scores: tuple[str, ...] = CHEAP_SCORES


@dataclass(frozen=True)
class Run:
    """One cell of a study."""

    label: str
    config: FitConfig

    @property
    def folder(self) -> str:
        return f"{re.sub(r'[^A-Za-z0-9.@+-]', '_', self.label)}/seed{self.config.seed}"


SUITES: dict[str, Suite] = {
    "demo": Suite(
        FitConfig(epochs=6, warmup_epochs=1, batch_size=128, delta_t=50),
        arms=("rigl", "rigl+moon+vote", "rigl+vote+patch-shuffle"),
        unknowns=("mnist", "photos", "blobs", "noise", "inverted"),
    ),
}


def plan(suite: Suite) -> list[Run]:
    """All runs of a suite, seeds outermost, so that an unfinished study has whole seeds. Raises TrainingError."""
    runs = []
    for seed in suite.seeds:
        for arm in suite.arms:
            config = with_arm(replace(suite.config, seed=seed), arm)
            fixed = config.method in FIXED_SPARSITY
            for sparsity in (FIXED_SPARSITY[config.method],) if fixed else suite.sparsities:
                label = arm if len(suite.sparsities) == 1 or fixed else f"{arm}@{sparsity:g}"
                runs.append(Run(label, replace(config, sparsity=sparsity)))
    return runs


def compare(
    suite: Suite, out_dir: Path, *, device: str = "auto", console: Console | None = None, data: TrainTest | None = None
) -> dict[str, Any]:
    """Runs what is missing of a suite, writes out_dir/summary.json and comparison.png, returns the summary.

    A run whose loss is no longer finite is reported under "failed" and left out of the means.
    """
    console = console or Console()
    runs = plan(suite)
    data = data or load_data(suite.config)
    results: list[tuple[Run, dict[str, Any]]] = []
    failed: list[str] = []
    for number, run in enumerate(runs, 1):
        console.print(f"[bold]\\[{number}/{len(runs)}] {run.label}, seed {run.config.seed}[/bold]", highlight=False)
        try:
            results.append((run, _run(run, suite, out_dir / run.folder, device, console, data)))
        except NonFiniteLossError as error:
            console.print(f"[red]{error}[/red]")
            failed.append(f"{run.folder}: {error}")
    summary = {"unknown": list(suite.unknowns), "arms": _by_arm(results), "failed": failed}
    write_json(out_dir / "summary.json", summary)
    if summary["arms"] and suite.unknowns:
        report.save_figure(report.comparison_bars(summary), out_dir / "comparison.png")
    return summary


def _run(run: Run, suite: Suite, folder: Path, device: str, console: Console, data: TrainTest) -> dict[str, Any]:
    file = folder / "results.json"
    if not file.is_file():
        return fit(
            run.config, folder, unknowns=suite.unknowns, scores=suite.scores, resume=True, device=device,
            console=console, data=data,
        )  # fmt: skip
    results = read_json(file)
    differences = FitConfig.from_dict(results["config"]).differences(run.config)
    if differences:
        raise CheckpointError(f"{folder} holds a run with other settings: {'; '.join(differences)} (there and here).")
    wanted = [s for s in suite.scores if s in run_scores(results, suite.scores)]
    if all(set(wanted) <= set(results["unknown"].get(name, ())) for name in suite.unknowns):
        console.print("finished before, read")
        return results
    console.print("trained before, evaluated again")
    judged = evaluate_checkpoint(folder, suite.unknowns, device=pick_device(device), scores=suite.scores)
    results |= judged.results
    write_json(file, results)
    return results


def run_scores(results: dict[str, Any], scores: Sequence[str]) -> list[str]:
    """Those of `scores` that the run's network has: one with K outputs has no output for unknown."""
    has_unknown = FitConfig.from_dict(results["config"]).has_unknown_output
    return [name for name in scores if has_unknown or not SCORES[name].needs_unknown_output]


def _by_arm(results: Sequence[tuple[Run, dict[str, Any]]]) -> dict[str, Any]:
    arms: dict[str, list[dict[str, Any]]] = {}
    for run, result in results:
        arms.setdefault(run.label, []).append(result)
    return {
        label: {
            "seeds": [r["config"]["seed"] for r in group],
            "known": {m: spread([r["known"][m] for r in group]) for m in KNOWN_METRICS},
            "unknown": _nested_spread([r["unknown"] for r in group]),
            "mean_auroc": _nested_spread([r["mean_auroc"] for r in group]),
            "seconds_per_epoch": spread([r["seconds_per_epoch"] for r in group]),
            "cost": group[0]["cost"],
        }
        for label, group in arms.items()
    }


def _nested_spread(group: Sequence[Any]) -> Any:
    """The same nesting of dicts with, at its leaves, the spread over the group."""
    if isinstance(group[0], dict):
        shared = [key for key in group[0] if all(key in member for member in group)]
        return {key: _nested_spread([member[key] for member in group]) for key in shared}
    return spread(group)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 for one value) and the values."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": math.fsum(values) / len(values), "std": std, "values": list(values)}


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints accuracy and calibration, and AUROC of every score on every OOD set."""
    arms = summary["arms"]
    table = Table(title="Known images: mean ± standard deviation over the seeds")
    for column in ("arm", "seeds", "accuracy %", "ECE %", "NLL", "Brier"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for label, arm in arms.items():
        known, n = arm["known"], len(arm["seeds"])
        percent = [show(known[m], n, 100) for m in ("accuracy", "ece")]
        table.add_row(label, str(n), *percent, *(show(known[m], n, 1, 3) for m in ("nll", "brier")))
    console.print(table)
    if summary["unknown"]:
        console.print(auroc_table(summary))
    for line in summary["failed"]:
        console.print(f"[red]failed: {line}[/red]")


def auroc_table(summary: dict[str, Any], scores: Sequence[str] | None = None) -> Table:
    """AUROC in percent (unknown is positive): a row an arm and score, a column an OOD set and their mean."""
    table = Table(title="Unknown images: AUROC %")
    table.add_column("arm")
    table.add_column("score")
    for name in (*summary["unknown"], "mean"):
        table.add_column(name, justify="right")
    for label, arm in summary["arms"].items():
        names = [s for s in arm["mean_auroc"] if scores is None or s in scores]
        for row, score in enumerate(names):
            cells = [show(arm["unknown"][s][score]["auroc"], len(arm["seeds"]), 100, 1) for s in summary["unknown"]]
            mean = show(arm["mean_auroc"][score], len(arm["seeds"]), 100, 1)
            table.add_row(label if row == 0 else "", score, *cells, mean, end_section=row == len(names) - 1)
    return table


def show(cell: dict[str, Any], num_seeds: int, scale: float, digits: int = 2) -> str:
    mean = f"{cell['mean'] * scale:.{digits}f}"
    return f"{mean} ± {cell['std'] * scale:.{digits}f}" if num_seeds > 1 else mean
