"""Statistics of a study: paired differences between arms, their t intervals, a verdict per claim, Holm-corrected."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from scipy.stats import ttest_1samp

from uasparse_kernels.training.checkpoint import read_json, write_atomically
from uasparse_kernels.training.config import ARM_PARTS, PLAIN_ARM, FitConfig
from uasparse_kernels.training.errors import TrainingError
from uasparse_kernels.training.evaluate import read_results
from uasparse_kernels.training.study.claims import Claim

Verdict = Literal["holds", "does not hold", "not decided"]
Key = tuple[str, str, float, int, str]
MIN_PAIRS = 5  # below, nothing is decided
CONFIDENCE = 0.95
LESS_IS_BETTER = ("ece", "nll", "ece_scaled", "nll_scaled", "step_time", "memory")
IN_PERCENT = ("accuracy", "ece", "ece_scaled")
KNOWN_METRICS = ("accuracy", "ece", "nll", "brier")
SCALED_METRICS = ("ece_scaled", "nll_scaled", "temperature")  # added later, like mean_u: not every stored run has them
DIGITS = 5  # of stored shares: a hundredth of what a thousandth of the images makes
OF_A_RUN = {"sparsity", "seed", "holdout", "data_dir", *PLAIN_ARM}  # settings that differ within a study


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
    step_time: float | None  # compute seconds of an epoch
    memory: float

    @property
    def key(self) -> Key:
        return self.method, self.arm, self.sparsity, self.seed, self.holdout


@dataclass(frozen=True)
class Study:
    """All runs of a study and the settings (of FitConfig) that they share."""

    settings: dict[str, Any]
    rows: list[Row]

    def with_stored(self, file: Path) -> Study:
        """Adds the rows of a stored study that this one lacks. Raises TrainingError if its settings are others."""
        stored = read_study(file)
        check_settings(self.settings, stored.settings, file)
        mine = {row.key for row in self.rows}
        return Study(stored.settings | self.settings, self.rows + [row for row in stored.rows if row.key not in mine])

    def write(self, file: Path) -> None:
        """Stores the study, one run per line, in an order that does not depend on how it came about."""
        lines = ",\n".join(json.dumps(asdict(row)) for row in sorted(self.rows, key=lambda row: row.key))
        text = f'{{"settings": {json.dumps(self.settings)},\n"rows": [\n{lines}\n]}}\n'
        write_atomically(file, lambda out: out.write(text.encode()))


def read_study(path: Path) -> Study:
    """Reads every results.json below a folder, or one file that `Study.write` wrote.

    Raises TrainingError if there is no run, or if the runs differ in what a study shares.
    """
    if path.is_file():
        stored = read_json(path)
        try:
            study = Study(dict(stored["settings"]), [Row(**values) for values in stored["rows"]])
            if all(isinstance(row.auroc, dict) and isinstance(row.known, dict) for row in study.rows):
                return study
            raise TypeError("a row without figures")
        except (KeyError, TypeError, ValueError) as error:
            raise TrainingError(f"Expected a study that `report-study` stored, got {path}: {error!r}.") from error
    files = sorted(path.rglob("results.json"))
    if not files:
        raise TrainingError(f"Expected finished runs (results.json) below {path}, found none: run `compare` first.")
    settings: dict[str, Any] = {}
    rows = []
    for file in files:
        results = read_results(file)
        found = shared_settings(FitConfig.from_dict(results["config"]))
        check_settings(settings, found, file)
        settings |= found
        rows.append(row_of(results))
    return Study(settings, rows)


def shared_settings(config: FitConfig) -> dict[str, Any]:
    """The settings that a run shares with its study: not sparsity, seed, classes held out, or what its arm sets."""
    named = set(config.arm.split("+"))
    of_arm = {name for tokens in ARM_PARTS.values() for token in named & tokens.keys() for name in tokens[token]}
    return {name: value for name, value in config.to_dict().items() if name not in OF_A_RUN | of_arm}


def check_settings(expected: dict[str, Any], found: dict[str, Any], where: Path) -> None:
    """Raises TrainingError naming the settings of both that differ."""
    names = [name for name in expected if name in found and expected[name] != found[name]]
    if names:
        listed = "; ".join(f"{name}: {expected[name]!r} and there {found[name]!r}" for name in names)
        raise TrainingError(f"{where} holds a study with other settings: {listed}. Give the same, or another folder.")


def key_of(config: FitConfig) -> Key:
    """What a run is within its study: topology method, arm without it, sparsity, seed and classes held out."""
    dense = config.method == "dense"
    arm = "dense" if config.arm == "dense" else config.arm.removeprefix(config.method).removeprefix("+")
    return config.method, arm, 0.0 if dense else config.sparsity, config.seed, config.holdout


def row_of(results: dict[str, Any]) -> Row:
    cost = results["cost"]
    by_metric = {
        metric: {
            name: {score: round(values[metric], DIGITS) for score, values in scores.items()}
            for name, scores in results["unknown"].items()
        }
        for metric in ("auroc", "fpr95")
    }
    known = {name: round(results["known"][name], DIGITS) for name in KNOWN_METRICS}
    known |= {name: round(results["known"][name], DIGITS) for name in SCALED_METRICS if name in results["known"]}
    if "mean_u" in results["known"]:
        known["mean_u"] = float(f"{results['known']['mean_u']:.3g}")  # a ten-thousandth and less in some networks
    return Row(
        *key_of(FitConfig.from_dict(results["config"])), known, by_metric["auroc"], by_metric["fpr95"],
        results.get("compute_seconds_per_epoch"), cost["memory_bytes"] + cost["index_bytes"],
    )  # fmt: skip


# --- pairs and verdicts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """Mean and 95 % interval of the claim's quantity over `pairs` pairs; `threshold` is what it must pass.

    `p` is that of the t test against the threshold (two-sided), `p_holm` what Holm's correction for all claims of the
    family makes of it. `by_sparsity` has the mean of the pairs at each sparsity that has some: one verdict may hide
    that they differ.
    """

    claim: Claim
    verdict: Verdict
    pairs: int
    mean: float
    low: float
    high: float
    threshold: float
    p: float
    p_holm: float
    by_sparsity: dict[float, float]


def judge(claims: Sequence[Claim], rows: Sequence[Row]) -> list[Judgement]:
    """The verdicts on a family of claims, which share the chance of 5 % that one of them is wrong.

    A claim holds if its mean is above the threshold and the corrected p of a paired t test below 0.05, does not hold if
    the mean is below and p too, else it is not decided; nor is one with fewer than five pairs, which does not count for
    the correction. Pairs (same method, sparsity, seed and classes held out) are taken as independent. Runs with classes
    held out serve claims on them only. Correction: Holm (1979), Scandinavian Journal of Statistics 6.
    """
    judgements = [_judge(claim, rows) for claim in claims]
    tested = sorted((j.p, at) for at, j in enumerate(judgements) if not math.isnan(j.p))
    worst = 0.0
    for rank, (p, at) in enumerate(tested):
        worst = max(worst, min(1.0, (len(tested) - rank) * p))
        judgement = judgements[at]
        decided: Verdict = "holds" if judgement.mean > judgement.threshold else "does not hold"
        verdict: Verdict = decided if worst < 1 - CONFIDENCE else "not decided"
        judgements[at] = replace(judgement, verdict=verdict, p_holm=worst)
    return judgements


def _judge(claim: Claim, rows: Sequence[Row]) -> Judgement:
    values, nan = quantities(claim, rows), float("nan")
    threshold = _seed_noise(claim, rows) if claim.above == "seed noise" else float(claim.above)
    by_sparsity = {}
    for sparsity in sorted({row.sparsity for row in rows if row.method != "dense"}):
        if of_one := quantities(claim, [row for row in rows if row.sparsity == sparsity or row.method == "dense"]):
            by_sparsity[sparsity] = statistics.fmean(of_one)
    mean = statistics.fmean(values) if values else nan
    low, high, p = t_test(values, threshold) if len(values) >= MIN_PAIRS else (nan, nan, nan)
    return Judgement(claim, "not decided", len(values), mean, low, high, threshold, p, nan, by_sparsity)


def t_test(values: Sequence[float], threshold: float) -> tuple[float, float, float]:
    """The 95 % interval of the mean, and the two-sided p that it is the threshold; values all the same decide."""
    if max(values) == min(values):
        return values[0], values[0], float(values[0] == threshold)
    result = ttest_1samp(values, threshold)
    interval = result.confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high), float(result.pvalue)


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
    """AUROC: the best of `scores`, each the mean over the sets; None for a run without what is asked."""
    if claim.metric == "auroc":
        names = [name for name in claim.sets if name in row.auroc] if sets is None else list(sets)
        there = [s for s in scores if names and all(s in row.auroc[name] for name in names)]
        return max((100 * statistics.fmean(row.auroc[n][s] for n in names) for s in there), default=None)
    if claim.metric in ("step_time", "memory"):
        return cast(float | None, getattr(row, claim.metric))
    value = row.known.get(claim.metric)
    return None if value is None else value * (100 if claim.metric in IN_PERCENT else 1)


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
