"""Command line: python -m training fit | evaluate | export | predict | compare | demo, and reports on studies."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.console import Console
from rich.table import Table

from uasparse_kernels.training import report
from uasparse_kernels.training.checkpoint import write_json
from uasparse_kernels.training.config import ARM_PARTS, PLAIN_ARM, FitConfig, arm_settings
from uasparse_kernels.training.data import UNKNOWN_HELP
from uasparse_kernels.training.demo import demo
from uasparse_kernels.training.errors import TrainingError
from uasparse_kernels.training.evaluate import evaluate_checkpoint
from uasparse_kernels.training.export import export_run
from uasparse_kernels.training.predict import SCORES as EXPORT_SCORES
from uasparse_kernels.training.predict import load_export
from uasparse_kernels.training.processes import joined
from uasparse_kernels.training.run import fit, pick_device
from uasparse_kernels.training.study.claims import OURS, OURS_ARM, PUBLISHED
from uasparse_kernels.training.study.compare import compare, print_summary
from uasparse_kernels.training.study.mixture import REGIONS, mixture
from uasparse_kernels.training.study.report import write_study
from uasparse_kernels.training.study.statistics import judge, read_study
from uasparse_kernels.training.study.structures import write_structures
from uasparse_kernels.training.study.suites import SUITES, Suite, changed
from uasparse_kernels.unknowns.scores import SCORES

HELP = (
    "Trains image classifiers, sparse by default, that know unknown images: fit, then evaluate, export and predict. "
    "compare runs several methods and seeds. COMMAND --help tells the options."
)
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=HELP)
console = Console()

Ood = Annotated[list[str], typer.Option("--ood", help=f"OOD set, may be given several times: {UNKNOWN_HELP}.")]
ScoreNames = Annotated[list[str], typer.Option("--score", help=f"Scores; all by default: {', '.join(SCORES)}.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")]


def with_config(**fixed: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for every field of FitConfig but the `fixed` ones; hands all over as one `config`.

    If the command has an option `arm` that is one name (and so a `ctx`), this sets what it names.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(FitConfig)
        chosen = [f for f in fields(FitConfig) if f.name not in fixed]

        @wraps(command)
        def run(**arguments: Any) -> None:
            values = {f.name: arguments.pop(f.name) for f in chosen}
            if isinstance(arm := arguments.get("arm"), str) and arm:
                named = arm_settings(arm)
                if twice := [name for name in named if _is_given(arguments["ctx"], name)]:
                    options = ", ".join("--" + name.replace("_", "-") for name in twice)
                    raise TrainingError(f"Expected --arm {arm} or options that it sets, got both: {options}.")
                values |= named
            command(config=FitConfig(**values, **fixed), **arguments)

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "config"]
        options = [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=f.default,
                annotation=Annotated[hints[f.name], typer.Option(help=f.metadata["help"], rich_help_panel="Settings")],
            )
            for f in chosen
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + options
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__  # type: ignore[attr-defined]  # typer would look behind it
        return run

    return decorate


@app.command("fit")
@with_config()
def fit_command(
    ctx: typer.Context,
    config: FitConfig,
    arm: Annotated[
        str,
        typer.Option(
            help="Method, loss, vote and synthetic unknowns by one name; this project's variant: "
            f"rigl+{OURS_ARM}. Without it: the published method, rigl+moon+vote, with what other options change."
        ),
    ] = "",
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/fit"),
    start: Annotated[
        Path | None,
        typer.Option(help="A finished run to start from: its weights of largest magnitude stay, and are fine-tuned."),
    ] = None,
    ood: Ood = [],  # noqa: B006
    score: ScoreNames = [],  # noqa: B006
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the folder's last checkpoint, with the same settings.")
    ] = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Train one network, evaluate it, and draw the figures.

    On several processes: torchrun --nproc-per-node N -m training fit ...
    """
    _set_threads(threads)
    with joined(device) as device:
        results = fit(
            config, out, unknowns=ood, scores=score or None, resume=resume, device=device, console=console, start=start
        )
    if results:  # of the first process
        _print_results(results, config.arm)
        console.print(f"Run folder: {out}", soft_wrap=True)


@app.command("evaluate")
def evaluate_command(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder, or the model.pt in it.")],
    ood: Ood = [],  # noqa: B006
    score: ScoreNames = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and figures; default none.")] = None,
    data_dir: Annotated[str, typer.Option(help="Folder of downloaded data sets; default that of the run.")] = "",
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Evaluate a trained network against any OOD sets."""
    _set_threads(threads)
    judged = evaluate_checkpoint(checkpoint, ood, data_dir=data_dir, device=pick_device(device), scores=score or None)
    _print_results(judged.results, str(checkpoint))
    if out is not None:
        write_json(out / "evaluation.json", judged.results)
        paths = report.draw_run(out, (), judged)
        console.print(f"Written: {', '.join(map(str, [out / 'evaluation.json', *paths]))}", soft_wrap=True)


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="A run folder, or the model.pt in it.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the export; default RUN/export.")] = None,
    score: Annotated[
        str,
        typer.Option(
            help=f"The score that calls images unknown: {', '.join(EXPORT_SCORES)}. Default: u if the run had "
            "synthetic unknowns, else energy."
        ),
    ] = "",
    onnx: Annotated[bool, typer.Option(help="Write an ONNX file too.")] = True,
    data_dir: Annotated[str, typer.Option(help="Folder of downloaded data sets; default that of the run.")] = "",
    threads: Threads = 0,
) -> None:
    """Write a trained network for use: optimised, as safetensors, as ONNX, and what turns its outputs into answers."""
    _set_threads(threads)
    folder, about = export_run(run, out, score=score, onnx=onnx, data_dir=data_dir)
    console.print(
        f"{about.accuracy:.1%} of {about.test_images} test images right, {about.test_accepted:.1%} accepted as known "
        f"by {about.score}; temperature {about.temperature:.3g}",
        highlight=False,
        soft_wrap=True,
    )
    if about.tuned_on == "test":
        console.print(
            "Threshold and temperature were found on the test images, as the run kept no others: expect a little less "
            "on new images. fit --validation 0.1 keeps a tenth of the training images for them.",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"Written: {folder}", soft_wrap=True)


@app.command("predict")
def predict_command(
    run: Annotated[Path, typer.Argument(help="The folder of an export, or of the run that has one.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, scores included.")] = False,
    threads: Threads = 0,
) -> None:
    """Print file, class, confidence and "unknown" for image files, by a network that export wrote."""
    _set_threads(threads)
    rows = load_export(run).files(images)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        unknown = ["unknown"] if row["unknown"] else []
        print(row["file"], row["class"], f"{row['confidence']:.3f}", *unknown, sep="\t")


@app.command("compare")
@with_config(**PLAIN_ARM, sparsity=0.9, seed=0)  # set by --arm, --sparsity and --seeds
def compare_command(
    ctx: typer.Context,
    config: FitConfig,
    suite: Annotated[
        str, typer.Option(help=f"A prepared study: {', '.join(SUITES)}. Options that are given change it; --ood adds.")
    ] = "",
    arm: Annotated[
        list[str],
        typer.Option(
            help="Method, may be given several times; parts joined by +: "
            + ", ".join(part for tokens in ARM_PARTS.values() for part in tokens)
        ),
    ] = ["rigl", "rigl+vote", "rigl+moon+vote", "rigl+vote+patch-shuffle"],  # noqa: B006
    seeds: Annotated[int, typer.Option(help="Seeds 0 to N-1.")] = 3,
    sparsity: Annotated[list[float], typer.Option(help="May be given several times.")] = [0.9],  # noqa: B006
    ood: Ood = [],  # noqa: B006
    score: ScoreNames = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Folder of the study; default runs/compare or runs/SUITE.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each; 0: as many as cores, 1 on a GPU.")] = 1,
    minutes: Annotated[float, typer.Option(help="Stop then; the same command goes on later. 0: no limit.")] = 0.0,
    stored: Annotated[
        Path | None, typer.Option(help="JSON of report-study: runs in it count as done and are left out here.")
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Train several methods with several seeds; mean and spread. Goes on where it was stopped."""
    _set_threads(threads)
    if suite and suite not in SUITES:
        raise TrainingError(f"Unknown suite {suite!r}. Expected one of {', '.join(SUITES)}.")
    study = Suite(config, tuple(arm), tuple(ood), tuple(range(seeds)), tuple(sparsity), tuple(score or SCORES))
    if suite:
        study = changed(SUITES[suite], study, {name for name in ctx.params if _is_given(ctx, name)})
    out = out or Path("runs") / (suite or "compare")
    jobs = jobs or (1 if pick_device(device).type == "cuda" else len(os.sched_getaffinity(0)))
    summary = compare(study, out, device=device, console=console, jobs=jobs, minutes=minutes, stored=stored)
    print_summary(summary, console)
    console.print(f"Written: {out / 'summary.json'}", soft_wrap=True)


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command("report-study")
def report_study_command(
    folder: Annotated[Path, typer.Option(help="Folder of the study, or the JSON that this wrote before.")],
    out: Annotated[Path, typer.Option(help="Folder of page, figures and numbers.")] = Path("docs/evidence"),
) -> None:
    """Verdicts, tables and figures of a study, from its stored runs."""
    written = write_study(folder, out)
    rows = read_study(next(path for path in written if path.suffix == ".json")).rows
    for title, claims in (("The published method", PUBLISHED), ("This project's variant", OURS)):
        console.print(f"[bold]{title}[/bold]")
        for judgement in judge(claims, rows):
            console.print(f"  {judgement.verdict:>13}: {judgement.claim.text}", highlight=False, soft_wrap=True)
    for path in written:
        console.print(f"Written: {path}", soft_wrap=True)


@app.command("report-structures")
def report_structures_command(
    folder: Annotated[
        Path | None, typer.Option(help="Folder of `compare --suite structures`; without, from what is stored.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of numbers and figure.")] = Path("docs/evidence"),
    times: Annotated[Path, typer.Option(help="JSON of `python -m benchmarks structures`.")] = Path(
        "benchmarks/results/zen5/structures.json"
    ),
    gpu: Annotated[Path, typer.Option(help="JSON of `python -m benchmarks.gpu linear`.")] = Path(
        "benchmarks/results/h200/gpu-linear.json"
    ),
    page: Annotated[Path, typer.Option(help="The page whose tables are renewed.")] = Path("docs/structures.md"),
) -> None:
    """What each structure costs in accuracy and gives in time: the tables of a page, and a figure."""
    for path in write_structures(folder, out, times, gpu, page):
        console.print(f"Written: {path}", soft_wrap=True)


@app.command("mixture")
def mixture_command(
    out: Annotated[Path, typer.Option(help="Folder of figure and numbers.")] = Path("runs/mixture"),
    seeds: Annotated[int, typer.Option(help="Seeds 0 to N-1.", min=1)] = 3,
) -> None:
    """Gaussian classes in the plane: confidence on points of no class against the loss's alpha. Half a minute."""
    torch.set_num_threads(1)  # networks of 32 units
    table = Table(title="Mean confidence (and u), seeds averaged")
    for column in ("alpha", *REGIONS, "accuracy %"):
        table.add_column(column, justify="right")
    for row in mixture(out, seeds=range(seeds)):
        cells = [f"{fmean(row['confidence'][r]):.3f} ({fmean(row['u'][r]):.4f})" for r in REGIONS]
        table.add_row(f"{row['alpha']:g}", *cells, f"{100 * fmean(row['accuracy']):.1f}")
    console.print(table)
    console.print(f"Written: {out / 'mixture.png'}, {out / 'mixture.json'}", soft_wrap=True)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/demo"),
    device: Device = "auto",
) -> None:
    """Fashion-MNIST at 90 % sparsity: speed beside dense, accuracy, and which unknown images are found."""
    demo(out, device=device, console=console)


def _print_results(results: dict[str, Any], title: str) -> None:
    console.print(report.known_table([(title, results["known"])]))
    if results["unknown"]:
        console.print(report.detection_table(results))
    if "cost" in results:
        console.print(report.cost_line(results["cost"]), highlight=False, soft_wrap=True)


def _set_threads(threads: int) -> None:
    if not 0 <= threads < 1 << 16:
        raise TrainingError(f"Expected threads from 0 (torch's choice), got {threads}.")
    if threads > 0:
        torch.set_num_threads(threads)


def main() -> None:
    """Runs the command line; an error is one message, and exit code 1.

    Errors that the user can repair say how. The traceback of any other goes to the run's fit.log if there is one,
    and to the screen if $UASPARSE_DEBUG is set.
    """
    to_console = logging.StreamHandler()
    to_console.setLevel(logging.WARNING)  # what is below goes to the run's fit.log
    logging.basicConfig(handlers=[to_console])
    try:
        app()
    except Exception as error:
        if os.environ.get("UASPARSE_DEBUG"):
            raise
        text = str(error)
        if not isinstance(error, TrainingError):
            text = f"{type(error).__name__}: {error}. UASPARSE_DEBUG=1 shows where, as does the fit.log of a run."
        Console(stderr=True).print("[red]error:[/red]", end=" ")
        Console(stderr=True).print(text, soft_wrap=True, highlight=False, markup=False)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
