"""Settings of a run: one that cannot be is one message before training, through `fit` and on the command line."""

import math
from dataclasses import fields, replace

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pytorch_ood")

import torch
from rich.console import Console

from uasparse_kernels.training import __main__ as cli
from uasparse_kernels.training.config import RANGES, FitConfig
from uasparse_kernels.training.data import ImageSet, TrainTest
from uasparse_kernels.training.errors import DataError, TrainingError
from uasparse_kernels.training.recipe import Trainer
from uasparse_kernels.training.run import fit, pick_device

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = FitConfig(data="digits", model="mlp", loss="ce", epochs=2, batch_size=16, delta_t=3, vote=False)


def images(num=64, size=(8, 8), num_classes=3):
    """A set to train on, its own test set."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (num, 1, *size), dtype=torch.uint8, generator=generator)
    both = ImageSet("made", x, torch.arange(num) % num_classes, tuple(map(str, range(num_classes))))
    return TrainTest(both, both)


def test_every_number_has_a_range():
    numbers = {f.name for f in fields(FitConfig) if f.type in ("int", "float")}
    assert numbers == RANGES.keys()


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [-(10**20), -5, math.nan, math.inf, 10**20, "1", None, True])
def test_a_number_out_of_its_range_or_of_another_type(name, value):
    if name == "seed" and value == -5:
        return
    kind = {"int": int, "float": float}[FitConfig.__dataclass_fields__[name].type]
    if kind is float and type(value) is int:
        value = float(value)
    if value == 1e20 and name in (
        "rho",
        "logit_temperature",
        "alpha_final",
        "unknown_weight",
        "weight_decay",
        "lr_max",
    ):
        return  # large, and possible
    with pytest.raises(TrainingError, match=rf"^Expected .*{name}"):
        replace(BASE, **{name: value})


@pytest.mark.parametrize("name", [f.name for f in fields(FitConfig) if f.type in ("str", "bool")])
@pytest.mark.parametrize("value", [1, None, ["ce"], 0.5])
def test_a_word_of_another_type(name, value):
    with pytest.raises(TrainingError, match=rf"^Expected {name} to be of type"):
        replace(BASE, **{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 0.0}, "sparsity above 0 with method rigl.*method dense"),
        ({"sparsity": 0.0, "method": "gmp"}, "sparsity above 0 with method gmp"),
        ({"momentum": 1.0}, r"momentum in \[0, 1\), got 1.0"),
        *[({"block": block}, "a block as 1x1") for block in ("0x0", "2x3", "-1x1", "1x4", "16", "x", "1x1x1", "")],
        ({"holdout": "99999999999999999999"}, "class indices"),
        ({"stem": "vgg"}, "stem to be one of auto, cifar, imagenet"),
        ({"unknowns": "patch-shuffle", "unknown_grid": "1"}, "at least 2 patches a side"),
        ({"unknowns": "patch-shuffle", "unknown_grid": ""}, "at least 2 patches a side"),
        ({"unknowns": "patch-shuffle", "unknown_seam": "-1"}, "seams of 0 pixels or more"),
        ({"unknowns": "patch-shuffle", "unknown_seam": "1,2"}, "one seam, or one for each"),
        ({"unknowns": "patch-shuffle", "loss": "reweight", "warmup_epochs": 1}, "no output for them"),
    ],
)
def test_settings_that_no_data_can_have(changes, message):
    with pytest.raises(TrainingError, match=message):
        replace(BASE, **changes)


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({"block": "16x16"}, images(size=(5, 5)), "layer of mlp that can be made sparse, got none.*16x16 blocks"),
        ({"method": "2:4"}, images(size=(1, 1), num_classes=3), None),
        ({"delta_t": 1000}, images(), "update of method rigl before step 6 .*of the 8 steps.*delta_t of at most 5"),
        ({"delta_t": 1000, "method": "gmp"}, images(), "update of method gmp before step 6"),
        ({"delta_t": 6, "method": "set"}, images(), "update of method set before step 6"),
        ({"delta_t": 5, "method": "set"}, images(), None),
        ({"delta_t": 1000, "method": "static"}, images(), None),
        (
            {"model": "resnet18", "batch_size": 1, "delta_t": 1},
            images(4),
            "batches of two images a process at least: batch norm",
        ),
        ({"model": "resnet18", "batch_size": 1, "delta_t": 1}, images(4, (32, 32)), None),
        ({"unknowns": "patch-shuffle", "unknown_grid": "3"}, images(), "divides 8x8 images, got 3"),
        ({"unknowns": "patch-shuffle", "unknown_seam": "2"}, images(), "seam of at most half of the 2x2"),
        ({"unknowns": "patch-shuffle", "unknown_share": 0.01}, images(), "batch of 16, got 0.01, which takes 0"),
        ({"unknowns": "patch-shuffle", "unknown_share": 0.99}, images(), "batch of 16, got 0.99, which takes 16"),
    ],
)
def test_settings_that_this_data_cannot_have(changes, data, message):
    config = replace(BASE, **changes)
    if message is None:
        Trainer(config, data)
        return
    with pytest.raises(TrainingError, match=message):
        Trainer(config, data)


def test_looking_at_the_network_first_changes_nothing(monkeypatch):
    """The trial that finds these faults leaves statistics, modes and random numbers as they were."""
    config = replace(BASE, model="convnet", delta_t=1)
    torch.manual_seed(0)
    with_trial = Trainer(config, images())
    after = torch.get_rng_state()
    monkeypatch.setattr(Trainer, "_check_forward", lambda _: None)
    without = Trainer(config, images())
    assert torch.equal(after, torch.get_rng_state())
    assert with_trial.model.training and not any(m._forward_pre_hooks for m in with_trial.model.modules())
    for a, b in zip(with_trial.model.state_dict().values(), without.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss", ["ce", "moon"])
def test_one_class_or_one_image(loss):
    config = replace(BASE, loss=loss, epochs=3, warmup_epochs=1)
    with pytest.raises(DataError, match="two classes at least, got 1: 0"):
        Trainer(config, images(num_classes=1))
    with pytest.raises(DataError, match="no training images of classes 1, 2"):
        Trainer(config, images(num=1))


def test_one_image_a_class_trains_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("uasparse_kernels.training.report.draw_run", lambda *_: [])
    data, console = images(num=12, num_classes=12), Console(quiet=True)
    results = fit(replace(BASE, batch_size=4, delta_t=2), tmp_path, data=data, console=console, unknowns=["noise"])
    assert math.isfinite(results["unknown"]["noise"]["mahalanobis"]["auroc"])


@pytest.mark.parametrize("name", ["", "gpu", "cuda:99", "meta", "cpu:1", "mps"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(TrainingError, match=r"Expected a device of auto, cpu"):
        pick_device(name)


# --- on the command line --------------------------------------------------------------------------------------------

FIT = ["fit", "--data", "digits", "--epochs", "2", "--loss", "ce", "--no-vote", "--limit-train", "300"]
OPTIONS = [
    (["--sparsity", "0"], "sparsity above 0"),
    (["--momentum", "2"], "momentum in"),
    (["--weight-decay", "-1"], "weight_decay to be at least 0"),
    (["--image-size", "-5"], "image_size to be at least 0"),
    (["--rho", "0"], "rho to be above 0"),
    (["--lr-max", "nan"], "lr_max to be above 0"),
    (["--unknown-weight", "-1"], "unknown_weight to be at least 0"),
    (["--block", "0x0"], "block as 1x1"),
    (["--block", "2x3"], "block as 1x1"),
    (["--limit-train", "-5"], "limit_train to be at least 0"),
    (["--limit-train", "3"], "no training images among the 3 of --limit-train"),
    (["--seed", str(10**30)], "seed of 63 bits"),
    (["--delta-t", "1000"], "topology update of method rigl"),
    (["--method", "gmp", "--delta-t", "1000"], "topology update of method gmp"),
    (["--device", "gpu"], "device of auto, cpu"),
    (["--threads", "-1"], "threads from 0"),
    (["--score", "mpp"], "Unknown scores mpp"),
    (["--ood", "noise", "--ood", "noise"], "distinct names"),
]


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["training", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def check_one_message(capsys, message):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_a_setting_is_refused_by_one_message(monkeypatch, capsys, tmp_path, options, message):
    monkeypatch.setattr(Trainer, "train_epoch", lambda *_: pytest.fail("trained"))
    assert call(monkeypatch, *FIT, "--delta-t", "1", *options, "--out", tmp_path / "run") == 1
    check_one_message(capsys, message)


@pytest.mark.parametrize(
    "options",
    [
        ["--seeds", "0"],
        ["--seeds", "-1"],
        ["--jobs", "-1"],
        ["--minutes", "-1"],
        ["--minutes", "nan"],
        ["--sparsity", "0"],
    ],
)
def test_compare_refuses_by_one_message(monkeypatch, capsys, tmp_path, options):
    monkeypatch.setattr("uasparse_kernels.training.study.compare._run_in_turn", lambda *_: pytest.fail("ran"))
    assert call(monkeypatch, "compare", "--data", "digits", "--delta-t", "1", *options, "--out", tmp_path) == 1
    check_one_message(capsys, "Expected")


def test_an_error_that_was_not_foreseen_is_one_message(monkeypatch, capsys, tmp_path):
    def fails(*_):
        raise ZeroDivisionError("some [fault]")

    monkeypatch.setattr(Trainer, "train_epoch", fails)
    arguments = [*FIT, "--delta-t", "1", "--out"]
    assert call(monkeypatch, *arguments, tmp_path / "a") == 1
    check_one_message(capsys, "ZeroDivisionError: some [fault]. UASPARSE_DEBUG=1 shows where")
    assert "Traceback" in (tmp_path / "a" / "fit.log").read_text()
    monkeypatch.setenv("UASPARSE_DEBUG", "1")
    monkeypatch.setattr("sys.argv", ["training", *arguments, str(tmp_path / "b")])
    with pytest.raises(ZeroDivisionError):
        cli.main()
