"""The demo: 90 %-sparse networks on Fashion-MNIST, their speed beside dense, and the unknown images that they find."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from uasparse_kernels.training import report
from uasparse_kernels.training.checkpoint import write_json
from uasparse_kernels.training.config import ARM_PARTS
from uasparse_kernels.training.data import load_unknown_sets
from uasparse_kernels.training.demo_page import answers, draw_page
from uasparse_kernels.training.demo_speed import SECONDS, Speed, measure_speed
from uasparse_kernels.training.evaluate import load_run
from uasparse_kernels.training.predict import SCORES as LOGIT_SCORES
from uasparse_kernels.training.study.compare import compare
from uasparse_kernels.training.study.suites import SUITES, Suite, plan

BASELINE = "rigl"
OWN_SCORE = {"moon": "moon"} | dict.fromkeys(ARM_PARTS["unknowns"], "u")  # that a part of an arm adds
FEATURES = "mahalanobis"
TITLES = {
    "rigl": "RigL",
    "rigl+moon+vote": "MOON",
    "rigl+vote+hard-shuffle": "shuffled",
}
EXPLAINED = {
    "rigl": "RigL with cross entropy",
    "rigl+moon+vote": "RigL with MOON as published: unknown-aware loss, vote",
    "rigl+vote+hard-shuffle": "RigL with the vote, and shuffled patches as unknowns",
}
NEXT = (
    "python -m training fit --help                     train on images of your own",
    "python -m training export runs/demo/RUN           and serve the network",
    "model = ua.sparsify(model, sparsity=0.9)          in a loop of your own: README.md",
)


def demo(
    out_dir: Path,
    *,
    suite: Suite | None = None,
    device: str = "auto",
    console: Console | None = None,
    jobs: int = 0,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Runs the suite "demo", times it against dense, prints what came of it and draws demo.png.

    Runs that are finished in out_dir are not run again. `jobs` networks train at a time, each on one thread: by default
    all of them on a CPU of several cores, and one on a GPU. Each of the two timings takes `seconds`. Returns the
    summary of `compare`, with the speed.
    """
    console = console or Console()
    suite = suite or SUITES["demo"]
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    jobs = jobs or (len(suite.arms) if on_cpu and (os.cpu_count() or 1) > 1 else 1)
    console.print(
        f"[bold]Training {len(suite.arms)} sparse networks[/bold], {suite.config.sparsity:.0%} of the weights absent:"
    )
    for arm in suite.arms:
        console.print(f"  {title_of(arm):10}{EXPLAINED.get(arm, arm)}", highlight=False)
    summary = compare(suite, out_dir, device=device, console=console, jobs=jobs)
    console.print("[bold]Timing[/bold] the first beside the same network dense ...")
    folders = {run.label: out_dir / run.folder for run in plan(suite)}
    run = load_run(folders[suite.arms[0]])
    speed = measure_speed(run.model, run.config, run.normalise(run.data.test.images[: run.config.batch_size]), seconds)
    summary["speed"] = asdict(speed)
    write_json(out_dir / "summary.json", summary)
    scores = {arm: own_score(summary, arm) for arm in summary["arms"]}
    console.print(_auroc_table(summary, scores))
    for line in conclusion(summary, speed, scores):
        console.print(line, highlight=False, soft_wrap=True)
    page = out_dir / "demo.png"
    report.save_figure(_page(summary, speed, scores, folders, suite), page)
    console.print(f"\nOne picture of it: {page}", soft_wrap=True, highlight=False)
    console.print(f"All figures:       {out_dir / 'summary.json'}", soft_wrap=True, highlight=False)
    console.print("\n[bold]Next[/bold]")
    for line in NEXT:
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
    return summary


def title_of(arm: str) -> str:
    return TITLES.get(arm, arm)


def own_score(summary: dict[str, Any], arm: str) -> str:
    """The arm's own score (such as u); for an arm without one, the score of the logits that came out best."""
    cells = summary["arms"][arm]["mean_auroc"]
    own = next((score for part, score in OWN_SCORE.items() if part in arm.split("+") and score in cells), None)
    on_logits = [name for name in cells if name in LOGIT_SCORES]
    return own or max(on_logits or cells, key=lambda name: cells[name]["mean"], default="")


def _auroc_table(summary: dict[str, Any], scores: dict[str, str]) -> Table:
    table = Table(title="Unknown images found: AUROC % (50: by chance, 100: all)", title_style="", box=None)
    table.add_column("network")
    table.add_column("by")
    for name in (*summary["unknown"], "mean"):
        table.add_column(name, justify="right")
    for arm, cells in summary["arms"].items():
        for row, score in enumerate(dict.fromkeys((scores[arm], FEATURES))):
            if score not in cells["mean_auroc"]:
                continue
            values = [cells["unknown"][name][score]["auroc"]["mean"] for name in summary["unknown"]]
            values.append(cells["mean_auroc"][score]["mean"])
            table.add_row(title_of(arm) if row == 0 else "", score, *(f"{v * 100:.1f}" for v in values))
    return table


def conclusion(summary: dict[str, Any], speed: Speed, scores: dict[str, str]) -> list[str]:
    """What the run shows, in lines of at most 80 characters."""
    arms = summary["arms"]
    cost = next(iter(arms.values()))["cost"]
    held, dense = (cost["memory_bytes"] + cost["index_bytes"]) / 2**20, cost["dense_memory_bytes"] / 2**20
    lines = [
        "\n[bold]What this run shows[/bold] (one seed, a short training: a few tenths are noise)",
        _beside("Training step", "ms", speed.train_dense * 1e3, speed.train_sparse * 1e3),
        _beside("Inference", "ms", speed.infer_dense * 1e3, speed.infer_sparse * 1e3),
        f"  Memory           dense {dense:7.2f} MiB, sparse {held:6.2f} MiB: {held / dense:.0%} of dense",
    ]
    accuracy = [f"{title_of(arm)} {cells['known']['accuracy']['mean'] * 100:.1f}" for arm, cells in arms.items()]
    lines.append("  Accuracy, %      " + ", ".join(accuracy))
    if summary["unknown"]:
        found = [f"{title_of(a)} {c['mean_auroc'][scores[a]]['mean'] * 100:.1f}" for a, c in arms.items()]
        lines.append("  Unknown, AUROC   " + ", ".join(found) + " (by outputs)")
        found = [
            f"{title_of(a)} {c['mean_auroc'][FEATURES]['mean'] * 100:.1f}"
            for a, c in arms.items()
            if FEATURES in c["mean_auroc"]
        ]
        if found:
            lines.append("                   " + ", ".join(found) + " (by features)")
    return lines


def _beside(what: str, unit: str, dense: float, sparse: float) -> str:
    return f"  {what:16} dense {dense:7.1f} {unit},  sparse {sparse:6.1f} {unit}:  {dense / sparse:.1f} times as fast"


def _page(summary: dict[str, Any], speed: Speed, scores: dict[str, str], folders: dict[str, Path], suite: Suite) -> Any:
    curves = {title_of(arm): (folders[arm] / "scores.npz", score) for arm, score in scores.items() if score}
    judge = next((arm for arm in reversed(scores) if scores[arm] in LOGIT_SCORES), None)
    pictures = []
    if judge is not None:
        run = load_run(folders[judge])
        unknown = load_unknown_sets(suite.unknowns, run.data, data_dir=suite.config.data_dir or None)
        known = torch.from_numpy(np.load(folders[judge] / "scores.npz")[f"known/{scores[judge]}"])
        pictures = answers(run.model, run.normalise, run.data, unknown, scores[judge], known)
    return draw_page(summary, speed, curves, pictures)
