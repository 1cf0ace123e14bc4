"""Tables in the terminal and plots of speed-up against sparsity, from the rows of a suite.

python -m benchmarks.plots    puts the tables of all stored results into the pages, and draws the overview
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import harness, overview

Rows = Sequence[dict[str, Any]]


def table(suite: str, rows: Rows) -> None:
    """Prints the rows: time, speed-up over each rival, GFLOP/s on nonzeros, percent of the roof."""
    if rows and "verdict" in rows[0]:
        print(markdown(rows))
    compared = [row for row in rows if "speedup_over" in row]
    if not compared:
        return
    rivals = list(dict.fromkeys(name for row in compared for name in row["speedup_over"]))
    shown = Table(title=suite)
    for name in ("shape", "pass", "sparsity", "ms", *(f"x {rival}" for rival in rivals), "GFLOP/s", "% of roof"):
        shown.add_column(name, justify="left" if name in ("shape", "pass") else "right")
    for row in compared:
        speedups = (f"{row['speedup_over'][r]:.2f}" if r in row["speedup_over"] else "" for r in rivals)
        rates = (f"{row['gflops']:.0f}", f"{row['of_roof']:.0%}") if "gflops" in row else ("", "")
        shown.add_row(
            row["shape"], row["pass"], f"{row['sparsity']:.0%}", f"{row['ms']['ours']:.3g}", *speedups, *rates
        )
    Console(width=140).print(shown)


def markdown(rows: Rows) -> str:
    """Speed-up over dense (and over each other rival) by shape and sparsity, as the README shows it; of the suite
    recipe what each arm costs, of init the accuracies, and of models what became sparse.
    """
    if rows and "verdict" in rows[0]:
        return _verdicts(rows)
    if rows and "more_time" in rows[0]:
        return _costs(rows)
    if rows and "part" in rows[0]:
        return _parts(rows)
    if rows and "accuracy" in rows[0]:
        return _accuracies(rows)
    if rows and "minutes_of_100_epochs" in rows[0]:
        return _trainings(rows)
    if rows and {"roof_ms", "mode"} & rows[0].keys():
        if "times_dense" not in rows[0]:
            return _gpu_ratios(rows)
        rows = [_gpu_speedups(row) for row in rows if row["ms"]["dense"] > 0]
    compared = [row for row in rows if "speedup_over" in row and row["sparsity"] >= 0.5]
    levels = sorted({row["sparsity"] for row in compared})
    lines = ["| | " + " | ".join(f"{100 * level:.3g}%" for level in levels) + " |", "|---" * (len(levels) + 1) + "|"]
    for shape, kind in dict.fromkeys((row["shape"], row["pass"]) for row in compared):
        cells = {}
        for row in compared:
            if (row["shape"], row["pass"]) == (shape, kind):
                dense, *others = row["speedup_over"].values()
                more = f" ({', '.join(f'{value:.1f}' for value in others)})" if others else ""
                cells[row["sparsity"]] = f"**{dense:.1f}**{more}"
        lines.append(f"| {shape} {kind} | " + " | ".join(cells.get(level, "") for level in levels) + " |")
    return "\n".join(lines) + "\n"


def _costs(rows: Rows) -> str:
    lines = ["| network | arm | ms a step | more time | more memory |", "|---|---|---|---|---|"]
    for row in rows:
        for arm, ms in row["ms"].items():
            more = [f"{row[name][arm]:+.1%}" if arm in row[name] else "" for name in ("more_time", "more_memory")]
            lines.append(f"| {row['shape']} | {arm} | {ms:.3g} | {' | '.join(more)} |")
    return "\n".join(lines) + "\n"


def _parts(rows: Rows) -> str:
    """Of the suite profile a line for each part, with time, bytes moved and the time of a copy of as many."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lines = ["| | " + " | ".join(f"{name}, ms | MB | copied in ms" for name in networks) + " |"]
    lines.append("|---" * (3 * len(networks) + 1) + "|")
    found = {(row["network"], row["part"]): row for row in rows}
    for part in dict.fromkeys(row["part"] for row in rows):
        cells = [part]
        for network in networks:
            row = found.get((network, part), {})
            cells += [f"{row[key]:.{digits}f}" if key in row else "" for key, digits in _DIGITS.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


_DIGITS = {"ms": 1, "mb": 0, "copy_ms": 1}


def _accuracies(rows: Rows) -> str:
    scales = list(rows[0]["accuracy"])
    lines = ["| network | sparsity | " + " | ".join(scales) + " |", "|---" * (len(scales) + 2) + "|"]
    for row in rows:
        cells = (", ".join(f"{value:.3f}" for value in row["accuracy"][scale]) for scale in scales)
        lines.append(f"| {row['shape']} | {row['sparsity']:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _verdicts(rows: Rows) -> str:
    lines = ["| network | all works | sparse layers | share of weights | sparsity | what stays dense |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        dense = [f"{reason} ({share:.1%})" for reason, share in row.get("dense", {}).items() if share >= 0.01]
        shares = [f"{row[name]:.1%}" if name in row else "" for name in ("covered", "sparsity")]
        cells = (row["shape"], row["verdict"], str(row.get("layers", "")), *shares, "; ".join(dense))
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _gpu_speedups(row: dict[str, Any]) -> dict[str, Any]:
    """A row of gpu-linear, gpu-conv or gpu-step as the CPU suites have them: over dense, and torch's BSR or CSR."""
    if "tokens" in row:
        shape = f"{row['tokens']}x{row['inp']}x{row['out']}"
    elif "channels" in row:
        shape = f"256x{row['channels']}@{row['size']} 3x3" + ("/2" if row["stride"] == 2 else "")
    else:
        shape = f"{row['model']}, {row['batch']}" + (f", compiled ({row['mode']})" if "mode" in row else "")
    block = f"{row['block']}x{row['block']}" if row["block"] > 1 else "unstructured"
    rivals = [name for name in ("dense", "torch BSR", "torch CSR") if row["ms"].get(name, math.nan) > 0]
    return {
        "shape": f"{shape}, {row['kind']}, {block},",
        "pass": "step" if row["step"] else "forward",
        "sparsity": 1 - row["density"],
        "speedup_over": {name: row["ms"][name] / row["ms"]["ours"] for name in rivals},
    }


def _gpu_ratios(rows: Rows) -> str:
    """Rows of gpu-topk and gpu-loss: microseconds, and how many times faster than each rival."""
    names = list(rows[0]["times_faster_than"])
    lines = ["| | us | " + " | ".join(f"over {name}" for name in names) + " |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        what = (
            f"{row['n']} x {row['classes']} {row['kind']}"
            if "classes" in row
            else f"{row['share']:.0%} of {row['n']:.2g}"
        )
        what += f", {row['layers']} layers at once" if row.get("layers", 1) > 1 else ""
        ratios = " | ".join(f"{row['times_faster_than'][name]:.2f}" for name in names)
        lines.append(f"| {what} | {1e3 * row['ms']['ours']:.1f} | {ratios} |")
    return "\n".join(lines) + "\n"


def _trainings(rows: Rows) -> str:
    lines = ["| runs at once | | ms a step of each | images/s | minutes for 100 epochs of all |", "|---" * 5 + "|"]
    for row in rows:
        ms, minutes = row["ms"]["step"], row["minutes_of_100_epochs"]
        lines.append(f"| {row['runs']} | {row['mode']} | {ms:.2f} | {row['images_per_second']:.0f} | {minutes:.1f} |")
    return "\n".join(lines) + "\n"


def insert(suite: str, text: str, page: Path) -> bool:
    """Puts a table between the marks of its suite in a page, where it has them; whether it has."""
    start, end = f"<!-- {suite} -->\n", f"<!-- end of {suite} -->"
    content = page.read_text()
    if start not in content or end not in content:
        return False
    before, rest = content.split(start, 1)
    page.write_text(before + start + text + end + rest.split(end, 1)[1])
    return True


def insert_stored(page: Path) -> None:
    """Puts the tables of all stored results into a page, each where the page has its marks."""
    for file in harness.RESULTS.rglob("*.json"):
        insert(harness.table_name(file), markdown(json.loads(file.read_text()).get("rows", [])), page)
    insert("overview", overview.markdown(overview.overview()), page)


def draw(suite: str, rows: Rows, folder: Path) -> list[Path]:
    """Speed-up over dense against sparsity, a panel for each shape and a line for each rival, where there are several
    sparsities a shape; returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "speedup_over" in row:
            panels.setdefault((row["shape"], row["pass"]), []).append(row)
    panels = {key: found for key, found in panels.items() if len(found) > 2}
    if not panels:
        return []
    columns = 4
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 2.9 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, ((shape, kind), found) in zip(axes.flat, panels.items(), strict=False):
        found = sorted(found, key=lambda row: row["sparsity"])
        names = [n for n in found[-1]["ms"] if not n.startswith("dense")]
        for name in sorted(names, key=lambda n: n != "ours"):
            points = [(_place(row), _dense(row) / row["ms"][name]) for row in found if name in row["ms"]]
            style = {"linewidth": 2.2, "color": "black"} if name == "ours" else {"linewidth": 1.2}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
        axis.axhline(1, color="gray", linewidth=0.8, linestyle="--")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}x")
        # Those between 0 and 50 % would write over each other.
        ticks = {_place(row): f"{row['sparsity']:.0%}" for row in found if not 0 < row["sparsity"] < 0.5}
        axis.set_xticks(list(ticks), list(ticks.values()), fontsize=7)
        axis.set_title(f"{shape}, {kind}", fontsize=9)
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("sparsity (active weights halve at equal steps)", fontsize=9)
    figure.supylabel("speed-up over dense", fontsize=9)
    figure.tight_layout()
    path = folder / f"{suite}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def _place(row: dict[str, Any]) -> float:
    import math

    return -math.log2(1 - row["sparsity"])


def _dense(row: dict[str, Any]) -> float:
    return min(ms for name, ms in row["ms"].items() if name.startswith("dense"))


if __name__ == "__main__":
    overview.draw(overview.overview())
    for page in harness.PAGES:
        insert_stored(page)
