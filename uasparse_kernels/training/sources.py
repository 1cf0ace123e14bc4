"""Readers: one function per format, each returns uint8 images [N, C, H, W] and int64 labels [N].

Every reader checks what it reads and raises DataError that names the file, what was expected and what to do.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from uasparse_kernels.training.errors import DataError

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
# The readers of Pillow that may see a file, whatever its name says: an EPS, say, would be run by Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")
MAX_PIXELS = 1 << 26  # of one image; more is a mistake or a bomb
MAX_BYTES = 8 << 30  # of one array, or of all images of a folder: they are held in memory
GREY_MODES = {"1", "L", "LA", "La", "I", "F"}  # and I;16, I;16B, ...


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
    try:
        with file.open("rb") as raw:
            is_packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(file) if is_packed else file.open("rb") as stream:
            start, shape = _idx_header(stream.read(4), stream.read, file)
            # One byte more than expected shows that there are more, without unpacking a bomb to its end.
            data = stream.read(math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} is damaged: {error}. Delete it and fetch it again.") from error
    if sha256 is not None and (found := hashlib.sha256(start + data).hexdigest()) != sha256:
        raise DataError(
            f"{file} is damaged or another file: expected SHA-256 {sha256} of its unpacked content, got {found}. "
            "Delete it and fetch it again."
        )
    if len(data) != math.prod(shape):
        more = "more" if len(data) > math.prod(shape) else str(len(data))
        raise DataError(
            f"{file} is damaged: its header says {shape}, which is {math.prod(shape)} bytes, but {more} follow."
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _idx_header(magic: bytes, read: Callable[[int], bytes], file: Path) -> tuple[bytes, tuple[int, ...]]:
    """The whole header, and the shape that it says."""
    if len(magic) < 4 or magic[:3] != b"\x00\x00\x08" or magic[3] > 4:
        raise DataError(
            f"{file} is no idx file of unsigned bytes: expected it to start 00 00 08 and its dimensions, at most 4, "
            f"got {magic.hex(' ')}."
        )
    sizes = read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise DataError(
            f"{file} is cut short: its header alone takes {4 + 4 * magic[3]} bytes, the file has {4 + len(sizes)}."
        )
    shape = struct.unpack(f">{magic[3]}I", sizes)
    if 0 in shape:
        raise DataError(f"{file} holds nothing: its header says {shape}.")
    _check_bytes(math.prod(shape), file)
    return magic + sizes, shape


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
                    _check_bytes(archive.zip.getinfo(f"{key}.npy").file_size, path)
                    return archive[key]
            return None
    except DataError:
        raise
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


@dataclass(frozen=True)
class ImageFiles:
    """Image files of a folder, each with the number of its class."""

    folder: Path
    files: Sequence[Path]
    labels: Sequence[int]
    classes: tuple[str, ...]

    @classmethod
    def of_classes(cls, folder: Path) -> ImageFiles:
        """<folder>/<class>/<image>, at any depth below the class. Raises DataError for a class without images."""
        class_dirs = sorted(entry for entry in _listed(folder) if entry.is_dir())
        found = [_images_below(class_dir) for class_dir in class_dirs]
        if empty := [entry.name for entry, files in zip(class_dirs, found, strict=True) if not files]:
            raise DataError(
                f"No images below {folder} for {', '.join(empty)}: expected <class>/<image> with one of "
                f"{sorted(IMAGE_SUFFIXES)}. Fill these folders, or remove them."
            )
        if not found or (loose := [entry for entry in _listed(folder) if _is_image(entry)]):
            where = f"{loose[0].name} right in it" if found else "none"
            raise DataError(f"Expected images in {folder}/<class>/, got {where}: each needs the folder of its class.")
        labels = [label for label, files in enumerate(found) for _ in files]
        return cls(folder, [file for files in found for file in files], labels, tuple(e.name for e in class_dirs))

    @classmethod
    def of_folder(cls, folder: Path) -> ImageFiles:
        """All images below a folder, as one class."""
        if not folder.is_dir():
            raise DataError(f"Expected a folder of images at {folder}, found none.")
        files = _images_below(folder)
        if not files:
            raise DataError(f"No images below {folder}: expected files with one of {sorted(IMAGE_SUFFIXES)}.")
        return cls(folder, files, [0] * len(files), (folder.name,))

    def have_colour(self) -> bool:
        """Whether any image has. Only headers are read, up to the first that has."""
        return any(map(_has_colour, self.files))

    def read(self, channels: int, size: int | None = None) -> Tensor:
        """All images as uint8 [N, channels, size, size] (resize of the shorter side, centre crop).

        Without `size`, the shorter side of the first image. Raises DataError naming the first unreadable file.
        """
        mode = "L" if channels == 1 else "RGB"
        side = size or min(_decode(self.files[0], mode, None).shape[1:])
        num_bytes = len(self.files) * channels * side * side
        if num_bytes > MAX_BYTES:
            raise DataError(
                f"{len(self.files)} images of {side}x{side} take {num_bytes / 2**30:.1f} GiB; images are held in "
                f"memory, at most {MAX_BYTES / 2**30:.0f} GiB of them. Give a smaller --image-size."
            )
        images = torch.empty(len(self.files), channels, side, side, dtype=torch.uint8)

        def load(index: int) -> None:
            images[index] = _decode(self.files[index], mode, side)

        with ThreadPoolExecutor() as pool:
            for _ in pool.map(load, range(len(self.files))):
                pass
        return images


def _images_below(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if _is_image(file))
    return sorted(file for file in files if not any(map(_is_hidden, file.relative_to(folder).parts)))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(file.name) and file.is_file()


def _listed(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not _is_hidden(entry.name)]


def _is_hidden(name: str) -> bool:
    """What notebooks, archives and file managers leave: .ipynb_checkpoints, ._0.png, .DS_Store, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def _has_colour(file: Path) -> bool:
    with _opened(file) as image:
        return not _is_grey(image)


def _is_grey(image: Image.Image) -> bool:
    return image.mode in GREY_MODES or image.mode.startswith("I;16")


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """An image of which the header is read; its pixels are read when used. Raises DataError at either time."""
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{file} is of {image.width}x{image.height} pixels; expected at most {MAX_PIXELS / 1e6:.0f} "
                    "million. Make it smaller, or remove it."
                )
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow's readers have many, struct.error and DecompressionBombError among them
        raise DataError(f"{file} is no readable image: {error!r}. Remove or replace it.") from error


def _decode(file: Path, mode: str | None, side: int | None) -> Tensor:
    """Decodes an image to uint8 [C, H, W]; `mode` None keeps grey grey and makes all else RGB.

    More than 8 bits become 8: of 16-bit grey v the upper byte, v >> 8 (which Pillow does of 16-bit colour by itself). A
    32-bit integer image must hold 16-bit values; one of floats values from 0 to 1, which become round(255 v).
    """
    with _opened(file) as opened:
        image = _to_eight_bits(opened, file) if opened.mode[0] in "IF" else opened
        image = image.convert(mode or ("L" if _is_grey(opened) else "RGB"))
        if side is not None and image.size != (side, side):
            image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
        pixels = np.array(image)
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def _to_eight_bits(image: Image.Image, file: Path) -> Image.Image:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not 0 <= low <= high <= 1:
            raise DataError(f"{file}: expected values from 0 to 1 in an image of floats, got {low:g} to {high:g}.")
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if image.mode == "I" and (not 0 <= low <= high < 1 << 16 or (image.format == "TIFF" and 0 < high < 256)):
        raise DataError(
            f"{file}: expected 16-bit values (0 to 65535) in an image of 32-bit integers, got {low} to {high}. Store "
            "it with 8 or 16 bits."
        )
    return Image.fromarray((values.astype(np.int64) >> 8).astype(np.uint8))


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_bytes(num_bytes: int, file: Path) -> None:
    if num_bytes > MAX_BYTES:
        raise DataError(
            f"{file} unpacks to {num_bytes / 2**30:.1f} GiB; images are held in memory, at most "
            f"{MAX_BYTES / 2**30:.0f} GiB of them."
        )


def as_images(array: np.ndarray, origin: Path | str) -> Tensor:
    """Brings [N, H, W], [N, H, W, C] or [N, C, H, W] of uint8 to a uint8 tensor [N, C, H, W] (C is 1 or 3)."""
    if array.dtype != np.uint8:
        raise DataError(f"{origin}: expected images of uint8 (0 to 255), got {array.dtype}.")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or array.size == 0:
        raise DataError(f"{origin}: expected images [N, H, W] or with 1 or 3 channels, got the shape {array.shape}.")
    return torch.from_numpy(np.array(array, order="C"))


def as_labels(array: np.ndarray, num_images: int, origin: Path | str) -> Tensor:
    """Brings labels to an int64 tensor [N]: one per image, none negative or of more than 31 bits."""
    array = np.asarray(array).reshape(-1)
    if array.dtype.kind not in "iu" or len(array) != num_images:
        raise DataError(f"{origin}: expected {num_images} labels, integers from 0, got {len(array)} of {array.dtype}.")
    if len(array) and not 0 <= array.min() <= array.max() < 1 << 31:
        raise DataError(
            f"{origin}: expected labels that number the classes from 0, got {array.min()} to {array.max()}."
        )
    return torch.from_numpy(array.astype(np.int64))
