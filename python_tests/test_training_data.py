"""Data sets, batches and synthetic unknowns of training/."""

import gzip
import struct

import numpy as np
import pytest

pytest.importorskip("torchvision")

import torch
from PIL import Image

from uasparse_kernels.training import data as data_module
from uasparse_kernels.training import sources
from uasparse_kernels.training.batches import Batches, Normalise, random_crop, random_flip
from uasparse_kernels.training.data import GENERATED, ImageSet, TrainTest, fit_images, load_train_test, load_unknowns
from uasparse_kernels.training.errors import DataError
from uasparse_kernels.unknowns.errors import UnknownsError
from uasparse_kernels.unknowns.patch_shuffle import PatchShuffle, shuffle_patches

rng = np.random.RandomState(0)


def idx_bytes(array: np.ndarray) -> bytes:
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def pixels(*shape: int) -> np.ndarray:
    return rng.randint(0, 256, shape).astype(np.uint8)


@pytest.fixture
def idx_folder(tmp_path):
    """A small data set in MNIST's own format, one half of it gzipped."""
    arrays = {}
    for split, count in (("train", 20), ("t10k", 10)):
        images, labels = pixels(count, 8, 8), (np.arange(count) % 5).astype(np.uint8)
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
        arrays[split] = images, labels
    return tmp_path, arrays


def test_idx_folder(idx_folder):
    folder, arrays = idx_folder
    loaded = load_train_test(f"idx:{folder}")
    assert loaded.train.images.shape == (20, 1, 8, 8) and loaded.train.images.dtype == torch.uint8
    assert (loaded.test.images[:, 0].numpy() == arrays["t10k"][0]).all()
    assert (loaded.train.labels.numpy() == arrays["train"][1]).all()
    assert loaded.train.classes == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[: len(b) // 2], "damaged"),
        (lambda b: b"\x1f\x8b" + bytes(100), "damaged"),
        (lambda b: b"hello", "no idx file"),
        (lambda b: gzip.compress(gzip.decompress(b)[:-3]), "its header says"),
        (lambda b: gzip.compress(gzip.decompress(b)[:9]), "cut short"),
    ],
)
def test_damaged_idx_file(idx_folder, damage, message):
    file = idx_folder[0] / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        load_train_test(f"idx:{idx_folder[0]}")
    assert str(file) in str(error.value)


def test_missing_idx_file(idx_folder):
    (idx_folder[0] / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"Expected the idx file .*t10k-labels-idx1-ubyte \(or .*gz\), found neither"):
        load_train_test(f"idx:{idx_folder[0]}")


def test_labels_that_do_not_match_the_images(idx_folder):
    (idx_folder[0] / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(19, np.uint8)))
    with pytest.raises(DataError, match=r"expected 20 labels, integers from 0, got 19"):
        load_train_test(f"idx:{idx_folder[0]}")


def test_fashion_mnist_checksum(idx_folder, monkeypatch):
    """Files of the right names and form, but other content, are refused."""
    with pytest.raises(DataError, match=r"expected SHA-256 c59f468a.*, got "):
        load_train_test("fashion-mnist", data_dir=idx_folder[0])


def test_fashion_mnist_without_files_or_network(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(data_module, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    monkeypatch.setattr(data_module.torchvision.datasets.FashionMNIST, "__init__", offline)
    with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist.*no network"):
        load_train_test("fashion-mnist", data_dir=tmp_path / "data")


@pytest.mark.skipif(not data_module.DEBIAN_FASHION_MNIST.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_fashion_mnist_of_debian():
    loaded = load_train_test("fashion-mnist", limit_train=1000)
    assert loaded.train.images.shape == (1000, 1, 28, 28) and loaded.test.images.shape == (10000, 1, 28, 28)
    assert loaded.train.classes[0] == "T-shirt/top"
    assert torch.bincount(loaded.test.labels).tolist() == [1000] * 10


def test_npz_folder_and_file(tmp_path):
    images, labels = pixels(12, 6, 6, 3), np.arange(12) % 3
    for split in ("train", "test"):
        np.savez(tmp_path / f"kmnist-{split}-imgs.npz", images)
        np.savez(tmp_path / f"kmnist-{split}-labels.npz", labels)
    np.savez(tmp_path / "all.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    for spec in (f"npz:{tmp_path}", f"npz:{tmp_path / 'all.npz'}"):
        loaded = load_train_test(spec)
        assert loaded.train.images.shape == (12, 3, 6, 6)
        assert (loaded.test.images.permute(0, 2, 3, 1).numpy() == images).all()
    unknown = load_unknowns(f"npz:{tmp_path / 'kmnist-test-imgs.npz'}", loaded)
    assert torch.equal(unknown.images, loaded.test.images)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: None, "found none"),
        (lambda p: p.write_bytes(b"PK\x03\x04 no zip"), "no readable npz"),
        (lambda p: np.savez(p, other=np.zeros(3)), "holds none of the arrays arr_0"),
        (lambda p: np.savez(p, np.zeros((3, 4, 4))), "expected images of uint8"),
        (lambda p: np.savez(p, np.zeros((3, 4), np.uint8)), "expected images"),
        (lambda p: np.savez(p, np.array([object()])), "no readable npz"),
    ],
)
def test_damaged_npz(tmp_path, write, message):
    path = tmp_path / "some.npz"
    write(path)
    with pytest.raises(DataError, match=message):
        if path.exists():
            sources.read_npz_images(path)
        else:
            load_unknowns(f"npz:{path}", load_train_test("digits"))


@pytest.fixture
def image_folder(tmp_path):
    for split in ("train", "test"):
        for index, name in enumerate(("ant", "bee")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                colour = (40 * index, 10 * number, 99)
                Image.new("RGB", (10, 8), colour).save(folder / f"{number:04}.png")
    return tmp_path


def test_image_folder(image_folder):
    loaded = load_train_test(f"folder:{image_folder}")
    assert loaded.train.classes == ("ant", "bee")
    assert loaded.train.images.shape == (6, 3, 8, 8)
    assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert loaded.train.images[4, :, 0, 0].tolist() == [40, 10, 99]
    assert load_train_test(f"folder:{image_folder}", image_size=12).test.images.shape == (6, 3, 12, 12)
    unknown = load_unknowns(f"folder:{image_folder / 'train' / 'bee'}", load_train_test("digits"))
    assert unknown.images.shape == (3, 1, 8, 8)


def test_damaged_image(image_folder):
    bad = image_folder / "train" / "bee" / "0001.png"
    bad.write_bytes(bad.read_bytes()[:50])
    with pytest.raises(DataError, match=r"bee/0001.png is no readable image"):
        load_train_test(f"folder:{image_folder}")


def test_folder_without_a_split_or_images(tmp_path):
    with pytest.raises(DataError, match=r"Expected .*/train/<class>/<image>"):
        load_train_test(f"folder:{tmp_path}")
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(DataError, match=r"No images below"):
        load_train_test(f"folder:{tmp_path}")


@pytest.mark.parametrize("spec", ["mnsit", "folder:", "cifar"])
def test_unknown_spec(spec):
    with pytest.raises(DataError, match=r"Unknown data set|Expected folder:PATH"):
        load_train_test(spec)


def test_holdout():
    every = load_train_test("digits")
    known = load_train_test("digits", holdout=(2, 7))
    assert known.train.classes == tuple("01345689")
    assert set(known.train.labels.tolist()) == set(range(8))
    left_out = (every.test.labels == 2) | (every.test.labels == 7)
    assert torch.equal(load_unknowns("holdout", known).images, every.test.images[left_out])
    assert torch.equal(known.test.images, every.test.images[~left_out])
    # Class "9" is number 7 now.
    assert torch.equal(known.test.images[known.test.labels == 7], every.test.images[every.test.labels == 9])
    with pytest.raises(DataError, match=r"needs classes held out"):
        load_unknowns("holdout", every)
    for wrong in ((10,), (-1,), tuple(range(9))):
        with pytest.raises(DataError, match=r"expected class indices from 0 to 9, leaving at least two"):
            load_train_test("digits", holdout=wrong)


@pytest.mark.parametrize("spec", ["mnist", "photos", "noise", "blobs", "textures"])
def test_generated_unknowns_are_the_same_every_time(spec):
    known = load_train_test("digits")
    first, second = (load_unknowns(spec, known).images for _ in range(2))
    assert first.shape == (5000, 1, 8, 8) and first.dtype == torch.uint8
    assert torch.equal(first, second)
    assert first.float().std() > 10


def test_textures_are_plaids_half_of_them_in_two_levels():
    known = load_train_test("digits")
    images = GENERATED["textures"](1, 28)
    levels = torch.tensor([len(image.unique()) for image in images[:200]])
    assert levels[::2].max() == 2 and levels[1::2].min() > 20
    # Smooth where not cut: neighbours differ by far less than pixels taken at random.
    smooth = images[1::2].float()
    assert (smooth[..., 1:] - smooth[..., :-1]).square().mean() < smooth.var()
    assert load_unknowns("textures", known).images.shape == (5000, 1, 8, 8)


def test_changed_test_images():
    known = load_train_test("digits")
    assert torch.equal(load_unknowns("inverted", known).images, 255 - known.test.images)
    assert torch.equal(load_unknowns("mirrored", known).images[..., 0], known.test.images[..., -1])


def test_fit_images():
    red = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    red[:, 0] = 200
    assert fit_images(red, 1, 4).unique().tolist() == [60]  # 0.299 * 200
    assert fit_images(red[:, :1], 3, 8).shape == (2, 3, 8, 8)
    assert fit_images(red, 3, 4) is red


def image_set(images: torch.Tensor) -> ImageSet:
    return ImageSet("test", images, torch.arange(len(images)) % 3, ("a", "b", "c"))


def test_normalise():
    images = torch.randint(256, (50, 3, 5, 5), dtype=torch.uint8)
    images[:, 2] = 7
    normalise = Normalise.of(images)
    x = normalise(images)
    assert x[:, :2].mean((0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(x[:, :2].std((0, 2, 3), correction=0), torch.ones(2))
    assert x[:, 2].abs().max() < 1e-5  # a constant channel stays finite


def test_random_crop_shifts_by_at_most_an_eighth():
    images = torch.randint(1, 256, (64, 1, 16, 16), dtype=torch.uint8)
    shifted = random_crop(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for image, wide in zip(shifted, padded, strict=True):
        places = [(i, j) for i in range(5) for j in range(5) if torch.equal(image, wide[:, i : i + 16, j : j + 16])]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) > 15


def test_shift_flip_reflects_a_sixteenth_at_most():
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
    data, plain = ImageSet("x", images, torch.arange(64), tuple(map(str, range(64)))), Normalise((0.0,) * 3, (1.0,) * 3)
    batches = Batches(data, plain, batch_size=64, generator=torch.Generator().manual_seed(0), augment="shift-flip")
    x, y = next(iter(batches))
    seen = set()
    for image, label in zip((255 * x).round().byte(), y, strict=True):
        wide = torch.nn.functional.pad(images[label], (2, 2, 2, 2), mode="reflect")
        for flipped in (False, True):
            original = image.flip(-1) if flipped else image
            crops = [(i, j) for i in range(5) for j in range(5)]
            seen |= {(i, j, flipped) for i, j in crops if torch.equal(original, wide[:, i : i + 32, j : j + 32])}
    assert len(seen) > 25  # of 50: all were found, and most ways occur
    assert {flipped for *_, flipped in seen} == {True, False}


def test_random_flip():
    images = torch.randint(256, (200, 1, 4, 4), dtype=torch.uint8)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    is_flipped = (flipped == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[~is_flipped], images[~is_flipped])
    assert 60 < is_flipped.sum() < 140


def test_batches_depend_on_the_generator_alone():
    data = image_set(torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8))
    normalise = Normalise.of(data.images)

    def epoch(generator):
        batches = Batches(data, normalise, batch_size=16, generator=generator, augment="crop-flip")
        return [x for x, _ in batches], len(batches)

    generator = torch.Generator().manual_seed(0)
    first, length = epoch(generator)
    state = generator.get_state()
    second, _ = epoch(generator)
    generator.set_state(state)
    again, _ = epoch(generator)
    assert length == len(first) == 3 and all(x.shape == (16, 1, 8, 8) for x in first)
    assert all(torch.equal(a, b) for a, b in zip(second, again, strict=True))
    assert not torch.equal(first[0], second[0])


def test_an_epoch_sees_each_image_once():
    images = torch.arange(48, dtype=torch.uint8).view(48, 1, 1, 1)
    batches = Batches(image_set(images), Normalise((0.0,), (1 / 255,)), batch_size=16, generator=torch.Generator())
    assert sorted(torch.cat([x.flatten() for x, _ in batches]).int().tolist()) == list(range(48))


def test_shuffled_patches_are_a_permutation():
    x = torch.arange(2 * 1 * 8 * 8, dtype=torch.float32).view(2, 1, 8, 8)
    shuffled = shuffle_patches(x, 4, torch.Generator().manual_seed(0))
    for before, after in zip(x, shuffled, strict=True):
        patches = [image.unfold(1, 2, 2).unfold(2, 2, 2).reshape(16, 4).tolist() for image in (before, after)]
        assert sorted(patches[0]) == sorted(patches[1])
        assert not torch.equal(before, after)
    assert not torch.equal(shuffled[0] + 64, shuffled[1])  # each image by its own permutation


def test_patch_shuffle_replaces_a_share_of_the_batch():
    x, y = torch.randn(32, 3, 8, 8), torch.arange(32) % 5
    before = x.clone(), y.clone()
    new_x, new_y = PatchShuffle(5, share=0.125)(x, y, torch.Generator().manual_seed(0))
    assert new_y[:4].tolist() == [5] * 4 and torch.equal(new_y[4:], y[4:])
    assert torch.equal(new_x[4:], x[4:])
    torch.testing.assert_close(new_x[:4].sum((2, 3)), x[:4].sum((2, 3)), atol=1e-4, rtol=1e-4)
    assert not torch.equal(new_x[:4], x[:4])
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_patch_shuffle_refuses_what_it_cannot_cut():
    with pytest.raises(UnknownsError, match=r"divides 9x9 images, got 4"):
        shuffle_patches(torch.zeros(1, 1, 9, 9), 4, torch.Generator())
    with pytest.raises(UnknownsError, match=r"between 0 and 1, got 1.5"):
        PatchShuffle(3, share=1.5)
    with pytest.raises(UnknownsError, match=r"of class indices, got .* and \[4, 4\] of torch.float32"):
        PatchShuffle(3, share=0.5)(torch.zeros(4, 1, 8, 8), torch.eye(4))
    with pytest.raises(UnknownsError, match=r"images \[B, C, H, W\] .*, got \[4, 8, 8\]"):
        PatchShuffle(3, share=0.5)(torch.zeros(4, 8, 8), torch.zeros(4, dtype=torch.int64))


def test_train_test_with_other_channels_is_refused(tmp_path):
    grey, colour = pixels(6, 8, 8), pixels(6, 8, 8, 3)
    labels = np.arange(6) % 2
    np.savez(tmp_path / "set.npz", x_train=colour, y_train=labels, x_test=grey, y_test=labels)
    with pytest.raises(DataError, match=r"3 channels in training, 1 in test"):
        load_train_test(f"npz:{tmp_path / 'set.npz'}")


def test_load_unknowns_takes_the_test_split(image_folder):
    known = load_train_test(f"folder:{image_folder}")
    assert isinstance(known, TrainTest)
    assert torch.equal(load_unknowns(f"folder:{image_folder}", known).images, known.test.images)


def test_validation_images_come_out_of_training():
    whole, split = load_train_test("digits"), load_train_test("digits", validation=0.1)
    assert (len(split.validation), len(split.train)) == (140, 1260) and split.validation.classes == whole.train.classes
    assert whole.validation is None and torch.equal(split.test.images, whole.test.images)

    def rows(images):
        return sorted(zip(images.images.flatten(1).tolist(), images.labels.tolist(), strict=True))

    assert sorted(rows(split.validation) + rows(split.train)) == rows(whole.train)
    again = load_train_test("digits", validation=0.1)
    assert torch.equal(again.validation.images, split.validation.images)
    assert len(load_train_test("digits", limit_train=700, validation=0.1).validation) == 70
    with pytest.raises(DataError, match=r"20 images or more to validate on, --validation 0\.01 of 1400 are 14"):
        load_train_test("digits", validation=0.01)
