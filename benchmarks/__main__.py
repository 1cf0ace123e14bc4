"""Runs suites of benchmarks: prints a table of each, and writes its JSON and its plot.

python -m benchmarks linear conv        these two
python -m benchmarks all                all suites of the CPU but models: some hours
python -m benchmarks linear --folder benchmarks/results/avx2    kept, and shown, apart from those of another machine
"""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import uasparse_kernels as ua
from benchmarks import harness, overview, plots

SUITES = {
    "linear": "bench_masked_linear",
    "conv": "bench_masked_conv2d",
    "conv-bf16": "bench_masked_conv2d_bf16",
    "step": "bench_step",
    "networks": "bench_networks",
    "profile": "bench_profile",
    "compile": "bench_compile",
    "memory": "bench_memory",
    "threads": "bench_threads",
    "prune-grow": "bench_prune_grow",
    "loss": "bench_unknown_aware_loss",
    "batch-norm": "bench_batch_norm",
    "recipe": "bench_recipe",
    "serve": "bench_serve",
    "serve-memory": "bench_serve_memory",
    "serve-threads": "bench_serve_threads",
    "init": "bench_init",
    "structures": "bench_structures",
    "distributed": "bench_distributed",
    "models": "bench_models",
}
ON_DEMAND = {"models"}  # no speeds
HELP = (
    "Measures suites, prints a table of each, and writes its JSON and its plot. A suite takes minutes (networks half "
    "an hour): the machine should do nothing else meanwhile."
)


def main(
    suites: Annotated[
        list[str], typer.Argument(help=f"Of: {', '.join(SUITES)}; all: these but {', '.join(ON_DEMAND)}, some hours.")
    ],
    seconds: Annotated[float, typer.Option(help="Time for each variant of a row, about.", min=0)] = 1.0,
    threads: Annotated[int, typer.Option(help="Threads, except in the suite of that name.", min=1)] = 1,
    folder: Annotated[
        Path, typer.Option(help="Where JSON and plots go. Into the default, a checkout's stored figures are replaced.")
    ] = harness.RESULTS,
) -> None:
    unknown = sorted(set(suites) - SUITES.keys() - {"all"})
    if unknown:
        raise typer.BadParameter(f"Expected suites of {', '.join(SUITES)}, or all, got {', '.join(unknown)}.")
    if "all" in suites:
        suites = [name for name in SUITES if name not in ON_DEMAND]
    # What could not run, or be kept, is told before anything is measured.
    try:
        modules = {suite: import_module(f"benchmarks.{SUITES[suite]}") for suite in suites}
    except ModuleNotFoundError as error:
        extras = "-e '.[benchmark,training,serve-rivals]'"
        raise SystemExit(f"{error}: pip install --no-build-isolation {extras} brings what suites need.") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise typer.BadParameter(f"Expected a folder that can be written, got {folder}: {error}.") from error
    # As `python -m training` does, for the rivals too: else new pages can cost as much as a kernel.
    ua.keep_freed_memory()
    for suite in suites:
        harness.pin(None if suite in ("threads", "networks") else threads)  # these use both cores
        torch.set_num_threads(threads)
        print(f"\n{suite}, {threads} thread{'s' if threads > 1 else ''}", flush=True)
        roofs = {}
        if suite != "serve-memory":  # which times nothing, and may run on a busy machine
            roofs = {"matmul_gflops": harness.matmul_roof(), "copy_gb_per_s": harness.copy_roof()}
        rows: list[dict[str, Any]] = modules[suite].run(seconds)
        for row in rows:
            if "gflops" in row:
                row["of_roof"] = row["gflops"] / roofs["matmul_gflops"]
        path = harness.save(suite, rows, folder, roofs=roofs)
        plots.table(suite, rows)
        written = [path, *plots.draw(suite, rows, folder)]
        if name := harness.table_name(path):
            written += [page for page in harness.PAGES if plots.insert(name, plots.markdown(rows), page)]
            if name in (overview.TRAIN, overview.SERVE):
                overview.draw(overview.overview())
                plots.insert("overview", overview.markdown(overview.overview()), harness.PAGES[0])
                written.append(overview.PICTURE)
        print("written:", *written)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=HELP, no_args_is_help=True)(main)
    app()
