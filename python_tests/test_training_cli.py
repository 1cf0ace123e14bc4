"""The command line of training/: what it prints and how it fails."""

import json
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("pytorch_ood")

from dataclasses import fields

from uasparse_kernels.training import __main__ as cli
from uasparse_kernels.training.config import FitConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--data", "digits", "--epochs", "2", "--warmup-epochs", "1", "--no-vote", "--limit-train", "300"]
SMALL += ["--delta-t", "1"]


def call(monkeypatch, *arguments):
    """Runs the command line in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["training", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_every_setting_is_an_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    assert call(monkeypatch, "fit", "--help") == 0
    printed = capsys.readouterr().out
    for field in fields(FitConfig):
        assert "--" + field.name.replace("_", "-") in printed
    assert call(monkeypatch, "compare", "--help") == 0
    printed = capsys.readouterr().out
    assert "--arm" in printed and "--method" not in printed


def test_fit_then_evaluate(monkeypatch, capsys, tmp_path):
    run = tmp_path / "run"
    assert call(monkeypatch, "fit", *SMALL, "--ood", "noise", "--score", "msp", "--out", run, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed and "AUROC" in printed and str(run) in printed
    assert "parameters are active (" in printed and "indices; dense" in printed
    judged = tmp_path / "judged"
    assert call(monkeypatch, "evaluate", run, "--ood", "blobs", "--ood", "inverted", "--out", judged) == 0
    assert "inverted" in capsys.readouterr().out
    results = json.loads((judged / "evaluation.json").read_text())
    assert set(results["unknown"]) == {"blobs", "inverted"} and (judged / "roc.png").is_file()


def test_an_arm_sets_what_it_names(monkeypatch, capsys, tmp_path):
    arguments = ["fit", "--data", "digits", "--epochs", "4", "--limit-train", "300"]  # the warm-up of moon is longer
    arguments += [
        "--delta-t",
        "1",
        "--arm",
        "set+vote+hard-shuffle",
        "--ood",
        "noise",
        "--score",
        "u",
        "--device",
        "cpu",
    ]
    assert call(monkeypatch, *arguments, "--out", tmp_path / "run") == 0
    config = FitConfig.from_dict(json.loads((tmp_path / "run" / "config.json").read_text()))
    assert config.arm == "set+vote+hard-shuffle" and config.loss == "ce" and config.unknown_grids == (4, 2, 0)
    assert call(monkeypatch, *arguments, "--vote-fraction", "0.5", "--loss", "moon", "--out", tmp_path / "other") == 1
    assert "got both: --loss" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_compare(monkeypatch, capsys, tmp_path):
    arguments = [
        "compare",
        "--data",
        "digits",
        "--epochs",
        "1",
        "--limit-train",
        "300",
        "--arm",
        "rigl",
        "--arm",
        "dense",
    ]
    arguments += [
        "--batch-size",
        "64",
        "--delta-t",
        "1",
        "--seeds",
        "2",
        "--ood",
        "noise",
        "--score",
        "msp",
        "--out",
        str(tmp_path),
    ]
    assert call(monkeypatch, *arguments) == 0
    assert "±" in capsys.readouterr().out
    assert call(monkeypatch, *arguments) == 0
    assert "finished before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--data", "fashion"], "Unknown data set 'fashion'. Expected fashion-mnist"),
        (["fit", "--data", "folder:/nowhere"], "Expected /nowhere/train/<class>/<image>"),
        (["fit", "--data", "digits", "--ood", "npz:/nowhere.npz"], "Unknown data set|Expected an npz file|lacks|found"),
        (["fit", "--data", "digits", "--sparsity", "1.5"], "Expected sparsity in [0, 1), got 1.5"),
        (
            ["fit", "--data", "digits", "--loss", "mooon"],
            "Expected loss to be one of ce, moon, ",
        ),
        (["fit", "--data", "digits", "--model", "vgg16-bn"], "at least 32x32, got 8x8: give --image-size 32"),
        (
            ["fit", "--data", "digits", "--unknowns", "patch-shuffle", "--unknown-grid", "3"],
            "divides 8x8 images, got 3",
        ),
        (["evaluate", "/nowhere"], "Expected a checkpoint at /nowhere"),
        (["compare", "--suite", "fashions"], "Unknown suite 'fashions'. Expected one of demo"),
        (["compare", "--data", "digits", "--arm", "riggle"], "Cannot read 'riggle' in the arm 'riggle'"),
    ],
)
def test_errors_are_one_message(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert any(part in captured.err for part in ([message] if "[" in message else message.split("|")))
    assert "Traceback" not in captured.err
