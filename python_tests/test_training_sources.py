"""Data as people have it: deep, damaged, hidden, mixed, with classes that lack images. Right, or refused by name."""

import gzip
import struct
import zlib

import numpy as np
import pytest

pytest.importorskip("torchvision")

import torch
from PIL import Image

from uasparse_kernels.training import sources
from uasparse_kernels.training.data import load_train_test, load_unknown_sets, load_unknowns
from uasparse_kernels.training.errors import DataError

rng = np.random.RandomState(0)
RAMP = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)


def pixels(*shape):
    return rng.randint(0, 256, shape).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes of three colour images, in both splits."""
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                Image.fromarray(pixels(8, 8, 3)).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


# --- more than eight bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bits_become_the_upper_eight(tmp_path, suffix):
    Image.fromarray(RAMP).save(tmp_path / f"ramp.{suffix}")
    found = sources.ImageFiles.of_folder(tmp_path)
    assert not found.have_colour()
    assert (found.read(1)[0, 0].numpy() == RAMP >> 8).all()
    assert (found.read(3)[0].numpy() == (RAMP >> 8)[None]).all()


def test_big_endian_sixteen_bits(tmp_path):
    header = struct.pack(">2sHIH", b"MM", 42, 8, 8)
    tags = [(256, 4, 32), (257, 4, 32), (258, 3, 16 << 16), (259, 3, 1 << 16), (262, 3, 1 << 16)]
    tags += [(273, 4, 8 + 2 + 12 * 8 + 4), (278, 4, 32), (279, 4, 2048)]
    entries = b"".join(struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in tags)
    (tmp_path / "ramp.tif").write_bytes(header + entries + bytes(4) + RAMP.astype(">u2").tobytes())
    assert (sources.ImageFiles.of_folder(tmp_path).read(1)[0, 0].numpy() == RAMP >> 8).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP.astype(np.int32), RAMP >> 8),
        (np.full((4, 4), -1, np.int32), "expected 16-bit values .*got -1"),
        (np.full((4, 4), 1 << 16, np.int32), "expected 16-bit values .*got 65536"),
        (np.full((4, 4), 200, np.int32), "expected 16-bit values .*got 200 to 200"),  # 8 bits in 32: it would be black
        (RAMP.astype(np.float32) / 65535, (RAMP.astype(np.float32) / 65535 * 255).round()),
        (np.full((4, 4), 200, np.float32), "expected values from 0 to 1 .*got 200"),
        (np.full((4, 4), np.nan, np.float32), "expected values from 0 to 1 .*nan"),
    ],
)
def test_thirty_two_bits(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    found = sources.ImageFiles.of_folder(tmp_path)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=rf"deep.tiff.*{expected}"):
            found.read(1)
    else:
        assert (found.read(1)[0, 0].numpy() == expected).all()


# --- folders --------------------------------------------------------------------------------------------------------


def test_hidden_files_and_folders_are_skipped(folder):
    for place in (folder / "train", folder / "train" / "ant", folder / "test"):
        for name in (".ipynb_checkpoints", "__MACOSX"):
            (place / name).mkdir()
            Image.fromarray(pixels(8, 8, 3)).save(place / name / "0-checkpoint.png")
        (place / "._0.png").write_bytes(b"\0\5\x16\7Mac OS X")
        (place / ".DS_Store").write_bytes(b"x")
        (place / "Thumbs.db").write_bytes(b"x")
    (folder / "train" / "ant" / "a folder.png").mkdir()
    data = load_train_test(f"folder:{folder}")
    assert data.train.classes == data.test.classes == ("ant", "bee")
    assert len(data.train) == 6 and len(data.test) == 6
    assert len(load_unknowns(f"folder:{folder / 'train'}", data)) == 6


@pytest.mark.parametrize("grey", ["train/ant/0.png", "test/ant/0.png", "train/bee/2.png"])
@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_one_grey_image_leaves_the_others_their_colour(folder, grey, mode):
    before = load_train_test(f"folder:{folder}")
    image = Image.fromarray(pixels(8, 8).astype(np.uint16)) if mode == "I;16" else Image.new(mode, (8, 8))
    image.save(folder / grey)
    data = load_train_test(f"folder:{folder}")
    assert data.train.images.shape == data.test.images.shape == (6, 3, 8, 8)
    split = data.train if grey.startswith("train") else data.test
    old = before.train if grey.startswith("train") else before.test
    assert (split.images != old.images).flatten(1).any(1).sum() == 1


def test_one_colour_image_in_test_makes_all_colour(folder):
    for file in folder.rglob("*.png"):
        Image.open(file).convert("L").save(file)
    assert load_train_test(f"folder:{folder}").train.images.shape[1] == 1
    Image.fromarray(pixels(8, 8, 3)).save(folder / "test" / "bee" / "2.png")
    assert load_train_test(f"folder:{folder}").train.images.shape[1] == 3


def test_splits_have_one_size(folder):
    for file in (folder / "test").rglob("*.png"):
        Image.fromarray(pixels(20, 16, 3)).save(file)
    data = load_train_test(f"folder:{folder}")
    assert data.train.images.shape[2:] == data.test.images.shape[2:] == (8, 8)


def test_a_class_folder_without_images_is_named(folder):
    (folder / "train" / "cow").mkdir()
    with pytest.raises(DataError, match=r"No images below .*train for cow: .*remove"):
        load_train_test(f"folder:{folder}")


def test_images_without_a_class_are_refused(folder):
    Image.fromarray(pixels(8, 8, 3)).save(folder / "train" / "loose.png")
    with pytest.raises(DataError, match=r"Expected images in .*train/<class>/, got loose.png right in it"):
        load_train_test(f"folder:{folder}")


def png(width, height, data=b"", *chunks):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"
BMP = b"BM" + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, 1 << 30, 1 << 30, 1, 24, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "content", [png(20000, 20000), png(9000, 9000), png(8, 8), EPS, BMP, b"", b"GIF89a" + bytes(50), b"P6 8 8 255 "]
)
def test_an_image_that_cannot_be_read_is_named(folder, content):
    """Bombs, other formats under a name of ours (an EPS would be handed to Ghostscript), and cut ones."""
    (folder / "train" / "bee" / "odd.png").write_bytes(content)
    with pytest.raises(DataError, match=r"bee/odd.png"):
        load_train_test(f"folder:{folder}")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says what it makes of damaged tags
def test_random_damage_to_images(tmp_path):
    """Each is read or refused by name; no other exception."""
    image, file = Image.fromarray(pixels(8, 8, 3)), tmp_path / "x"
    for suffix in ("png", "jpg", "bmp", "tiff", "webp", "ppm"):
        file = tmp_path / f"x.{suffix}"
        image.save(file)
        whole = np.frombuffer(file.read_bytes(), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.randint(len(whole), size=4)] = pixels(4)
            file.write_bytes(damaged.tobytes()[: rng.randint(len(whole)) if rng.rand() < 0.3 else None])
            try:
                assert sources._decode(file, "RGB", 8).shape == (3, 8, 8)
            except DataError as error:
                assert file.name in str(error)


# --- files that unpack to too much, or are damaged ------------------------------------------------------------------


def test_a_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    file = tmp_path / "images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(b"\0\0\x08\3" + struct.pack(">3I", 2, 4, 4) + bytes(10_000_000)))
    with pytest.raises(DataError, match=r"its header says \(2, 4, 4\), which is 32 bytes, but more follow"):
        sources.read_idx(file)
    file.write_bytes(gzip.compress(b"\0\0\x08\3" + struct.pack(">3I", 1 << 31, 1 << 31, 4)))
    with pytest.raises(DataError, match=r"unpacks to .* GiB"):
        sources.read_idx(file)
    for dims, sizes, message in ((255, [2**32 - 1] * 255, "no idx file"), (4, [0, *[2**32 - 1] * 3], "holds nothing")):
        file.write_bytes(gzip.compress(b"\0\0\x08" + bytes([dims]) + struct.pack(f">{dims}I", *sizes)))
        with pytest.raises(DataError, match=message):
            sources.read_idx(file)
    np.savez_compressed(tmp_path / "bomb.npz", np.zeros((1000, 64, 64), np.uint8))
    monkeypatch.setattr(sources, "MAX_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"bomb.npz unpacks to"):
        sources.read_npz_images(tmp_path / "bomb.npz")


def test_random_damage_to_npz_and_idx(tmp_path):
    np.savez(tmp_path / "x.npz", pixels(3, 8, 8))
    (tmp_path / "x").write_bytes(gzip.compress(b"\0\0\x08\3" + struct.pack(">3I", 3, 8, 8) + bytes(192)))
    for file, read in ((tmp_path / "x.npz", sources.read_npz_images), (tmp_path / "x", sources.read_idx)):
        whole = np.frombuffer(file.read_bytes(), np.uint8)
        for _ in range(150):
            damaged = whole.copy()
            damaged[rng.randint(len(whole), size=2)] = pixels(2)
            file.write_bytes(damaged.tobytes()[: rng.randint(len(whole)) if rng.rand() < 0.3 else None])
            try:
                assert len(read(file)) > 0
            except DataError as error:
                assert file.name in str(error)


# --- classes --------------------------------------------------------------------------------------------------------


def npz(tmp_path, train_labels, test_labels=None, images=None):
    test_labels = train_labels if test_labels is None else test_labels
    x = [pixels(len(np.atleast_1d(y)), 6, 6) if images is None else images for y in (train_labels, test_labels)]
    np.savez(tmp_path / "set.npz", x_train=x[0], y_train=train_labels, x_test=x[1], y_test=test_labels)
    return f"npz:{tmp_path / 'set.npz'}"


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (np.arange(30) % 3 + 1, None, "no training images of class 0. .*count from 0 without gaps"),
        (np.arange(30) % 3 * 2, None, "no training images of classes 1, 3"),
        (np.arange(30) % 3, np.arange(30) % 5, "no training images of classes 3, 4"),
        (np.zeros(30, int), None, "expected two classes at least, got 1: 0"),
        (np.array([0, 1, 10**12]), None, "number the classes from 0, got 0 to 1000000000000"),
        (np.array([0, 1, 2**64 - 1], np.uint64), None, "number the classes from 0"),
        (np.array([0, 1, 10**6]), None, "number the classes from 0, got 1000000 among 6"),
        (np.array([0, -1, 1]), None, "number the classes from 0, got -1"),
        (np.array(["ant", "bee"]), None, "expected 2 labels, integers from 0, got 2 of <U3"),
        (np.array([0.0, 1.5]), None, "integers from 0, got 2 of float64"),
        (np.array([0.0, np.nan]), None, "integers from 0, got 2 of float64"),
        (np.array([True, False]), None, "integers from 0, got 2 of bool"),
        (np.zeros(0, int), None, "expected images"),
        (np.arange(4) % 2, np.zeros(0, int), "expected images"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, train, test, message):
    with pytest.raises(DataError, match=rf"set.npz: .*{message}"):
        load_train_test(npz(tmp_path, train, test))


@pytest.mark.parametrize(
    "images", [np.zeros((2, 0, 4), np.uint8), np.array(["a", "b"]), np.zeros((2, 4, 4, 2), np.uint8)]
)
def test_arrays_that_are_no_images(tmp_path, images):
    with pytest.raises(DataError, match=r"set.npz: expected images"):
        load_train_test(npz(tmp_path, np.arange(2), images=images))


def test_a_test_split_may_lack_classes(tmp_path):
    data = load_train_test(npz(tmp_path, np.arange(12) % 4, np.arange(6) % 2))
    assert data.train.classes == data.test.classes == ("0", "1", "2", "3")


def test_limit_train_that_cuts_a_class_away(tmp_path):
    spec = npz(tmp_path, np.r_[np.zeros(50, int), np.ones(50, int), 2])
    with pytest.raises(DataError, match=r"no training images among the 5 of --limit-train of class.* 2. Expected"):
        load_train_test(spec, limit_train=5)


# --- specs ----------------------------------------------------------------------------------------------------------


def test_a_tilde_in_every_spec(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = npz(tmp_path, np.arange(12) % 2)
    known = load_train_test(spec.replace(str(tmp_path), "~"))
    np.savez(tmp_path / "images.npz", pixels(7, 6, 6))
    (tmp_path / "images-idx3-ubyte").write_bytes(b"\0\0\x08\3" + struct.pack(">3I", 7, 6, 6) + bytes(252))
    specs = ("npz:~/images.npz", "a=npz:~/images.npz", "folder:~/train/ant", "folder:~", "idx:~/images-idx3-ubyte")
    assert [len(images) for images in load_unknown_sets(specs, known)] == [7, 7, 3, 6, 7]
    with pytest.raises(DataError, match=r"nobody_of_this_name"):
        load_unknowns("npz:~nobody_of_this_name/x.npz", known)


@pytest.mark.parametrize("specs", [("noise", "noise"), ("a=noise", "a=blobs"), ("known=noise",)])
def test_names_of_ood_sets_are_distinct(specs):
    known = load_train_test("digits")
    with pytest.raises(DataError, match=r"distinct names other than 'known', got (noise|a|known)"):
        load_unknown_sets(specs, known)
    assert [s.name for s in load_unknown_sets(("noise", "other=noise"), known)] == ["noise", "other"]


@pytest.mark.parametrize("spec", [f"npz:{'x' * 300}", f"folder:{'x' * 300}", f"idx:{'x' * 5000}"])
def test_a_path_that_the_system_refuses(spec):
    with pytest.raises(DataError, match=r"Cannot read"):
        load_train_test(spec)


def test_images_that_would_not_fit_into_memory():
    with pytest.raises(DataError, match=r"GiB.*smaller --image-size"):
        load_train_test("digits", image_size=100_000)
    assert isinstance(load_train_test("digits").train.images, torch.Tensor)
