"""Statistics of a study: paired differences between arms, bootstrap intervals, and a verdict a claim."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import bootstrap

from training.checkpoint import read_json
from training.claims import Claim
from training.config import FitConfig
from training.errors import TrainingError

Verdict = Literal["holds", "does not hold", "not decided"]
MIN_PAIRS = 5  # below, nothing is decided
CONFIDENCE = 0.95
LESS_IS_BETTER = ("ece", "nll", "step_time", "memory")
IN_PERCENT = ("accuracy", "ece")
KNOWN_METRICS = ("accuracy", "ece", "nll", "brier")


@dataclass(frozen=True)
class Row:
    """One run. `arm` is without its topology method; auroc and fpr95 are {set: {score: value}}, from 0 to 1."""

    method: str
    arm: str
    sparsity: float
    seed: int
    holdout: str
    known: dict[str, float]
    auroc: dict[str, dict[str, float]]
    fpr95: dict[str, dict[str, float]]
    step_time: float
    memory: float


def read_rows(folder: Path) -> list[Row]:
    """Reads every results.json below a folder, or rows stored in one file. Raises TrainingError if there is none."""
    if folder.is_file():
        return [Row(**values) for values in read_json(folder)]
    files = sorted(folder.rglob("results.json"))
    if not files:
        raise TrainingError(f"Expected finished runs (results.json) below {folder}, found none: run `compare` first.")
    return [row_of(read_json(file)) for file in files]


def row_of(results: dict[str, Any]) -> Row:
    config = FitConfig.from_dict(results["config"])
    arm = "dense" if config.arm == "dense" else config.arm.removeprefix(config.method).removeprefix("+")
    cost = results["cost"]
    by_metric = {
        metric: {
            name: {score: values[metric] for score, values in scores.items()}
            for name, scores in results["unknown"].items()
        }
        for metric in ("auroc", "fpr95")
    }
    return Row(
        config.method, arm, 0.0 if config.method == "dense" else config.sparsity, config.seed, config.holdout,
        {name: results["known"][name] for name in KNOWN_METRICS}, by_metric["auroc"], by_metric["fpr95"],
        results["seconds_per_epoch"], cost["memory_bytes"] + cost["index_bytes"],
    )  # fmt: skip


# --- pairs and verdicts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """Mean and 95 % interval of the claim's quantity over `pairs` pairs; `threshold` is what it must pass."""

    claim: Claim
    verdict: Verdict
    pairs: int
    mean: float
    low: float
    high: float
    threshold: float


def judge(claim: Claim, rows: Sequence[Row]) -> Judgement:
    """Holds if the whole interval is above the threshold, does not if the whole is below, else it is not decided.

    The interval is a percentile bootstrap over the pairs (same method, sparsity, seed and classes held out), which are
    taken as independent. Runs with classes held out serve claims on them only.
    """
    values = quantities(claim, rows)
    threshold = _seed_noise(claim, rows) if claim.above == "seed noise" else float(claim.above)
    if len(values) < MIN_PAIRS:
        mean = statistics.fmean(values) if values else float("nan")
        return Judgement(claim, "not decided", len(values), mean, float("nan"), float("nan"), threshold)
    low, high = interval(values)
    verdict: Verdict = "holds" if low > threshold else "does not hold" if high < threshold else "not decided"
    return Judgement(claim, verdict, len(values), statistics.fmean(values), low, high, threshold)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean; the values' own for values that are all the same."""
    if max(values) == min(values):
        return values[0], values[0]
    result = bootstrap(
        (np.asarray(values),), np.mean, confidence_level=CONFIDENCE, method="percentile", n_resamples=10_000, rng=0
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def quantities(claim: Claim, rows: Sequence[Row]) -> list[float]:
    """The claim's quantity of every run, or pair of runs, oriented so that more is better."""
    mine = [row for row in _of_claim(claim, rows) if row.arm == claim.arm]
    if claim.baseline is None:
        return [value for row in mine if (value := _value(claim, row, (claim.score,))) is not None]
    theirs: dict[tuple[Any, ...], Row] = {}
    by_seed: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in _of_claim(claim, rows):
        if row.arm == claim.baseline:
            theirs[_key(row)] = row
            by_seed[row.seed, row.holdout].append(row)
    out = []
    for row in mine:  # a dense network is paired with each sparse one of its seed
        for other in by_seed[row.seed, row.holdout] if row.method == "dense" else [theirs.get(_key(row))]:
            if other is not None and (difference := _difference(claim, row, other)) is not None:
                out.append(difference)
    return out


def _of_claim(claim: Claim, rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if bool(row.holdout) == ("holdout" in claim.sets)]


def _key(row: Row) -> tuple[Any, ...]:
    return row.method, row.sparsity, row.seed, row.holdout


def _difference(claim: Claim, row: Row, other: Row) -> float | None:
    shared = tuple(name for name in claim.sets if name in row.auroc and name in other.auroc)
    a, b = _value(claim, row, (claim.score,), shared), _value(claim, other, claim.baseline_scores, shared)
    if a is None or b is None:
        return None
    if claim.metric in ("step_time", "memory"):
        return -100 * (a / b - 1)
    return b - a if claim.metric in LESS_IS_BETTER else a - b


def _value(claim: Claim, row: Row, scores: Sequence[str], sets: Sequence[str] | None = None) -> float | None:
    """AUROC: the best of `scores`, each the mean over the sets; None for a run without them."""
    if claim.metric == "auroc":
        names = [name for name in claim.sets if name in row.auroc] if sets is None else list(sets)
        there = [s for s in scores if names and all(s in row.auroc[name] for name in names)]
        return max((100 * statistics.fmean(row.auroc[n][s] for n in names) for s in there), default=None)
    if claim.metric in ("step_time", "memory"):
        return float(getattr(row, claim.metric))
    return row.known[claim.metric] * (100 if claim.metric in IN_PERCENT else 1)


def _seed_noise(claim: Claim, rows: Sequence[Row]) -> float:
    """Minus the standard deviation of the baseline over its seeds, root mean square over its settings."""
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in _of_claim(claim, rows):
        if row.arm == claim.baseline and (value := _value(claim, row, claim.baseline_scores)) is not None:
            groups[row.method, row.sparsity, row.holdout].append(value)
    variances = [statistics.variance(group) for group in groups.values() if len(group) > 1]
    return -(statistics.fmean(variances) ** 0.5) if variances else 0.0


def spread_of(values: Sequence[float], digits: int = 1, scale: float = 100.0) -> str:
    """`mean ± standard deviation`, or the value where there is one."""
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"
