"""`fit`: one training run in one folder, from the data to the figures.

The folder holds config.json, last.pt (to resume), model.pt (the result), metrics.jsonl (a line per
epoch), results.json, scores.npz (the raw scores), fit.log and the figures; during the run also .lock, which keeps other
processes out.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

import uasparse_kernels as ua
from uasparse_kernels.training import report
from uasparse_kernels.training.checkpoint import (
    load_checkpoint,
    locked,
    read_json,
    save_checkpoint,
    write_atomically,
    write_json,
)
from uasparse_kernels.training.config import FitConfig
from uasparse_kernels.training.cost import training_cost
from uasparse_kernels.training.data import TrainTest, load_unknown_sets
from uasparse_kernels.training.errors import CheckpointError, NonFiniteLossError, OutOfTimeError, TrainingError
from uasparse_kernels.training.evaluate import (
    Evaluation,
    check_scores,
    config_in,
    evaluate,
    load_data,
    load_model,
    read_results,
)
from uasparse_kernels.training.metrics import classification_metrics
from uasparse_kernels.training.processes import is_first, wait_for_all
from uasparse_kernels.training.recipe import Trainer
from uasparse_kernels.unknowns.scores import collect

log = logging.getLogger("uasparse_kernels.training")


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the GPU if there is one. Raises TrainingError for a device that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = {"auto": "cuda" if count else "cpu", "cpu": "cpu"}
    there |= {"cuda": "cuda"} | {f"cuda:{n}": f"cuda:{n}" for n in range(count)} if count else {}
    if name not in there:
        raise TrainingError(f"Expected a device of {', '.join(there)} on this machine, got {name!r}.")
    return torch.device(there[name])


def fit(
    config: FitConfig,
    run_dir: Path,
    *,
    unknowns: Sequence[str] = (),
    scores: Sequence[str] | None = None,
    resume: bool = False,
    device: str = "auto",
    console: Console | None = None,
    data: TrainTest | None = None,
    deadline: float = math.inf,
    lean: bool = False,
    start: Path | None = None,
) -> dict[str, Any]:
    """Trains, evaluates and draws; returns what results.json holds.

    With `resume`, goes on from run_dir/last.pt if there is one. Without, a folder that holds a run is an error.
    `data` saves loading it again. After `deadline` (a value of time.time()) it stops at the end of the epoch:
    OutOfTimeError.
    `lean` leaves out figures and raw scores, and last.pt once the run is finished. Raises TrainingError;
    NonFiniteLossError leaves the last good checkpoint. Of several processes all train, and the first does the rest; the
    others return nothing. `start` is the folder (or model.pt) of a finished run: training starts from its network, of
    which the weights of largest magnitude stay.
    """
    console = (console or Console()) if is_first() else Console(quiet=True)
    ua.keep_freed_memory()
    data = data or load_data(config)
    if (data.validation is not None) != (config.validation > 0):
        raise TrainingError(
            f"Expected data as validation={config.validation:g} splits them: take those of load_data(config)."
        )
    unknown_sets = load_unknown_sets(unknowns, data, data_dir=config.data_dir or None)
    check_scores(scores)
    last = run_dir / "last.pt"
    if not is_first():
        _train_along(config, run_dir, data, resume, device, console, deadline, start)
        return {}
    with locked(run_dir):
        state = _check_folder(config, run_dir, resume)
        wait_for_all()  # until they have read it, too
        history: list[dict[str, Any]] = []
        with _log_to(run_dir / "fit.log"):
            trainer = Trainer(config, data, pick_device(device), start=_started(start, config))
            if state is not None:
                trainer.load_state_dict(state)
                history = state["history"]
                _write_metrics(history, run_dir)  # a kill may have come between last.pt and it
                log.info("resumed after epoch %d", trainer.epoch)
            write_json(run_dir / "config.json", config.to_dict())
            log.info("%s: %s on %s, %d steps", config.arm, config.model, config.data, trainer.total_steps)
            _train(trainer, history, run_dir, console, deadline)
            cost = training_cost(trainer.model, trainer.optimizer, trainer.vote)
            with _explained(config, run_dir, len(history)):
                model = trainer.result()
            save_checkpoint(run_dir / "model.pt", {"result": model.state_dict(), **_about(trainer)})
            judged = evaluate(
                model, data, unknown_sets, normalise=trainer.normalise, device=trainer.device, scores=scores
            )
            results = {
                "arm": config.arm,
                "config": config.to_dict(),
                **({"start": str(start)} if start is not None else {}),
                "seconds_per_epoch": float(np.median([record["seconds"] for record in history])),
                "compute_seconds_per_epoch": float(
                    np.median([r.get("compute_seconds", r["seconds"]) for r in history])
                ),
                "cost": cost,
                **judged.results,
            }
            if not lean:
                save_scores(run_dir / "scores.npz", judged)
                report.draw_run(run_dir, history, judged)
            write_json(run_dir / "results.json", results)  # last: its presence says that the run is finished
            log.info("accuracy %.4f, ECE %.4f", results["known"]["accuracy"], results["known"]["ece"])
        if lean:
            last.unlink(missing_ok=True)
    return results


def _started(start: Path | None, config: FitConfig) -> nn.Module | None:
    """The network to start from. Raises TrainingError for one of another architecture."""
    if start is None:
        return None
    model, its, _ = load_model(start)
    if (its.model, its.stem) != (config.model, config.stem):
        raise TrainingError(f"Expected a {config.model} ({config.stem} stem) to start from, got {start}: {its.model}.")
    return model


def _train_along(
    config: FitConfig,
    run_dir: Path,
    data: TrainTest,
    resume: bool,
    device: str,
    console: Console,
    deadline: float,
    start: Path | None,
) -> None:
    """What the other processes do; nothing is written."""
    state = _check_folder(config, run_dir, resume)
    wait_for_all()
    trainer = Trainer(config, data, pick_device(device), start=_started(start, config))
    if state is not None:
        trainer.load_state_dict(state)
    _train(trainer, [], run_dir, console, deadline)
    trainer.result()  # statistics of batch norm are taken together


def _train(trainer: Trainer, history: list[dict[str, Any]], run_dir: Path, console: Console, deadline: float) -> None:
    config = trainer.config
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(
            config.arm, total=trainer.total_steps, completed=trainer.epoch * len(trainer.batches), status=""
        )

        def on_step(index: int, loss: Tensor) -> None:
            if index % 20 == 19:  # the only host sync, and only where someone looks
                progress.update(task, advance=20, status=f"loss {float(loss):.3f}" if console.is_terminal else "")

        while trainer.epoch < config.epochs:
            if time.time() > deadline:
                raise OutOfTimeError(f"Time is over after epoch {trainer.epoch} of {config.epochs}.")
            test = trainer.data.test
            with _explained(config, run_dir, len(history)):
                record = trainer.train_epoch(on_step)
                if not is_first():
                    continue
                outputs = collect(trainer.model, test.images, trainer.normalise, trainer.device)
                if not bool(outputs.logits.isfinite().all()):
                    step = trainer.step - 1
                    raise NonFiniteLossError(f"The outputs are NaN or infinite after step {step}.", step)
            known = classification_metrics(outputs.logits, test.labels)
            record |= {"test_accuracy": known["accuracy"], "test_ece": known["ece"]}
            if outputs.logits.shape[1] > trainer.data.train.num_classes:
                record["test_mean_u"] = float(outputs.logits.softmax(1)[:, -1].mean())
            history.append(record)
            progress.update(task, completed=trainer.epoch * len(trainer.batches))
            _save(trainer, history, run_dir)
            line = (
                f"{config.arm} epoch {trainer.epoch}/{config.epochs}: loss {record['train_loss']:.4f}, test accuracy "
            )
            line += f"{record['test_accuracy']:.4f}, {record['seconds']:.1f} s"
            log.info(line)
            if not console.is_terminal:
                console.print(line)


@contextmanager
def _explained(config: FitConfig, run_dir: Path, epochs_done: int) -> Iterator[None]:
    """Adds to a NonFiniteLossError which checkpoint is left, and what to do."""
    try:
        yield
    except NonFiniteLossError as error:
        kept = f"The last good checkpoint, after epoch {epochs_done}, is {run_dir / 'last.pt'}."
        message = (
            f"{error} {kept if epochs_done else 'There is no checkpoint yet.'} Try a lower lr_max (now "
            f"{config.lr_max}) in another folder: --resume goes on with the same settings, and comes to the same step."
        )
        log.error(message)
        raise NonFiniteLossError(message, error.step) from error


def _save(trainer: Trainer, history: list[dict[str, Any]], run_dir: Path) -> None:
    save_checkpoint(
        run_dir / "last.pt", {**trainer.state_dict(), "history": history, "config": trainer.config.to_dict()}
    )
    _write_metrics(history, run_dir)


def _write_metrics(history: list[dict[str, Any]], run_dir: Path) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in history)
    write_atomically(run_dir / "metrics.jsonl", lambda file: file.write(lines.encode()))


def _about(trainer: Trainer) -> dict[str, Any]:
    images = trainer.data.train.images
    return {
        "config": trainer.config.to_dict(),
        "classes": list(trainer.data.train.classes),
        "in_channels": images.shape[1],
        "image_size": images.shape[-1],
        "mean": list(trainer.normalise.mean),
        "std": list(trainer.normalise.std),
    }


def _check_folder(config: FitConfig, run_dir: Path, resume: bool) -> dict[str, Any] | None:
    """Returns the state to go on from, if there is one. Raises CheckpointError if the folder holds another run."""
    present = [name for name in ("last.pt", "results.json") if (run_dir / name).exists()]
    if not resume:
        if present:
            raise CheckpointError(
                f"{run_dir} holds a run already ({', '.join(present)}). Use --resume, or another folder."
            )
        return None
    state = load_checkpoint(run_dir / "last.pt") if "last.pt" in present else None
    found = {"last.pt": state["config"]} if state is not None else {}
    if (run_dir / "config.json").is_file():
        found["config.json"] = read_json(run_dir / "config.json")
    elif "results.json" in present:
        found["results.json"] = read_results(run_dir / "results.json")["config"]
    for name, values in found.items():
        if differences := config_in(run_dir / name, values).differences(config):
            raise CheckpointError(
                f"{run_dir / name} is of a run with other settings: {'; '.join(differences)} (there and here). "
                "Give the same settings, or another folder."
            )
    if state is not None:
        _check_history(state, run_dir / "last.pt")
    return state


def _check_history(state: dict[str, Any], file: Path) -> None:
    history = state.get("history")
    names = ("epoch", "train_loss", "train_accuracy", "lr", "seconds", "test_accuracy")
    if not isinstance(history, list) or not all(
        isinstance(record, dict)
        and record.keys() | {"compute_seconds"} == history[0].keys() | {"compute_seconds"}  # older runs lack it
        and all(name in record for name in names)
        and all(type(value) in (int, float) for value in record.values())
        for record in history
    ):
        raise CheckpointError(f"{file} is damaged: expected a history of {', '.join(names)}, an epoch each.")
    epoch = state.get("epoch")
    if type(epoch) is not int or epoch != len(history) or any(r["epoch"] != n for n, r in enumerate(history, 1)):
        raise CheckpointError(f"{file} is damaged: its history is not that of {epoch!r:.80} epochs.")


def save_scores(path: Path, judged: Evaluation) -> None:
    """Writes the raw scores as arrays named <set>/<score>."""
    arrays: dict[str, Any] = {f"{s}/{n}": v.numpy() for s, values in judged.scores.items() for n, v in values.items()}
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


class _LogFile(logging.FileHandler):
    """A log file. A full disk does not fill the screen with tracebacks: saving a checkpoint will report it."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Sends what this package and uasparse_kernels log to a file."""
    try:
        handler = _LogFile(path)
    except OSError as error:
        raise CheckpointError(f"Cannot write {path}: {error}.") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("uasparse_kernels")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except TrainingError:
        raise
    except Exception:
        log.info("the run ended with an unforeseen error", exc_info=True)  # INFO: for the file alone
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
