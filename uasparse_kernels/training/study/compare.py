"""`compare`: the runs of a suite, each a run of `fit` in its own folder; mean and spread over the seeds.

Resumable: a run with results.json is read, a run with last.pt goes on. Parallel: `jobs` processes of one thread each.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from uasparse_kernels.training import report
from uasparse_kernels.training.checkpoint import locked, write_json
from uasparse_kernels.training.config import FitConfig
from uasparse_kernels.training.data import TrainTest, check_unknown_names, unknown_name
from uasparse_kernels.training.errors import CheckpointError, NonFiniteLossError, OutOfTimeError, TrainingError
from uasparse_kernels.training.evaluate import check_scores, evaluate_checkpoint, load_data, read_results
from uasparse_kernels.training.run import fit, pick_device
from uasparse_kernels.training.study.statistics import (
    KNOWN_METRICS,
    SCALED_METRICS,
    check_settings,
    key_of,
    read_study,
    shared_settings,
)
from uasparse_kernels.training.study.suites import Run, Suite, plan
from uasparse_kernels.unknowns.scores import SCORES

MANY_ARMS = 16  # above, report-study is what shows a study


@dataclass(frozen=True)
class Outcome:
    """What came of a run: results, or why there are none."""

    results: dict[str, Any] | None = None
    failure: str = ""


def compare(
    suite: Suite,
    out_dir: Path,
    *,
    device: str = "auto",
    console: Console | None = None,
    data: TrainTest | None = None,
    jobs: int = 1,
    minutes: float = 0.0,
    stored: Path | None = None,
) -> dict[str, Any]:
    """Runs what a suite still lacks, writes out_dir/summary.json and comparison.png, and returns the summary.

    With `jobs` above 1, so many runs go at a time, each in a process of its own with one thread. After `minutes` (0: no
    limit) runs stop at the end of their epoch and go on in the next call; they are listed under "unfinished". A run
    whose loss is no longer finite is reported under "failed". Neither is in the means. `data` saves loading the data of
    suite.config again. Runs in `stored`, the JSON of report-study, are left out. Raises TrainingError if its settings
    are others.
    """
    console = console or Console()
    runs = plan(suite)
    if not runs:
        raise TrainingError("Expected at least one arm, one seed and one sparsity, got none.")
    if jobs < 1 or not 0 <= minutes < math.inf:
        raise TrainingError(f"Expected at least one job and no negative minutes, got {jobs} and {minutes}.")
    check_scores(suite.scores)
    for run in runs:
        check_unknown_names(run.unknowns)
    with locked(out_dir):
        return _compare(runs, suite, out_dir, device, console, data, jobs, minutes, stored)


def _compare(
    runs: Sequence[Run],
    suite: Suite,
    out_dir: Path,
    device: str,
    console: Console,
    data: TrainTest | None,
    jobs: int,
    minutes: float,
    stored: Path | None,
) -> dict[str, Any]:
    if stored is not None:
        study = read_study(stored)
        check_settings(shared_settings(suite.config), study.settings, stored)
        done = {row.key for row in study.rows}
        runs = [run for run in runs if key_of(run.config) not in done]
        console.print(f"{len(done)} runs are in {stored}, {len(runs)} are left.", highlight=False, soft_wrap=True)
    deadline = time.time() + 60 * minutes if minutes else math.inf
    if jobs > 1:
        outcomes = _run_parallel(runs, suite, out_dir, device, console, deadline, jobs)
    else:
        outcomes = _run_in_turn(runs, suite, out_dir, device, console, deadline, data)
    pairs = list(zip(runs, outcomes, strict=True))
    results = [(run, outcome.results) for run, outcome in pairs if outcome.results is not None]
    summary = {
        "unknown": list(dict.fromkeys(unknown_name(spec) for run in runs for spec in run.unknowns)),
        "arms": _by_arm(results),
        "failed": [f"{run.folder}: {outcome.failure}" for run, outcome in pairs if outcome.failure],
        "unfinished": [run.folder for run, outcome in pairs if outcome == Outcome()],
    }
    write_json(out_dir / "summary.json", summary)
    if summary["arms"] and suite.unknowns and len(summary["arms"]) <= MANY_ARMS:
        report.save_figure(report.comparison_bars(summary), out_dir / "comparison.png")
    return summary


def _run_in_turn(
    runs: Sequence[Run],
    suite: Suite,
    out_dir: Path,
    device: str,
    console: Console,
    deadline: float,
    data: TrainTest | None,
) -> list[Outcome]:
    clock = _Clock(runs, out_dir)
    outcomes = []
    for number, run in enumerate(runs, 1):
        console.print(
            f"[bold]\\[{number}/{len(runs)}] {run.label}, seed {run.config.seed}[/bold]{clock.left()}", highlight=False
        )
        shared = data if run.config.holdout == suite.config.holdout else None
        outcomes.append(_outcome(run, suite, out_dir, device, console, deadline, shared))
        if outcomes[-1].failure:
            console.print(f"[red]{outcomes[-1].failure}[/red]")
    return outcomes


def _run_parallel(
    runs: Sequence[Run], suite: Suite, out_dir: Path, device: str, console: Console, deadline: float, jobs: int
) -> list[Outcome]:
    """A bar over all epochs, counted in the runs' metrics.jsonl, and a line for each run that ends.

    A worker that is lost (killed, out of memory) is the failure of its run alone.
    """
    clock, outcomes = _Clock(runs, out_dir), [Outcome()] * len(runs)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    workers = [_Worker() for _ in range(min(jobs, len(runs)))]
    left, idle, number_of = list(reversed(range(len(runs)))), list(workers), dict[_Worker, int]()
    ended = 0
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=clock.total)
            while left or number_of:
                while left and idle:
                    worker, number = idle.pop(), left.pop()
                    run = runs[number]
                    with contextlib.suppress(OSError):  # a worker that is lost has no outcome, as below
                        worker.connection.send((run, suite, out_dir, device, None, deadline, None))
                    number_of[worker] = number
                ready = wait([worker.connection for worker in number_of], timeout=1.0)
                for worker in [worker for worker in number_of if worker.connection in ready]:
                    number = number_of.pop(worker)
                    outcomes[number] = worker.outcome()
                    if worker.process.is_alive():
                        idle.append(worker)
                    elif left:
                        workers.append(_Worker())
                        idle.append(workers[-1])
                    ended += 1
                    line = _ending(runs[number], outcomes[number])
                    console.print(f"\\[{ended}/{len(runs)}] {line}{clock.left()}", highlight=False)
                done = f"{ended}/{len(runs)} runs{clock.left()}"
                progress.update(bar, completed=clock.done(), description=done)
    finally:
        for worker in workers:
            worker.end()
    return outcomes


class _Worker:
    """A process of one thread that does one run after another, and ends when this process ends, however it does."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        # A Ctrl-C is for this process alone, which ends its workers; they would show where each was.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()

    def outcome(self) -> Outcome:
        """What came of the run that it was sent; its TrainingError is raised here."""
        try:
            outcome = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return Outcome(failure=f"Its process was lost ({how}); the same command goes on from its last epoch.")
        if isinstance(outcome, TrainingError):
            raise outcome
        return outcome

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()  # a run under way is left as a kill leaves it: at its last epoch
        self.process.join()


def _work(connection: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            task = connection.recv()
            outcome: Outcome | TrainingError
            try:
                outcome = _outcome(*task)
            except TrainingError as error:
                outcome = error
            except Exception as error:  # the others go on; fit.log has the traceback
                outcome = Outcome(failure=f"{type(error).__name__}: {error}")
            connection.send(outcome)


def _die_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _ending(run: Run, outcome: Outcome) -> str:
    name = f"{run.label}, seed {run.config.seed}: "
    if outcome.results is None:
        return name + (outcome.failure or "not finished, to be continued")
    known = outcome.results["known"]
    return name + f"accuracy {known['accuracy']:.2%}, ECE {known['ece']:.2%}"


class _Clock:
    """Counts the epochs of all runs, done before and now, and estimates the time for those left."""

    def __init__(self, runs: Sequence[Run], out_dir: Path) -> None:
        self.runs, self.out_dir = runs, out_dir
        self.total = sum(run.config.epochs for run in runs)
        self.start, self.done_before = time.monotonic(), self.done()

    def done(self) -> int:
        return sum(self._epochs(run) for run in self.runs)

    def left(self) -> str:
        done = self.done()
        new = done - self.done_before
        if new == 0 or done == self.total:
            return ""
        seconds = (time.monotonic() - self.start) / new * (self.total - done)
        return f", about {timedelta(seconds=round(seconds))} left"

    def _epochs(self, run: Run) -> int:
        folder = self.out_dir / run.folder
        if (folder / "results.json").is_file():
            return run.config.epochs
        lines = folder / "metrics.jsonl"
        return lines.read_bytes().count(b"\n") if lines.is_file() else 0


def _outcome(
    run: Run,
    suite: Suite,
    out_dir: Path,
    device: str,
    console: Console | None,
    deadline: float,
    data: TrainTest | None,
) -> Outcome:
    try:
        return Outcome(_run(run, suite, out_dir, device, console or Console(quiet=True), deadline, data))
    except NonFiniteLossError as error:
        return Outcome(failure=str(error))
    except OutOfTimeError:
        return Outcome()


def _run(
    run: Run, suite: Suite, out_dir: Path, device: str, console: Console, deadline: float, data: TrainTest | None
) -> dict[str, Any]:
    folder, start = out_dir / run.folder, out_dir / run.start_folder if run.start_folder else None
    file = folder / "results.json"
    if not file.is_file():
        if time.time() > deadline or (start is not None and not (start / "results.json").is_file()):
            raise OutOfTimeError("Not begun.")
        return fit(
            run.config, folder, unknowns=run.unknowns, scores=suite.scores, resume=True, device=device,
            console=console, data=data or _load(run.config), deadline=deadline, lean=suite.lean, start=start,
        )  # fmt: skip
    results = read_results(file)
    differences = FitConfig.from_dict(results["config"]).differences(run.config)
    if differences:
        raise CheckpointError(f"{folder} holds a run with other settings: {'; '.join(differences)} (there and here).")
    wanted = set(run_scores(results, suite.scores))
    has_all = all(wanted <= set(results["unknown"].get(unknown_name(spec), ())) for spec in run.unknowns)
    if has_all and results["known"].keys() >= set(SCALED_METRICS):
        console.print("finished before, read")
        return results
    console.print("trained before, evaluated again")
    judged = evaluate_checkpoint(folder, run.unknowns, device=pick_device(device), scores=suite.scores)
    results |= judged.results
    write_json(file, results)
    return results


def _load(config: FitConfig) -> TrainTest:
    """The data of a config, kept for the next run that has the same."""
    names = ("data", "data_dir", "holdout", "image_size", "limit_train", "validation")
    return _load_cached(FitConfig(**{name: getattr(config, name) for name in names}))


@lru_cache(maxsize=1)
def _load_cached(config: FitConfig) -> TrainTest:
    return load_data(config)


def run_scores(results: dict[str, Any], scores: Sequence[str]) -> list[str]:
    """Those of `scores` that the run's network can give: with K outputs it has none for "unknown"."""
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
    if summary["unknown"] and 0 < len(arms) <= MANY_ARMS:
        console.print(auroc_table(summary))
    for line in summary["failed"]:
        console.print(f"[red]failed: {line}[/red]")
    if summary["unfinished"]:
        console.print(f"{len(summary['unfinished'])} runs are not finished: the same command goes on with them.")


def auroc_table(summary: dict[str, Any], scores: Sequence[str] | None = None) -> Table:
    """AUROC in percent (unknown is positive): a row per arm and score, a column per OOD set, and their mean."""
    table = Table(title="Unknown images: AUROC %")
    table.add_column("arm")
    table.add_column("score")
    for name in (*summary["unknown"], "mean"):
        table.add_column(name, justify="right")
    for label, arm in summary["arms"].items():
        names = [s for s in arm["mean_auroc"] if scores is None or s in scores]
        for row, score in enumerate(names):
            cells = [
                show(arm["unknown"][s][score]["auroc"], len(arm["seeds"]), 100, 1) if s in arm["unknown"] else ""
                for s in summary["unknown"]
            ]
            mean = show(arm["mean_auroc"][score], len(arm["seeds"]), 100, 1)
            table.add_row(label if row == 0 else "", score, *cells, mean, end_section=row == len(names) - 1)
    return table


def show(cell: dict[str, Any], num_seeds: int, scale: float, digits: int = 2) -> str:
    mean = f"{cell['mean'] * scale:.{digits}f}"
    return f"{mean} ± {cell['std'] * scale:.{digits}f}" if num_seeds > 1 else mean
