"""What a run on a GPU does otherwise, on the CPU: channels last, a compiled network, dense-stored weights, images and
unknown ones from files that were carried there."""

import copy
import os
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchvision")

import torch

from uasparse_kernels.training import recipe
from uasparse_kernels.training.config import FitConfig, with_arm
from uasparse_kernels.training.data import load_train_test, load_unknowns
from uasparse_kernels.training.errors import DataError
from uasparse_kernels.training.recipe import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = FitConfig(
    data="digits", model="convnet", epochs=5, warmup_epochs=1, delta_t=3, batch_size=64, sparsity=0.8, storage="dense"
)


@pytest.mark.parametrize("arm", ["rigl+moon+vote", "rigl+vote+hard-shuffle"])
def test_a_run(monkeypatch, arm):
    """As a run of the CPU's kind at first, up to rounding; resumed from any epoch it goes on bit for bit."""
    data = load_train_test("digits", limit_train=320)
    config = with_arm(CONFIG, arm)
    plain = Trainer(config, data).train_epoch()
    monkeypatch.setattr(recipe, "layout_for", lambda device: torch.channels_last)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="aot_eager", **options))
    config = replace(config, compile=True)
    first = Trainer(config, data)
    weights = [p for p in first.model.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert first.train_epoch()["train_loss"] == pytest.approx(plain["train_loss"], rel=0.02)
    while first.epoch < 4:  # the vote has begun
        first.train_epoch()
    second = Trainer(config, data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    records = [trainer.train_epoch() for trainer in (first, second)]
    assert records[0]["train_loss"] == records[1]["train_loss"]
    for one, other in zip(first.result().parameters(), second.result().parameters(), strict=True):
        assert torch.equal(one, other)


def test_unknown_images_that_were_carried(tmp_path):
    """NAME.npz in the data folder comes before what a name would fetch, or make."""
    known = load_train_test("digits")
    np.savez(tmp_path / "fashion-mnist.npz", arr_0=np.full((3, 28, 28), 7, np.uint8))
    found = load_unknowns("fashion-mnist", known, data_dir=tmp_path)
    assert found.name == "fashion-mnist" and found.images.shape == (3, 1, 8, 8) and (found.images == 7).all()
    assert len(load_unknowns("noise", known, data_dir=tmp_path)) == 5000
    (tmp_path / "noise.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"noise\.npz is no readable npz file"):
        load_unknowns("noise", known, data_dir=tmp_path)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_of_a_lent_card(tmp_path):
    """Goes on from what was carried, gives the program options that it has, and packs each run; in place of Python
    stands a script that writes down how it is called."""
    pytest.importorskip("pytorch_ood")
    root = Path(__file__).parents[1]
    carried = tmp_path / ".carry" / "state"
    carried.mkdir(parents=True)
    (tmp_path / "before" / "rigl_vote" / "seed0").mkdir(parents=True)
    (tmp_path / "before" / "rigl_vote" / "seed0" / "last.pt").write_text("epoch 7")
    with tarfile.open(carried / "one.tgz", "w:gz") as tar:
        tar.add(tmp_path / "before" / "rigl_vote", arcname="rigl_vote")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    python.chmod(0o755)
    command = [
        "bash",
        str(root / "tools" / "cifar_on_gpu.sh"),
        str(tmp_path / "out"),
        "6",
        "rigl+vote",
        "rigl+moon+vote",
    ]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHON": str(python)}, check=True, capture_output=True)
    called = [line.split() for line in (tmp_path / "called").read_text().splitlines()]
    (compare,) = [words[3:] for words in called if words[:3] == ["-m", "training", "compare"]]
    with tarfile.open(tmp_path / "out" / "rigl_vote_seed0.tgz") as tar:
        assert tar.extractfile("rigl_vote/seed0/last.pt").read() == b"epoch 7"
    from typer.main import get_command

    from uasparse_kernels.training.__main__ import app

    context = get_command(app).commands["compare"].make_context("compare", list(compare))
    assert context.params["suite"] == "cifar" and context.params["jobs"] == 2 and context.params["minutes"] == 6
    assert list(context.params["arm"]) == ["rigl+vote", "rigl+moon+vote"]
    assert context.params["data_dir"] == ".carry/unknowns"
