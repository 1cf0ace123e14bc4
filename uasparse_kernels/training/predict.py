"""Predictions by an exported network (`export`): class, confidence, and whether an image is of a kind never seen.

It needs the export's folder alone: no data set, no checkpoint.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import uasparse_kernels as ua
from uasparse_kernels.training.checkpoint import read_json
from uasparse_kernels.training.errors import CheckpointError, DataError
from uasparse_kernels.training.normalise import Normalise

FORMAT = "uasparse_kernels export 2"
ABOUT, OPTIMIZED, WEIGHTS, ONNX = "export.json", "optimized.safetensors", "weights.safetensors", "network.onnx"
BATCH = 64
# Training images that were not trained on; where a run kept none, test images.
TUNED_ON = ("validation", "test")

# Higher is more unknown; of logits [N, K or K+1] and K. Those of scores.py that need logits alone.
SCORES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "u": lambda logits, k: logits[:, k] - logits[:, :k].logsumexp(1),
    "moon": lambda logits, k: 1 - logits.softmax(1)[:, :k].amax(1),
    "msp": lambda logits, k: -logits[:, :k].softmax(1).amax(1),
    "maxlogit": lambda logits, k: -logits[:, :k].amax(1),
    "energy": lambda logits, k: -logits[:, :k].logsumexp(1),
    "entropy": lambda logits, k: -(logits[:, :k].softmax(1) * logits[:, :k].log_softmax(1)).sum(1),
}
NEED_UNKNOWN_OUTPUT = ("u", "moon")


@dataclass(frozen=True)
class About:
    """What export.json holds: how images become inputs, and outputs become answers."""

    classes: tuple[str, ...]
    in_channels: int  # 1: grey, 3: red, green, blue
    image_size: int  # of both sides
    mean: tuple[float, ...]  # of pixels / 255, a channel; inputs are (pixel / 255 - mean) / std
    std: tuple[float, ...]
    outputs: int  # K classes, or K+1 with the output "unknown", the last
    temperature: float  # logits are divided by it before their softmax gives the confidence
    score: str  # one of SCORES, of the logits as they are
    threshold: float  # a higher score is unknown
    tuned_on: str  # the images on which temperature and threshold were found, one of TUNED_ON
    tuned_images: int  # how many
    test_images: int
    test_accepted: float  # share of the test images that are not above the threshold
    accuracy: float  # on the test images
    data: str
    arm: str
    network: str  # SHA-256 of the optimised network's file

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def read(cls, file: Path) -> About:
        """Raises CheckpointError for a file that is missing, of another version, or does not fit together."""
        values = read_json(file)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise CheckpointError(f"{file}: expected the format {FORMAT!r}, got {found!r:.80}. Export the run again.")
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key != "format"}
        names = {f.name for f in fields(cls)}
        if values.keys() != names:
            raise CheckpointError(f"{file} is damaged: missing or unexpected: {sorted(values.keys() ^ names)}.")
        about = cls(**values)
        if wrong := [name for name, good in about._checks() if not good]:
            shown = ", ".join(f"{name} {values[name]!r:.80}" for name in wrong)
            raise CheckpointError(f"{file} is damaged: did not expect {shown}. Export the run again.")
        return about

    def _checks(self) -> list[tuple[str, bool]]:
        def numbers(values: Any, count: int) -> bool:
            return isinstance(values, tuple) and len(values) == count and all(map(_is_finite, values))

        classes = self.classes if isinstance(self.classes, tuple) else ()
        k, channels = len(classes), self.in_channels
        has_unknown = self.outputs == k + 1
        return [
            ("classes", k >= 2 and all(isinstance(name, str) for name in classes)),
            ("in_channels", type(channels) is int and channels in (1, 3)),
            ("image_size", type(self.image_size) is int and 1 <= self.image_size <= 4096),
            ("mean", numbers(self.mean, channels if isinstance(channels, int) else 0)),
            ("std", numbers(self.std, channels if isinstance(channels, int) else 0) and min(self.std) > 0),
            ("outputs", type(self.outputs) is int and self.outputs in (k, k + 1)),
            ("temperature", _is_finite(self.temperature) and self.temperature > 0),
            ("score", self.score in (SCORES if has_unknown else set(SCORES) - set(NEED_UNKNOWN_OUTPUT))),
            ("threshold", _is_finite(self.threshold)),
            ("tuned_on", self.tuned_on in TUNED_ON),
            ("tuned_images", type(self.tuned_images) is int and self.tuned_images > 0),
            ("test_images", type(self.test_images) is int and self.test_images > 0),
            ("test_accepted", _is_finite(self.test_accepted) and 0 <= self.test_accepted <= 1),
            ("accuracy", _is_finite(self.accuracy) and 0 <= self.accuracy <= 1),
            ("data", isinstance(self.data, str)),
            ("arm", isinstance(self.arm, str)),
            ("network", isinstance(self.network, str)),
        ]


class Answers(NamedTuple):
    """Of N images, each [N]: class (index into `classes`), its probability, whether unknown, and by what score."""

    label: Tensor
    confidence: Tensor
    unknown: Tensor
    score: Tensor


class Predictor:
    """Answers for images, by an optimised network on the CPU. It may be called from several threads."""

    def __init__(self, network: ua.inference.OptimizedModel, about: About) -> None:
        self.network, self.about = network, about
        self.normalise = Normalise(about.mean, about.std)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Answers:
        """Answers for images uint8 [N, in_channels, image_size, image_size]. Raises DataError for any other."""
        about, k = self.about, len(self.about.classes)
        size = (about.in_channels, about.image_size, about.image_size)
        if not isinstance(images, Tensor):
            raise DataError(f"Expected images as a tensor, got a {type(images).__name__}.")
        if images.dtype != torch.uint8 or images.dim() != 4 or tuple(images.shape[1:]) != size or not len(images):
            raise DataError(
                f"Expected images of uint8 [N, {size[0]}, {size[1]}, {size[2]}], got {images.dtype} "
                f"{list(images.shape)}."
            )
        logits = torch.cat([self.network(self.normalise(part)) for part in images.cpu().split(BATCH)]).double()
        confidence, label = (logits / about.temperature).softmax(1)[:, :k].max(1)
        score = SCORES[about.score](logits, k)
        return Answers(label, confidence, score > about.threshold, score)

    def files(self, paths: Sequence[Path | str]) -> list[dict[str, Any]]:
        """Answers for image files and folders of them, read and cropped as in training: a dictionary an image.

        Raises DataError for the first file that is no image.
        """
        from uasparse_kernels.training.sources import ImageFiles

        if isinstance(paths, str | Path):
            raise DataError(f"Expected a list of paths, got one: pass [{str(paths)!r}].")
        found: list[Path] = []
        for path in map(Path, paths):
            if not path.exists():
                raise DataError(f"Expected an image, or a folder of images, at {path}, found none.")
            found += ImageFiles.of_folder(path).files if path.is_dir() else [path]
        if not found:
            raise DataError("Expected images, got none.")
        rows = []
        for start in range(0, len(found), BATCH):
            files = found[start : start + BATCH]
            images = ImageFiles(Path(), files, (), ()).read(self.about.in_channels, self.about.image_size)
            for file, label, confidence, unknown, score in zip(files, *map(Tensor.tolist, self(images)), strict=True):
                name = self.about.classes[label]
                rows.append(
                    {"file": str(file), "class": name, "confidence": confidence, "unknown": unknown, "score": score}
                )
        return rows


def load_export(path: Path | str) -> Predictor:
    """The network of an export's folder, or of the run's folder around it.

    Raises CheckpointError for files that are missing, damaged, of another version or of different exports.
    """
    folder = Path(path)
    if not (folder / ABOUT).is_file():
        folder = folder / "export"
    if not (folder / ABOUT).is_file():
        raise CheckpointError(f"Expected an export in {path}, found none: `python -m training export RUN` writes it.")
    about = About.read(folder / ABOUT)
    try:
        if hash_of(folder / OPTIMIZED) != about.network:
            raise ValueError(f"{OPTIMIZED} is damaged, or not the one that {ABOUT} was written for.")
        predictor = Predictor(ua.load_optimized(folder / OPTIMIZED), about)
        size = (1, about.in_channels, about.image_size, about.image_size)
        found = tuple(predictor.network(torch.zeros(size)).shape)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"The export in {folder} cannot be used: {error} Export the run again.") from error
    if found != (1, about.outputs):
        raise CheckpointError(
            f"The export in {folder} cannot be used: expected {about.outputs} outputs, its network has {found[1:]}. "
            "Export the run again."
        )
    return predictor


def hash_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
