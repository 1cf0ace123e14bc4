"""What a study shows, written as a page of its own: verdicts, tables, figures, and all its numbers beside it."""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from uasparse_kernels.training.checkpoint import write_atomically
from uasparse_kernels.training.report import save_figure
from uasparse_kernels.training.study.claims import FAR, OURS, OURS_ARM, PUBLISHED, Claim
from uasparse_kernels.training.study.statistics import Judgement, Row, judge, read_study, spread_of
from uasparse_kernels.unknowns.scores import SCORES

SHOWN_SCORES = (
    "msp", "energy", "knn", "mahalanobis", "mahalanobis++", "moon", "u",
    "combined", "combined-features", "combined-all", "combined++",
)  # fmt: skip
DRAWN = (
    ("", "msp"), ("", "energy"), ("vote", "energy"), ("moon+vote", "moon"), (OURS_ARM, "u"),
    ("vote+mixed-shuffle", "u"), ("vote", "combined-all"), (OURS_ARM, "combined-all"),
)  # fmt: skip
VERDICT_COLOURS = {"holds": "tab:green", "does not hold": "tab:red", "not decided": "tab:gray"}
ABOUT = """# Study: {name}

Written by `python -m training report-study` from runs of `python -m training compare --suite {name}`; what it comes to
is on [the page on evidence](../evidence.md).

A claim *holds* if the mean of its paired differences (same topology method, sparsity, seed and classes held out) is on
its side of what it needs and a t test says so at 5 % after Holm's correction for all claims of its table, *does not
hold* if it is on the other side and the test says so, and is *not decided* else. The interval is of that claim alone,
without the correction. Claims without a pair are only named. Pairs are taken as independent. Differences are in
percentage points, turned so that more is better. Step times are compute seconds of runs on the same machine. The claims
are listed in `uasparse_kernels/training/study/claims.py`, which also says what anything was chosen on.

"""


def write_study(folder: Path, out: Path) -> list[Path]:
    """Writes the study of a folder (or of the JSON file that this wrote before) into the folder `out`.

    Returns what was written: a page, figures, a JSON file of all runs and a CSV file of all means, each by the study's
    name. Runs that are in this JSON file only stay in it, so that a study can grow from place to place. Raises
    TrainingError if there are no runs.
    """
    name = folder.stem if folder.is_file() else folder.name
    study, stored, page = read_study(folder), out / f"{name}.json", out / f"{name}.md"
    if stored.is_file():
        study = study.with_stored(stored)
    study.write(stored)
    rows = read_study(stored).rows
    published, ours = judge(PUBLISHED, rows), judge(OURS, rows)
    figures = [
        save_figure(draw_claims(published + ours), out / f"{name}-claims.png"),
        save_figure(draw_sparsity(rows), out / f"{name}-sparsity.png"),
    ]
    write_means(rows, out / f"{name}.csv")
    images = "\n".join(f"![{path.stem}]({path.name})" for path in figures)
    text = "\n".join(
        [
            ABOUT.format(name=name) + _about(rows), "## The published method\n", claims_table(published),
            "## This project's variant\n", claims_table(ours), "## Known images\n", known_table(rows), far_table(rows),
            scores_table(rows), _unknown_section(rows), images,
            f"\nAll runs: [{name}.json]({name}.json); mean and spread of every arm, set and score: "
            f"[{name}.csv]({name}.csv).\n",
        ]
    )  # fmt: skip
    write_atomically(page, lambda file: file.write(text.encode()))
    return [page, *figures, stored, out / f"{name}.csv"]


def _about(rows: Sequence[Row]) -> str:
    """What was run, so that gaps show."""
    counts = Counter((row.sparsity, bool(row.holdout)) for row in rows if row.method != "dense")
    cells = [
        f"{sparsity:.0%}{' with classes held out' if held_out else ''}: {number}"
        for (sparsity, held_out), number in sorted(counts.items())
    ]
    dense = sum(row.method == "dense" for row in rows)
    seeds = sorted({row.seed for row in rows})
    return f"{len(rows)} runs ({dense} dense; {'; '.join(cells)}), seeds {', '.join(map(str, seeds))}.\n"


def claims_table(judgements: Sequence[Judgement]) -> str:
    """A row per claim, with its mean at each sparsity if there are several; claims without a pair are named below."""
    levels = sorted({level for j in judgements for level in j.by_sparsity})
    several = len(levels) > 1
    by_level = f" at {' / '.join(f'{100 * level:g}' for level in levels)} % |" if several else ""
    lines = [
        f"| claim | verdict | mean | 95 % interval | needs above | corrected p | pairs |{by_level}",
        "|---" * (7 + several) + "|",
    ]
    for j in judgements:
        if j.pairs == 0:
            continue
        digits = 3 if j.claim.metric.startswith("nll") else 2
        cells = [f"{j.mean:.{digits}f}", f"{j.low:.{digits}f} to {j.high:.{digits}f}"]
        cells = ["" if "nan" in cell else cell for cell in [*cells, f"{j.threshold:.{digits}f}", f"{j.p_holm:.2g}"]]
        means = [f"{j.by_sparsity[level]:.{digits}f}" if level in j.by_sparsity else "-" for level in levels]
        lines.append(
            f"| {j.claim.text} | **{j.verdict}** | {' | '.join(cells)} | {j.pairs} |"
            + (f" {' / '.join(means)} |" if several else "")
        )
    without = [j.claim.text for j in judgements if j.pairs == 0]
    tail = f"\nNo runs for a pair here: {'; '.join(without)}.\n" if without else ""
    return ("\n".join(lines) + "\n" if len(without) < len(judgements) else "") + tail


def known_table(rows: Sequence[Row]) -> str:
    """Accuracy, ECE and NLL on all classes, the last two also with a temperature, and mean u, by arm and sparsity.

    A number in brackets says how many of the runs have the figure.
    """
    columns = {
        "accuracy": ("accuracy %", 100.0, 2), "ece": ("ECE %", 100.0, 2), "nll": ("NLL", 1.0, 3),
        "temperature": ("best temperature", 1.0, 3), "ece_scaled": ("ECE % with it", 100.0, 2),
        "nll_scaled": ("NLL with it", 1.0, 3), "mean_u": ("mean u, 1/1000", 1000.0, 2),
    }  # fmt: skip
    titles = " | ".join(title for title, _, _ in columns.values())
    lines = [f"| arm | sparsity | runs | {titles} |", "|---" * (len(columns) + 3) + "|"]
    for (name, sparsity), group in _groups(row for row in rows if not row.holdout).items():
        cells = []
        for metric, (_, scale, digits) in columns.items():
            values = [row.known[metric] for row in group if metric in row.known]
            cell = spread_of(values, digits, scale) if values else ""
            cells.append(cell if len(values) in (0, len(group)) else f"{cell} ({len(values)})")
        lines.append(f"| {name} | {sparsity:.0%} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shared_sets(rows: Iterable[Row]) -> list[str]:
    """The far-OOD sets that all runs on all classes have."""
    plain = [row for row in rows if not row.holdout]
    return [name for name in FAR if all(name in row.auroc for row in plain)]


def far_table(rows: Sequence[Row]) -> str:
    """Mean far-OOD AUROC by score, a row per arm: over methods, seeds, and the sets that all runs have.

    A number in brackets says how many of the runs have the score.
    """
    sets, rows = shared_sets(rows), [row for row in rows if not row.holdout]
    levels = sorted({row.sparsity for row in rows if row.method != "dense"})
    if not sets or not levels:
        return ""
    shown = [score for score in SHOWN_SCORES if any(score in row.auroc[sets[0]] for row in rows)]
    listed = " / ".join(f"{100 * level:g}" for level in levels)
    lines = [f"## Far-OOD at {listed} %: AUROC, mean over {', '.join(sets)}\n"]
    lines += ["| arm | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for arm in sorted({row.arm for row in rows}):
        cells = []
        for score in shown:
            means = []
            for level in (0.0,) if arm == "dense" else levels:
                group = [row.auroc for row in rows if row.arm == arm and row.sparsity == level]
                there = [auroc for auroc in group if score in auroc[sets[0]]]
                mean = f"{100 * statistics.fmean(a[name][score] for a in there for name in sets):.1f}" if there else "-"
                means.append(mean if len(there) in (0, len(group)) else f"{mean} ({len(there)})")
            cells.append(" / ".join(means) if set(means) != {"-"} else "")
        lines.append(f"| {arm or 'sparse CE'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main_sparsity(rows: Iterable[Row]) -> float | None:
    """The sparsity with the most runs, dense ones left out."""
    sparse = Counter(row.sparsity for row in rows if row.method != "dense")
    return max(sparse, key=lambda sparsity: sparse[sparsity]) if sparse else None


def scores_table(rows: Sequence[Row]) -> str:
    """AUROC of every score (a row each) by arm, at the sparsity with the most runs: far-OOD / held-out classes.

    Means over the runs that have the score, and over the far sets that all runs have; "-" where there is no run.
    """
    main, far = main_sparsity(rows), shared_sets(rows)
    if main is None or not far:
        return ""
    groups = _groups(row for row in rows if row.sparsity == main or row.method == "dense")
    near = any(row.holdout for group in groups.values() for row in group)
    lines = [f"## Scores at {main:.0%}: AUROC, far-OOD{' / held-out classes' if near else ''}, %\n"]
    lines += [f"Means over {', '.join(far)}, and over the runs that have the score.\n"]
    lines += ["| score | " + " | ".join(name for name, _ in groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for score in SCORES:
        cells = []
        for group in groups.values():
            means = []
            for sets, held_out in ((far, False), (["holdout"], True))[: 1 + near]:
                of_kind = [row.auroc for row in group if bool(row.holdout) == held_out]
                values = [auroc[name][score] for auroc in of_kind for name in sets if score in auroc[name]]
                means.append(f"{100 * statistics.fmean(values):.1f}" if values else "-")
            cells.append(" / ".join(means) if set(means) != {"-"} else "")
        if any(cells):
            lines.append(f"| {score} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _unknown_section(rows: Sequence[Row]) -> str:
    """AUROC / FPR95, a column per set, at the sparsity with the most runs; held-out classes from their own runs."""
    main = main_sparsity(rows)
    if main is None:
        return ""
    chosen = [row for row in rows if row.sparsity == main or row.method == "dense"]
    sets = list(dict.fromkeys(name for row in chosen for name in row.auroc))
    lines = [f"## Unknown images at {main:.0%}: AUROC / FPR95 (unknown is positive), %\n"]
    lines += ["| arm | score | " + " | ".join(sets) + " |", "|---" * (len(sets) + 2) + "|"]
    for (name, _), group in _groups(chosen).items():
        for score in SHOWN_SCORES:
            cells = []
            for which in sets:
                there = [row for row in group if bool(row.holdout) == (which == "holdout") and which in row.auroc]
                pairs = [(r.auroc[which][score], r.fpr95[which][score]) for r in there if score in r.auroc[which]]
                cells.append(" / ".join(spread_of(values) for values in zip(*pairs, strict=True)))
            if any(cells):
                lines.append(f"| {name} | {score} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _groups(rows: Iterable[Row]) -> dict[tuple[str, float], list[Row]]:
    """Rows by arm with its method, and sparsity."""
    groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.method, row.arm, row.sparsity)):
        groups[full_name(row), row.sparsity].append(row)
    return groups


def full_name(row: Row) -> str:
    return "dense" if row.arm == "dense" else "+".join(part for part in (row.method, row.arm) if part)


def write_means(rows: Sequence[Row], path: Path) -> None:
    """Mean and sample standard deviation of AUROC and FPR95 for every arm, sparsity, set and score; from 0 to 1."""
    with io.StringIO() as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["arm", "sparsity", "set", "score", "metric", "runs", "mean", "std"])
        for (name, sparsity), group in _groups(rows).items():
            cells: dict[tuple[str, str, str], list[float]] = defaultdict(list)
            for row in group:
                for metric, by_set in (("auroc", row.auroc), ("fpr95", row.fpr95)):
                    for which, scores in by_set.items():
                        if bool(row.holdout) == (which == "holdout"):
                            for score, value in scores.items():
                                cells[which, score, metric].append(value)
            for (which, score, metric), values in cells.items():
                std = statistics.stdev(values) if len(values) > 1 else 0.0
                table.writerow(
                    [name, sparsity, which, score, metric, len(values), f"{statistics.fmean(values):.5f}", f"{std:.5f}"]
                )
        content = file.getvalue().encode()
    write_atomically(path, lambda out: out.write(content))


def draw_claims(judgements: Sequence[Judgement]) -> Figure:
    """The interval of each claim about AUROC differences against what it needs."""
    drawn = [j for j in judgements if j.pairs and j.claim.metric == "auroc" and j.claim.baseline is not None]
    figure, axis = plt.subplots(figsize=(10, 1 + 0.4 * max(1, len(drawn))), layout="constrained")
    for at, j in enumerate(drawn):
        axis.plot([j.low, j.high], [at, at], color=VERDICT_COLOURS[j.verdict], linewidth=3, solid_capstyle="butt")
        axis.plot(j.mean, at, "o", color=VERDICT_COLOURS[j.verdict])
        axis.plot(j.threshold, at, "k|", markersize=12)
    axis.axvline(0, color="0.8", zorder=0)
    axis.set(yticks=range(len(drawn)), yticklabels=[_short(j.claim) for j in drawn])
    axis.set(xlabel="difference in AUROC, points (bar: 95 % interval, |: needed)")
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize="x-small")
    return figure


def _short(claim: Claim) -> str:
    where = "held-out classes" if "holdout" in claim.sets else claim.sets[0] if len(claim.sets) == 1 else "far-OOD"
    best = (
        "/".join(claim.baseline_scores) if len(claim.baseline_scores) < 3 else f"best of {len(claim.baseline_scores)}"
    )
    return f"{claim.arm} ({claim.score}) - {claim.baseline or 'sparse CE'} ({best}), {where}"


def draw_sparsity(rows: Sequence[Row]) -> Figure:
    """Mean far-OOD AUROC, over the sets that all runs have, against sparsity; whiskers one deviation over the seeds."""
    sets = shared_sets(rows)
    methods = [m for m in ("rigl", "set") if any(row.method == m for row in rows)] or ["rigl"]
    figure, axes = plt.subplots(1, len(methods), figsize=(5.5 * len(methods), 4), squeeze=False, layout="constrained")
    for axis, method in zip(axes[0], methods, strict=True):
        for arm, score in DRAWN:
            points: dict[float, list[float]] = defaultdict(list)
            for row in rows:
                if row.method == method and row.arm == arm and not row.holdout:
                    values = [row.auroc[name][score] for name in sets if score in row.auroc[name]]
                    if values:
                        points[row.sparsity].append(100 * statistics.fmean(values))
            levels = sorted(points)
            means = [statistics.fmean(points[level]) for level in levels]
            spreads = [statistics.stdev(points[level]) if len(points[level]) > 1 else 0.0 for level in levels]
            if levels:
                label = f"{arm or 'sparse CE'} by {score}"
                axis.errorbar([100 * level for level in levels], means, spreads, marker="o", capsize=3, label=label)
        axis.axhline(50, color="0.8", zorder=0)
        axis.set(title=method, xlabel="sparsity, %", ylabel="AUROC, far-OOD, %")
    handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="x-small")
    return figure
