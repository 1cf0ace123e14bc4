"""What structures cost and give: accuracies of the suite "structures" beside measured times, as tables and a figure."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from uasparse_kernels.training.checkpoint import read_json, write_atomically
from uasparse_kernels.training.config import FitConfig
from uasparse_kernels.training.errors import TrainingError
from uasparse_kernels.training.evaluate import read_results
from uasparse_kernels.training.report import save_figure
from uasparse_kernels.training.study.statistics import spread_of

NAMES = {"srigl": "fan-in", "2:4": "2:4", "dense": "dense"}  # of methods that are a structure; else it is the block
BY_SHARE = " by share"  # blocks that are dropped by their share of an output
BLOCKS = ("4x1", "16x1", "4x4", "16x16", "32x32")
ORDER = ("dense", "unstructured", "fan-in", *(name for b in BLOCKS for name in (b, b + BY_SHARE)), "2:4")
STEP, FORWARD, SERVED = "step", "forward", ("serving, batch 128", "serving, batch 1")
SHOWN = 4.0  # points of accuracy in the figure
GPU_SHAPE = {"out": 4096, "inp": 4096, "tokens": 8192}


@dataclass(frozen=True, order=True)
class StructureRun:
    """A trained network; `pruned`: from the dense one by magnitude, and fine-tuned."""

    structure: str
    sparsity: float
    pruned: bool
    seed: int
    epochs: int
    accuracy: float
    nll: float

    @property
    def key(self) -> tuple[str, float, bool, int]:
        return self.structure, self.sparsity, self.pruned, self.seed


Cells = dict[tuple[str, float, bool], list[StructureRun]]
Times = dict[tuple[str, float], dict[str, float]]  # speed-up over dense by pass


def read_runs(folder: Path) -> list[StructureRun]:
    """The finished runs below a folder. Raises TrainingError if there is none."""
    runs = []
    for file in sorted(folder.rglob("results.json")):
        results = read_results(file)
        config, known = FitConfig.from_dict(results["config"]), results["known"]
        structure = structure_of(config)
        about = structure, config.sparsity, "start" in results, config.seed, config.epochs
        runs.append(StructureRun(*about, round(known["accuracy"], 5), round(known["nll"], 5)))
    if not runs:
        raise TrainingError(
            f"Expected finished runs below {folder}, found none: run `compare --suite structures` first."
        )
    return runs


def structure_of(config: FitConfig) -> str:
    name = NAMES.get(config.method, config.block).replace("1x1", "unstructured")
    return name + BY_SHARE if config.drop == "relative" else name


def write_structures(folder: Path | None, out: Path, times: Path, gpu: Path, page: Path) -> list[Path]:
    """Adds the runs of a folder to out/structures.json, draws out/structures.png, and renews the tables of `page`.

    `times` is what `python -m benchmarks structures` stored, `gpu` what `gpu-linear` did. Returns what was written.
    Raises TrainingError if there are no runs, or no page; nothing is written then.
    """
    stored = out / "structures.json"
    runs = {run.key: run for run in read_stored(stored)} if stored.is_file() else {}
    runs |= {run.key: run for run in (read_runs(folder) if folder is not None else [])}
    if not runs:
        raise TrainingError(f"Expected runs in {stored}, or a folder of `compare --suite structures`, found neither.")
    if not page.is_file():
        raise TrainingError(f"Expected the page whose tables are renewed at {page}, found none: --page names it.")
    lines = ",\n".join(json.dumps(asdict(run)) for run in sorted(runs.values()))
    write_atomically(stored, lambda file: file.write(f'{{"runs": [\n{lines}\n]}}\n'.encode()))
    figure = save_figure(draw(cells_of(read_stored(stored)), speed_ups(times)), out / "structures.png")
    text = renewed(page.read_text(), stored, times, gpu)
    write_atomically(page, lambda file: file.write(text.encode()))
    return [stored, figure, page]


def read_stored(file: Path) -> list[StructureRun]:
    try:
        return [StructureRun(**values) for values in read_json(file)["runs"]]
    except (KeyError, TypeError) as error:
        raise TrainingError(f"Expected runs that `report-structures` stored, got {file}: {error!r}.") from error


def renewed(text: str, stored: Path, times: Path, gpu: Path) -> str:
    """The page with its tables as the files have them."""
    cells, faster = cells_of(read_stored(stored)), speed_ups(times)
    tables = {
        "seeds": seeds_in(cells),
        "scratch": scratch_table(cells, faster),
        "pruned": pruned_table(cells),
        "machine": machine_of(times),
        "gpu": gpu_table(read_json(gpu)["rows"]),
    }
    for name, table in tables.items():
        start, end = f"<!-- structures/{name} -->\n", f"<!-- end of structures/{name} -->"
        if start not in text or end not in text:
            raise TrainingError(f"Expected the marks {start.strip()} and {end} in the page of the structures.")
        before, rest = text.split(start, 1)
        text = before + start + table + end + rest.split(end, 1)[1]
    return text


def cells_of(runs: Sequence[StructureRun]) -> Cells:
    cells: Cells = defaultdict(list)
    for run in sorted(runs, key=lambda run: (ORDER.index(run.structure), run.sparsity, run.seed)):
        cells[run.structure, run.sparsity, run.pruned].append(run)
    return dict(cells)


def speed_ups(times: Path) -> Times:
    """Over the faster of the dense network's two layouts."""
    found: Times = defaultdict(dict)
    for row in read_json(times)["rows"] if times.is_file() else []:
        found[row["shape"], row["sparsity"]][row["pass"]] = row["speedup_over"]["dense"]
    return dict(found)


def machine_of(times: Path) -> str:
    if not times.is_file():
        return "Times were not measured yet.\n"
    machine = read_json(times)["machine"]
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return f"Times: {machine['processor']}, {machine['isa']}, {threads}, torch {machine['torch']}, float32.\n"


def seeds_in(cells: Cells) -> str:
    """How many seeds are in: the least and the most of a cell."""
    counts = [len(group) for group in cells.values()]
    least, most = min(counts, default=0), max(counts, default=0)
    seeds = f"{least}" if least == most else f"{least} to {most}"
    return f"{sum(counts)} runs are in, {seeds} seed{'s' if most > 1 else ''} a row.\n"


def accuracy_of(group: Sequence[StructureRun]) -> str:
    return spread_of([run.accuracy for run in group], 2)


def scratch_table(cells: Cells, faster: Times) -> str:
    """A row per sparsity and structure: accuracy, its difference to unstructured with the same seeds, and speed-ups."""
    columns = ["", "seeds", "accuracy %", "to unstructured", "training step", "forward", *SERVED]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    groups = [key for key in cells if not key[2]]
    for structure, sparsity, _ in sorted(groups, key=lambda key: (key[1], ORDER.index(key[0]))):
        group = cells[structure, sparsity, False]
        plain = {run.seed: run.accuracy for run in cells.get(("unstructured", sparsity, False), [])}
        differences = [run.accuracy - plain[run.seed] for run in group if run.seed in plain]
        less = f"{100 * statistics.fmean(differences):+.2f}" if differences and structure != "unstructured" else ""
        ratios = faster.get((structure.removesuffix(BY_SHARE), sparsity), {})
        cells_ = [f"**{ratios[name]:.1f}**" if name in ratios else "" for name in (STEP, FORWARD, *SERVED)]
        name = structure if structure == "dense" else f"{sparsity:.0%} {structure}"
        lines.append(f"| {name} | {len(group)} | {accuracy_of(group)} | {less} | {' | '.join(cells_)} |")
    return "\n".join(lines) + "\n"


def pruned_table(cells: Cells) -> str:
    """A row per sparsity and structure of networks that were pruned by magnitude, beside those from scratch."""
    columns = ["", "seeds", "pruned and fine-tuned %", "RigL from scratch %"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for structure, sparsity, pruned in sorted(cells, key=lambda key: (key[1], ORDER.index(key[0]))):
        if pruned:
            group, other = cells[structure, sparsity, True], cells.get((structure, sparsity, False), [])
            beside = accuracy_of(other) if other else ""
            lines.append(f"| {sparsity:.0%} {structure} | {len(group)} | {accuracy_of(group)} | {beside} |")
    return "\n".join(lines) + "\n"


def gpu_table(rows: Sequence[dict[str, Any]]) -> str:
    """Speed-up over dense of one linear layer on a GPU, by structure: forward, and forward with backward."""
    lines = ["| | forward | training step |", "|---|---|---|"]
    found: dict[str, dict[bool, str]] = defaultdict(dict)
    for row in rows:
        if any(row.get(name) != value for name, value in GPU_SHAPE.items()):
            continue
        block, kind, sparsity = row["block"], row["kind"], 1 - row["density"]
        structure = f"{block}x{block}" if block > 1 else "unstructured"
        found[f"{100 * sparsity:.3g}% {structure}, {kind}"][row["step"]] = f"**{row['times_dense']['ours']:.1f}**"
        if "torch 2:4 (50 %)" in row["times_dense"]:
            found[f"50% 2:4, {kind} (torch's)"][row["step"]] = f"**{row['times_dense']['torch 2:4 (50 %)']:.1f}**"
    for name, passes in sorted(found.items()):
        lines.append(f"| {name} | {passes.get(False, '')} | {passes.get(True, '')} |")
    return "\n".join(lines) + "\n"


def draw(cells: Cells, faster: Times) -> Figure:
    """Accuracy against the speed-up of a training step: a line per structure, a point per sparsity.

    The legend tells what is more than SHOWN points below the best.
    """
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    best = 100 * max((statistics.fmean(run.accuracy for run in group) for group in cells.values()), default=1.0)
    dense = cells.get(("dense", 0.0, False))
    if dense:
        axis.plot(1, 100 * statistics.fmean(run.accuracy for run in dense), "k*", markersize=12, label="dense")
    for structure in ORDER[1:]:
        timed = structure.removesuffix(BY_SHARE)
        points = [
            (faster[timed, sparsity][STEP], 100 * statistics.fmean(run.accuracy for run in group), sparsity)
            for (name, sparsity, pruned), group in sorted(cells.items())
            if name == structure and not pruned and STEP in faster.get((timed, sparsity), {})
        ]
        if points:
            style = "--" if structure != timed else "-"
            below = "".join(f", {s:.0%}: {y:.0f} %" for _, y, s in points if y < best - SHOWN)
            axis.plot([x for x, _, _ in points], [y for _, y, _ in points], style, marker="o", label=structure + below)
    axis.set(xlabel="speed-up of a training step over dense", ylabel="accuracy, %", ylim=(best - SHOWN, best + 0.3))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")
    return figure
