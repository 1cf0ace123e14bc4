"""Draws the GPU suites' results: ``python -m benchmarks.gpu_plots [--folder DIR]`` makes a PNG beside each JSON, and
brings the tables in the pages up to date that show them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import harness, plots

SUITES = ("gpu-linear", "gpu-conv", "gpu-step", "gpu-small")
_NOT_A_PANEL = ("density", "ms", "times_dense", "roof_ms", "of_roof", "error", "error_dense", "peak_bytes")


def panels(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By cell (all but density), by variant: (sparsity, times dense) in rising sparsity."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        name = ", ".join(f"{key} {value}" for key, value in row.items() if key not in _NOT_A_PANEL)
        for variant, times in row["times_dense"].items():
            if variant != "dense" and not math.isnan(times):
                found[name][variant].append((1 - row["density"], times))
        found[name]["roof"].append((1 - row["density"], row["ms"]["dense"] / row["roof_ms"]))
    return {name: {v: sorted(points) for v, points in lines.items()} for name, lines in found.items()}


def draw(suite: str, folder: Path) -> Path:
    """A panel a cell: speed over dense against sparsity, a line a variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    content = json.loads((folder / f"{suite}.json").read_text())
    cells = panels(content["rows"])
    columns = min(4, len(cells))
    rows = math.ceil(len(cells) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.5 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(cells) :]:
        axis.axis("off")
    for axis, (name, lines) in zip(axes.flat, cells.items(), strict=False):
        for variant, points in lines.items():
            style = "k:" if variant == "roof" else "o-"
            axis.plot([100 * x for x, _ in points], [y for _, y in points], style, label=variant, markersize=4)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_title(name, fontsize=7)
        axis.set_yscale("log", base=2)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6)
    figure.supxlabel("sparsity, %")
    figure.supylabel("times dense")
    figure.suptitle(f"{suite}, {content['machine']['gpu']}")
    figure.tight_layout()
    path = folder / f"{suite}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=harness.RESULTS)
    folder = parser.parse_args().folder
    for path in folder.glob("gpu-*.json"):
        name, rows = harness.table_name(path), json.loads(path.read_text()).get("rows", [])
        for page in harness.PAGES if name else ():
            plots.insert(name, plots.markdown(rows), page)
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no matplotlib here: draw later by python -m benchmarks.gpu_plots --folder {folder}")
        return
    for suite in SUITES:
        if (folder / f"{suite}.json").exists():
            print(draw(suite, folder))


if __name__ == "__main__":
    main()
