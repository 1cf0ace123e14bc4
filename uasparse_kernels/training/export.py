"""`export`: a folder with all that using a trained network takes: the network for several engines, and export.json."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import uasparse_kernels as ua
from uasparse_kernels.inference.capture import one_cudnn_precision
from uasparse_kernels.training.checkpoint import write_json
from uasparse_kernels.training.errors import CheckpointError, TrainingError
from uasparse_kernels.training.evaluate import load_run
from uasparse_kernels.training.metrics import scaled_metrics
from uasparse_kernels.training.normalise import Normalise
from uasparse_kernels.training.predict import (
    ABOUT,
    BATCH,
    NEED_UNKNOWN_OUTPUT,
    ONNX,
    OPTIMIZED,
    SCORES,
    WEIGHTS,
    About,
    hash_of,
)

KNOWN_ACCEPTED = 0.95  # share of the known images below the threshold


def export_run(
    run: Path, out: Path | None = None, *, score: str = "", onnx: bool = True, data_dir: str = ""
) -> tuple[Path, About]:
    """Writes the export of a run (by default into its folder `export`); returns the folder and what export.json says.

    `score` is one of `predict.SCORES`; by default "u" for a network that was trained on synthetic unknowns, else
    "energy". Temperature and threshold are found on the images that the run held out of training (its setting
    `validation`). If it held out none, they are found on the test images, and the figures for the test images are then
    too good: `tuned_on` says which images were used. Raises TrainingError.
    """
    trained = load_run(run, data_dir=data_dir)
    if onnx:
        try:
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise TrainingError(
                "An ONNX file needs the packages onnx and onnxscript: pip install onnx onnxscript, or give --no-onnx."
            ) from error
    model, config, test = trained.model, trained.config, trained.data.test
    k = test.num_classes
    optimized = ua.optimize_for_inference(model, trained.normalise(test.images[:1]))
    logits = _logits(optimized, test.images, trained.normalise)
    validation = trained.data.validation
    tuned = test if validation is None else validation
    tuned_logits = logits if validation is None else _logits(optimized, tuned.images, trained.normalise)
    _check_equal(logits, model, test.images, trained.normalise)
    if not bool(logits.isfinite().all() and tuned_logits.isfinite().all()):
        raise TrainingError("Expected finite outputs of the network, got NaN or infinite ones: its training diverged.")
    outputs = logits.shape[1]
    score = score or ("u" if config.unknowns != "none" else "energy")
    usable = [name for name in SCORES if outputs > k or name not in NEED_UNKNOWN_OUTPUT]
    if score not in usable:
        raise TrainingError(
            f"Expected a score of {', '.join(usable)} for a network of {outputs} outputs, got {score!r}."
        )
    threshold = _threshold(SCORES[score](tuned_logits, k))
    folder = out or (run if run.is_dir() else run.parent) / "export"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ABOUT).unlink(missing_ok=True)  # it comes last: its presence says that the rest is whole
        optimized.save(folder / OPTIMIZED)
        ua.save_sparse(model, folder / WEIGHTS)
        if onnx:
            _write_onnx(model, trained.normalise(test.images[:2]), folder / ONNX)
        else:
            (folder / ONNX).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot write the export into {folder}: {error}. Give another folder.") from error
    about = About(
        classes=test.classes,
        in_channels=test.images.shape[1],
        image_size=test.images.shape[-1],
        mean=trained.normalise.mean,
        std=trained.normalise.std,
        outputs=outputs,
        temperature=scaled_metrics(tuned_logits, tuned.labels)["temperature"],
        score=score,
        threshold=threshold,
        tuned_on="test" if validation is None else "validation",
        tuned_images=len(tuned),
        test_images=len(test),
        test_accepted=float((SCORES[score](logits, k) <= threshold).double().mean()),
        accuracy=float((logits[:, :k].argmax(1) == test.labels).double().mean()),
        data=config.data,
        arm=config.arm,
        network=hash_of(folder / OPTIMIZED),
    )
    write_json(folder / ABOUT, about.to_json())
    return folder, about


def _threshold(known: Tensor) -> float:
    """Halfway between the last accepted score and the next: rounding, as by another batch size, decides nothing."""
    ordered = known.sort().values
    count = math.ceil(KNOWN_ACCEPTED * len(ordered))
    return float(ordered[count - 1 : count + 1].mean())


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor, normalise: Normalise) -> Tensor:
    return torch.cat([model(normalise(part)) for part in images.split(BATCH)]).double()


def _check_equal(logits: Tensor, model: nn.Module, images: Tensor, normalise: Normalise) -> None:
    expected = _logits(model, images[:BATCH], normalise)
    error = float((logits[: len(expected)] - expected).norm() / expected.norm().clamp_min(1e-30))
    if not error < 1e-4:
        raise TrainingError(f"The optimised network differs from the run's by {error:.2g}, relative to its outputs.")


def _write_onnx(model: nn.Module, example: Tensor, file: Path) -> None:
    dense = ua.densify(copy.deepcopy(model)).eval()
    with warnings.catch_warnings(), one_cudnn_precision():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            dense,
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    assert program is not None
    program.save(file)
