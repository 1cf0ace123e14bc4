"""Readers: one function a format, each returns uint8 images [N, C, H, W] and int64 labels [N].

Every reader checks what it reads and raises DataError that names the file, what was expected and what to do.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.errors import DataError

Arrays = tuple[Tensor, Tensor]

# SHA-256 of the *unpacked* idx files: the same bytes whoever compressed them.
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
MAX_FOLDER_BYTES = 8 << 30


# --- idx (MNIST's own format) ---------------------------------------------------------------------------------------


def read_idx(path: Path, sha256: str | None = None) -> np.ndarray:
    """Reads one idx file of unsigned bytes, plain or gzipped (".gz" may be left out of `path`).

    Raises DataError if the file is missing, damaged, of another type, shorter or longer than its header says, or
    if its unpacked content does not have the given SHA-256.
    """
    packed = path if path.suffix == ".gz" else path.with_name(path.name + ".gz")
    file = path if path.is_file() else packed
    if not file.is_file():
        raise DataError(f"Expected the idx file {path} (or {packed.name}), found neither.")
    raw = file.read_bytes()
    try:
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} is damaged: {error}. Delete it and fetch it again.") from error
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise DataError(
            f"{file} is damaged or another file: expected SHA-256 {sha256} of its unpacked content, got {found}. "
            "Delete it and fetch it again."
        )
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise DataError(
            f"{file} is no idx file of unsigned bytes: expected it to start 00 00 08, got {data[:4].hex(' ')}."
        )
    num_dims = data[3]
    header = 4 + 4 * num_dims
    if len(data) < header:
        raise DataError(f"{file} is cut short: its header alone takes {header} bytes, the file has {len(data)}.")
    shape = struct.unpack(f">{num_dims}I", data[4:header])
    if len(data) - header != math.prod(shape):
        raise DataError(
            f"{file} is damaged: its header says {shape}, which is {math.prod(shape)} bytes, but "
            f"{len(data) - header} follow."
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def read_idx_folder(folder: Path, split: str, checksums: dict[str, str] | None = None) -> Arrays:
    """Reads MNIST-like idx files from a folder: {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]."""
    image_name, label_name = IDX_FILES[split]
    sums = checksums or {}
    images = read_idx(folder / image_name, sums.get(image_name))
    labels = read_idx(folder / label_name, sums.get(label_name))
    return as_images(images, folder / image_name), as_labels(labels, len(images), folder / label_name)


# --- npz ------------------------------------------------------------------------------------------------------------


def read_npz(path: Path, keys: tuple[str, ...]) -> np.ndarray | None:
    """Returns the first of `keys` that the archive holds, or None. Raises DataError if it can't be read."""
    if not path.is_file():
        raise DataError(f"Expected an npz file at {path}, found none.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in keys:
                if key in archive.files:
                    return archive[key]
            return None
    except Exception as error:  # numpy, zipfile and zlib each have their own
        raise DataError(f"{path} is no readable npz file: {error}. Fetch it again.") from error


def read_npz_split(path: Path, split: str) -> Arrays:
    """Reads one split of a data set from npz.

    `path` is a folder with *{split}-imgs.npz and *{split}-labels.npz (key arr_0, as Kuzushiji-MNIST comes), or one
    file with x_{split} and y_{split} (as Keras has it).
    """
    if path.is_dir():
        found = {kind: sorted(path.glob(f"*{split}-{kind}.npz")) for kind in ("imgs", "labels")}
        for kind, files in found.items():
            if len(files) != 1:
                raise DataError(f"Expected one file *{split}-{kind}.npz in {path}, found {len(files)}.")
        images, labels = (read_npz(found[kind][0], ("arr_0",)) for kind in ("imgs", "labels"))
        wanted = "arr_0"
    else:
        images, labels = read_npz(path, (f"x_{split}",)), read_npz(path, (f"y_{split}",))
        wanted = f"x_{split} and y_{split}"
    if images is None or labels is None:
        raise DataError(f"{path} lacks the arrays {wanted}, which a data set to train on needs.")
    return as_images(images, path), as_labels(labels, len(images), path)


def read_npz_images(path: Path) -> Tensor:
    """Reads images without labels from one npz file: key arr_0, images, x_test or x_train, the first that is there."""
    keys = ("arr_0", "images", "x_test", "x_train")
    images = read_npz(path, keys)
    if images is None:
        raise DataError(f"{path} holds none of the arrays {', '.join(keys)}.")
    return as_images(images, path)


# --- folders of images ----------------------------------------------------------------------------------------------


def find_split_folder(root: Path, split: str) -> Path | None:
    """Returns root/train for "train", root/test, root/val or root/valid for "test", or None."""
    names = ("train",) if split == "train" else ("test", "val", "valid", "validation")
    return next((root / name for name in names if (root / name).is_dir()), None)


def read_image_folder(folder: Path, size: int | None = None) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Reads <folder>/<class>/<image>, or images right in <folder> as one class, all into memory.

    Images are brought to size x size (resize of the shorter side, centre crop); without `size`, to that of the first
    image. Grey images stay grey only if the first one is. Raises DataError naming the first unreadable file.
    """
    if not folder.is_dir():
        raise DataError(f"Expected a folder of images at {folder}, found none.")
    class_dirs = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    classes = tuple(entry.name for entry in class_dirs) or (folder.name,)
    files, labels = [], []
    for index, class_dir in enumerate(class_dirs or [folder]):
        found = sorted(file for file in class_dir.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        files += found
        labels += [index] * len(found)
    if not files:
        raise DataError(f"No images below {folder}: expected <class>/<name> with one of {sorted(IMAGE_SUFFIXES)}.")
    first = _decode(files[0], None, None)
    mode = "L" if first.shape[0] == 1 else "RGB"
    side = size or min(first.shape[1:])
    num_bytes = len(files) * first.shape[0] * side * side
    if num_bytes > MAX_FOLDER_BYTES:
        raise DataError(
            f"{len(files)} images of {side}x{side} take {num_bytes / 2**30:.1f} GiB; images are held in memory, at "
            f"most {MAX_FOLDER_BYTES / 2**30:.0f} GiB of them. Give a smaller --image-size."
        )
    images = torch.empty(len(files), first.shape[0], side, side, dtype=torch.uint8)

    def load(index: int) -> None:
        images[index] = _decode(files[index], mode, side)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(load, range(len(files))):
            pass
    return images, torch.tensor(labels), classes


def _decode(file: Path, mode: str | None, side: int | None) -> Tensor:
    """Decodes an image to uint8 [C, H, W]; `mode` None keeps grey grey and makes all else RGB."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = opened.convert(mode or ("L" if opened.mode in ("1", "L", "I;16") else "RGB"))
            if side is not None and image.size != (side, side):
                image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{file} is no readable image: {error}. Remove or replace it.") from error
    return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


# --- checks ---------------------------------------------------------------------------------------------------------


def as_images(array: np.ndarray, origin: Path | str) -> Tensor:
    """Brings [N, H, W], [N, H, W, C] or [N, C, H, W] of uint8 to a uint8 tensor [N, C, H, W] (C is 1 or 3)."""
    if array.dtype != np.uint8:
        raise DataError(f"{origin}: expected images of uint8 (0 to 255), got {array.dtype}.")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or len(array) == 0:
        raise DataError(f"{origin}: expected images [N, H, W] or with 1 or 3 channels, got the shape {array.shape}.")
    return torch.from_numpy(np.array(array, order="C"))


def as_labels(array: np.ndarray, num_images: int, origin: Path | str) -> Tensor:
    """Brings labels to an int64 tensor [N]; one an image, none negative."""
    array = np.asarray(array).reshape(-1)
    if array.dtype.kind not in "iu" or len(array) != num_images or array.min() < 0:
        raise DataError(
            f"{origin}: expected {num_images} labels, integers from 0, got {len(array)} of {array.dtype}"
            + (f" from {array.min()}." if len(array) else ".")
        )
    return torch.from_numpy(array.astype(np.int64))
