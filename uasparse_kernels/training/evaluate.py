"""Judging a trained network: accuracy and calibration on known images, detection of unknown ones by every score."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uasparse_kernels.training.batches import Normalise
from uasparse_kernels.training.checkpoint import check_form, load_checkpoint, read_json
from uasparse_kernels.training.config import FitConfig
from uasparse_kernels.training.data import ImageSet, TrainTest, load_train_test, load_unknown_sets
from uasparse_kernels.training.errors import CheckpointError, TrainingError
from uasparse_kernels.training.metrics import classification_metrics, detection_metrics, reliability, scaled_metrics
from uasparse_kernels.training.recipe import build_network
from uasparse_kernels.unknowns.scores import SCORES, Judge, Outputs

MAX_IMAGE_SIZE = 4096  # of a saved network; more is a damaged file


@dataclass
class Evaluation:
    """`results` is plain JSON; `scores[set][score]` are the raw values behind it, "known" is the test set."""

    results: dict[str, Any]
    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def evaluate(
    model: nn.Module,
    data: TrainTest,
    unknown_sets: Sequence[ImageSet],
    *,
    normalise: Normalise,
    device: torch.device | str = "cpu",
    scores: Sequence[str] | None = None,
) -> Evaluation:
    """Evaluates a network with K or K+1 outputs. `scores` are names of SCORES; all that the network has by default.

    Raises TrainingError for names that don't exist.
    """
    start = time.perf_counter()
    device = torch.device(device)
    check_scores(scores)
    names = list(scores or SCORES)
    num_classes = data.train.num_classes
    judge = Judge.of(model, normalise, num_classes, data.train.images, data.train.labels, device)
    known = judge.outputs(data.test.images)
    if not bool(known.logits.isfinite().all() and judge.fit.logits.isfinite().all()):
        raise TrainingError("Expected finite outputs of the network, got NaN or infinite ones: its training diverged.")
    has_unknown = known.logits.shape[1] > num_classes
    scorers = {n: judge.scorer(n) for n in names if has_unknown or not SCORES[n].needs_unknown_output}

    def apply(images: ImageSet, outputs: Outputs) -> dict[str, Tensor]:
        return {n: scorer(images.images if SCORES[n].takes == "images" else outputs) for n, scorer in scorers.items()}

    by_set = {"known": apply(data.test, known)}
    detection: dict[str, dict[str, dict[str, float]]] = {}
    for unknown in unknown_sets:
        by_set[unknown.name] = apply(unknown, judge.outputs(unknown.images))
        detection[unknown.name] = {
            name: detection_metrics(by_set["known"][name], by_set[unknown.name][name]) for name in scorers
        }
    results = {
        "known": {
            "data": data.test.name,
            "images": len(data.test),
            **classification_metrics(known.logits, data.test.labels),
            **scaled_metrics(known.logits, data.test.labels),
            **({"mean_u": float(known.logits.softmax(1)[:, num_classes].mean())} if has_unknown else {}),
            "reliability": reliability(known.logits, data.test.labels),
        },
        "unknown": detection,
        "unknown_images": {unknown.name: len(unknown) for unknown in unknown_sets},
        "mean_auroc": _mean_auroc(detection),
        "seconds": time.perf_counter() - start,
    }
    return Evaluation(results, by_set)


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, FitConfig, dict[str, Any]]:
    """Loads a network that `fit` saved: a model.pt or the run folder around it. Returns (network, config, the rest).

    Raises CheckpointError for files that are missing, damaged, or hold another network than they say.
    """
    file = path / "model.pt" if path.is_dir() else path
    state = load_checkpoint(file)
    if "result" not in state:
        raise CheckpointError(f"{file} is a checkpoint to resume from; expected the finished model.pt of a run.")
    config = config_in(file, state["config"])
    _check_about(state, file)
    model, _ = build_network(config, len(state["classes"]), state["in_channels"], state["image_size"])
    try:
        check_form(state["result"], model.state_dict(), "result")
        model.load_state_dict(state["result"])
    except Exception as error:  # whatever torch makes of another's tensors
        raise CheckpointError(f"{file} does not hold the {config.model} that it says: {error}") from error
    if not all(bool(v.isfinite().all()) for v in model.state_dict().values() if v.is_floating_point()):
        raise CheckpointError(f"{file} holds weights that are NaN or infinite: its training diverged.")
    return model.to(device).eval(), config, state


def _check_about(state: dict[str, Any], file: Path) -> None:
    """What model.pt says of its data: see `_about` of run.py."""
    channels = state.get("in_channels")
    numbers = [state.get(name) for name in ("mean", "std")]
    classes, size = state.get("classes"), state.get("image_size")
    if (
        not isinstance(classes, list)
        or len(classes) < 2
        or not all(isinstance(name, str) for name in classes)
        or type(channels) is not int
        or channels not in (1, 3)
        or type(size) is not int
        or not 1 <= size <= MAX_IMAGE_SIZE
        or not all(isinstance(n, list) and len(n) == channels and all(map(_is_finite, n)) for n in numbers)
        or min(state["std"]) <= 0
    ):
        raise CheckpointError(
            f"{file} is damaged: expected classes, in_channels, image_size, mean and std of the data, got "
            f"{classes!r:.80}, {channels!r:.20}, {size!r:.20}, {numbers[0]!r:.80}, {numbers[1]!r:.80}."
        )


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def config_in(file: Path, values: Any) -> FitConfig:
    """The config that a file holds. Raises CheckpointError that names it."""
    try:
        return FitConfig.from_dict(values)
    except TrainingError as error:
        raise CheckpointError(f"{file} holds no settings of this version: {error}") from error


def read_results(file: Path) -> dict[str, Any]:
    """results.json of a run. Raises CheckpointError unless it has what a study reads of it."""
    results = read_json(file)
    try:
        config_in(file, results["config"])
        cells = [cell for scores in results["unknown"].values() for cell in scores.values()]
        numbers = [cell[metric] for cell in cells for metric in ("auroc", "fpr95")]
        numbers += [results["known"][name] for name in ("accuracy", "ece", "nll", "brier")]
        numbers += [results["cost"][name] for name in ("memory_bytes", "index_bytes")]
        numbers += [results.get("seconds_per_epoch", 0), *results.get("mean_auroc", {}).values()]
        if all(map(_is_finite, numbers)):
            return results
        reason = "a figure is no number"
    except (KeyError, TypeError, AttributeError) as error:
        reason = repr(error)
    raise CheckpointError(f"{file} holds no results of a run: {reason}. Remove it and run again.")


def check_scores(names: Sequence[str] | None) -> None:
    """Raises TrainingError for names that are not in SCORES."""
    if wrong := [name for name in names or () if name not in SCORES]:
        raise TrainingError(f"Unknown scores {', '.join(wrong)}. Expected some of {', '.join(SCORES)}.")


def evaluate_checkpoint(
    path: Path,
    unknowns: Sequence[str],
    *,
    data_dir: str = "",
    device: torch.device | str = "cpu",
    scores: Sequence[str] | None = None,
) -> Evaluation:
    """Evaluates a saved network against the OOD sets named by their specs."""
    run = load_run(path, data_dir=data_dir, device=device)
    sets = load_unknown_sets(unknowns, run.data, data_dir=data_dir or run.config.data_dir or None)
    return evaluate(run.model, run.data, sets, normalise=run.normalise, device=device, scores=scores)


@dataclass(frozen=True)
class Run:
    """A trained network with the data that it was trained on."""

    model: nn.Module
    config: FitConfig
    data: TrainTest
    normalise: Normalise


def load_run(path: Path, *, data_dir: str = "", device: torch.device | str = "cpu") -> Run:
    """A saved network (see `load_model`) and its data. Raises CheckpointError for data of other classes or sizes."""
    model, config, state = load_model(path, device)
    data = load_data(config, data_dir)
    images = data.test.images
    said = (tuple(state["classes"]), state["in_channels"], state["image_size"])
    if said != (data.train.classes, images.shape[1], images.shape[-1]):
        raise CheckpointError(
            f"{path} was trained on {said[1]} channels, {said[2]} pixels a side, and the classes {state['classes']}; "
            f"{config.data} has {images.shape[1]}, {images.shape[-1]}, and {data.train.classes}."
        )
    return Run(model, config, data, Normalise(tuple(state["mean"]), tuple(state["std"])))


def load_data(config: FitConfig, data_dir: str = "") -> TrainTest:
    """Loads the data set that a config names."""
    return load_train_test(
        config.data,
        data_dir=data_dir or config.data_dir or None,
        image_size=config.image_size or None,
        holdout=config.holdout_classes,
        limit_train=config.limit_train,
        validation=config.validation,
    )


def _mean_auroc(detection: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Mean over the OOD sets, a score."""
    names = next(iter(detection.values()), {})
    return {name: sum(d[name]["auroc"] for d in detection.values()) / len(detection) for name in names}
