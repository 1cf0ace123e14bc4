"""Prepared studies: what they plan, how options change them, runs in parallel and within a time."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("pytorch_ood")

from rich.console import Console

from uasparse_kernels.training import run as run_module
from uasparse_kernels.training.checkpoint import read_json
from uasparse_kernels.training.config import FitConfig, with_arm
from uasparse_kernels.training.data import load_train_test, load_unknowns, unknown_name
from uasparse_kernels.training.run import fit
from uasparse_kernels.training.study import compare as compare_module
from uasparse_kernels.training.study.compare import compare
from uasparse_kernels.training.study.suites import MAIN_ARMS, RELATIVE_ARMS, STUDY_ARMS, SUITES, Suite, changed, plan
from uasparse_kernels.unknowns.scores import SCORES

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = FitConfig(data="digits", epochs=2, warmup_epochs=1, delta_t=3, batch_size=64, limit_train=320, stop_fraction=0.5)
SMALL = Suite(TINY, ("rigl", "rigl+vote"), ("noise",), seeds=(0, 1), scores=("msp",), lean=True)


# --- what is planned ------------------------------------------------------------------------------------------------


def test_fashion_is_the_grid_of_the_study():
    runs = plan(SUITES["fashion"])
    assert len({run.folder for run in runs}) == len(runs)
    seeds = Counter()
    for run in runs:
        if not run.config.holdout and run.config.method != "dense":
            seeds[run.config.arm, run.config.sparsity] += 1
    assert {arm for arm, _ in seeds} == set(STUDY_ARMS) - {"dense"} | set(RELATIVE_ARMS)
    for (arm, sparsity), n in seeds.items():
        assert n == (5 if sparsity in (0.9, 0.95) else 3)
        assert arm not in RELATIVE_ARMS or sparsity == 0.99
    assert len(seeds) == 22 * 4 + 6
    splits = {run.config.holdout for run in runs} - {""}
    assert len(splits) == 6 and all(len(split.split(",")) == 3 for split in splits)
    assert {run.config.arm for run in runs if run.config.holdout} == set(MAIN_ARMS)
    assert all(("holdout" in run.unknowns) == bool(run.config.holdout) for run in runs)
    assert [run.config.seed for run in runs] == sorted(run.config.seed for run in runs)
    assert SUITES["fashion"].scores == tuple(SCORES)


def test_colour_differs_from_fashion_in_its_images_alone():
    colour, fashion = SUITES["colour"], SUITES["fashion"]
    assert replace(colour.config, data=fashion.config.data) == fashion.config
    runs = plan(colour)
    assert Counter(run.config.method for run in runs) == {"dense": 3, "rigl": 15, "set": 15}
    assert {run.config.sparsity for run in runs} == {0.0, 0.9}
    for suite in (colour, SUITES["cifar"]):  # colour images are mirrored in training, so that mirrored ones are known
        assert "mirrored" not in suite.unknowns and suite.config.data not in suite.unknowns


def test_cifar_is_the_papers_protocol():
    config = SUITES["cifar"].config
    assert (config.model, config.epochs, config.batch_size, config.precision) == ("resnet18", 100, 128, "bfloat16")
    assert (config.lr_max, config.lr_min, config.momentum, config.weight_decay) == (0.12, 0.008, 0.9, 5e-4)
    assert config.compile


def test_grids_beside_have_labels_of_their_own():
    suite = replace(SMALL, arms=("dense", "rigl"), also=(replace(SMALL, arms=("rigl",), holdouts=("1,2",)),))
    assert [run.label for run in plan(suite)] == ["dense", "rigl", "rigl without 1,2"] * 2
    suite = replace(suite, also=(replace(SMALL, seeds=(2,), sparsities=(0.8,)),))
    assert [run.label for run in plan(suite)] == ["dense", "rigl@0.9"] * 2 + ["rigl@0.8", "rigl+vote@0.8"]


def test_options_change_a_suite():
    suite = SUITES["fashion"]
    wish = Suite(
        replace(with_arm(TINY, "rigl"), epochs=7), ("rigl", "dense"), ("kmnist=npz:k.npz",), (0, 1, 2, 3), (0.95,)
    )
    new = changed(suite, wish, {"arm", "seeds", "sparsity", "epochs", "ood", "out"})
    assert new.config == replace(suite.config, epochs=7)
    assert new.unknowns == (*suite.unknowns, "kmnist=npz:k.npz")
    runs = plan(new)
    assert {run.config.arm for run in runs} == {"rigl", "dense"}
    assert {run.config.sparsity for run in runs} == {0.95, 0.0}
    assert {run.config.seed for run in runs} == {0, 1, 2, 3}
    assert not any(run.config.holdout for run in runs)  # they are at 90 % only
    assert all(run.unknowns[: len(new.unknowns)] == new.unknowns for run in runs)
    assert changed(suite, wish, set()) == suite
    with_more = changed(suite, wish, {"ood"})
    assert [grid.arms for grid in with_more.grids] == [grid.arms for grid in suite.grids]
    assert all(grid.unknowns == new.unknowns for grid in with_more.grids)


def test_unknowns_have_a_name(tmp_path):
    np.savez(tmp_path / "k.npz", arr_0=np.zeros((3, 28, 28), np.uint8))
    known = load_train_test("digits")
    loaded = load_unknowns(f"kmnist=npz:{tmp_path}/k.npz", known)
    assert loaded.name == unknown_name(f"kmnist=npz:{tmp_path}/k.npz") == "kmnist" and loaded.images.shape[-1] == 8
    assert unknown_name("npz:/a=b.npz") == "npz:/a=b.npz"


# --- running it -----------------------------------------------------------------------------------------------------


def test_parallel_runs_equal_those_in_turn(tmp_path, capsys):
    console = Console(width=200)
    summary = compare(SMALL, tmp_path / "two", device="cpu", console=console, jobs=2)
    printed = capsys.readouterr().out
    assert "[4/4]" in printed and "accuracy" in printed and "left" in printed
    in_turn = compare(SMALL, tmp_path / "one", device="cpu", console=Console(quiet=True))
    for arm, results in in_turn["arms"].items():
        for part in ("known", "unknown", "seeds"):
            assert summary["arms"][arm][part] == results[part]
    files = {file.name for file in (tmp_path / "two" / "rigl" / "seed0").iterdir()}
    assert files == {"config.json", "model.pt", "metrics.jsonl", "results.json", "fit.log"}  # lean


def test_a_study_stops_in_time_and_goes_on(tmp_path, monkeypatch):
    suite, quiet = replace(SMALL, seeds=(0,)), Console(quiet=True)
    looks = iter([0.0, math.inf])  # the first look at the clock is in time, the second too late
    monkeypatch.setattr(run_module, "time", SimpleNamespace(time=lambda: next(looks, math.inf)))
    first = compare(suite, tmp_path, device="cpu", console=quiet, minutes=10)
    assert first["arms"] == {} and first["unfinished"] == ["rigl/seed0", "rigl+vote/seed0"]
    assert len((tmp_path / "rigl/seed0/metrics.jsonl").read_text().splitlines()) == 1
    monkeypatch.undo()
    second = compare(suite, tmp_path, device="cpu", console=quiet)
    assert list(second["arms"]) == ["rigl", "rigl+vote"] and second["unfinished"] == []
    whole = fit(plan(suite)[0].config, tmp_path / "whole", scores=["msp"], device="cpu", console=quiet)
    assert whole["known"] == read_json(tmp_path / "rigl/seed0/results.json")["known"]


def test_clock_reckons_with_what_is_new(tmp_path, monkeypatch):
    runs = plan(replace(SMALL, config=replace(TINY, epochs=4)))  # four runs of four epochs
    for folder, epochs in (("rigl/seed0", 4), ("rigl+vote/seed0", 1)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.jsonl").write_text("{}\n" * epochs)
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    clock = compare_module._Clock(runs, tmp_path)
    assert clock.total == 16 and clock.done() == 5 and clock.left() == ""
    (tmp_path / "rigl+vote/seed0/metrics.jsonl").write_text("{}\n" * 3)
    monkeypatch.setattr("time.monotonic", lambda: 120.0)
    assert clock.left() == ", about 0:01:30 left"  # two epochs in 20 s, nine to go
