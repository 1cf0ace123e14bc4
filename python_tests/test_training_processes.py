"""`fit` on two processes (gloo): one network, the one that a single process trains with the same batches."""

import os
from dataclasses import replace

import processes
import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pytorch_ood")

import torch
import torch.distributed as dist
from rich.console import Console

import uasparse_kernels as ua
from uasparse_kernels.training import recipe, report
from uasparse_kernels.training.checkpoint import load_checkpoint, read_json
from uasparse_kernels.training.config import FitConfig, with_arm
from uasparse_kernels.training.data import load_train_test
from uasparse_kernels.training.errors import TrainingError
from uasparse_kernels.training.processes import joined, rank_and_world
from uasparse_kernels.training.run import fit

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = FitConfig(
    data="digits", model="mlp", epochs=4, warmup_epochs=1, delta_t=3, batch_size=64, limit_train=320, sparsity=0.8
)
CONFIG = with_arm(TINY, "rigl+moon+vote+patch-shuffle")


def in_float64(build=recipe.build_network):
    """So that sums in another order change nothing that is chosen."""

    def double(*args):
        model, loss = build(*args)
        model.double().register_forward_pre_hook(to_double)
        return model, loss.double()

    return double


def to_double(module, inputs):
    return (inputs[0].double(),)


def train(folder, config=CONFIG, **options):
    data = load_train_test("digits", limit_train=320)
    return fit(config, folder, console=Console(quiet=True), data=data, scores=["msp"], **({"device": "cpu"} | options))


def stop_after(epochs):
    train_epoch = recipe.Trainer.train_epoch

    def limited(trainer, *args):
        if trainer.epoch == epochs:
            raise KeyboardInterrupt
        return train_epoch(trainer, *args)

    return limited


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    report.draw_run = lambda *_: []
    recipe.build_network = in_float64()
    with joined("auto") as device:
        assert rank_and_world() == (rank, 2)
        results = train(folder / "whole", device=device)
        assert bool(results) == (rank == 0)
        whole = recipe.Trainer.train_epoch
        recipe.Trainer.train_epoch = stop_after(2)
        with pytest.raises(KeyboardInterrupt):
            train(folder / "cut")
        dist.barrier()
        recipe.Trainer.train_epoch = whole
        train(folder / "cut", resume=True)
        with pytest.raises(TrainingError, match="processes can share"):
            recipe.Trainer(replace(CONFIG, batch_size=63), load_train_test("digits", limit_train=320))
        torch.save(average(rank), folder / f"average-{rank}.pt")
    assert not dist.is_initialized()


@pytest.mark.distributed
def test_two_processes_train_one_network(tmp_path, monkeypatch):
    processes.start(worker, tmp_path, 2)
    the_threshold_is_that_of_the_whole_batch(tmp_path)
    monkeypatch.setattr(report, "draw_run", lambda *_: [])
    monkeypatch.setattr(recipe, "build_network", in_float64())
    one = train(tmp_path / "one")
    assert len((tmp_path / "whole" / "fit.log").read_text().splitlines()) < 12  # one process's lines
    expected = load_checkpoint(tmp_path / "one" / "last.pt")
    for name in ("whole", "cut"):
        state = load_checkpoint(tmp_path / name / "last.pt")
        for part in ("model", "vote", "loss"):
            for key, value in expected[part].items():
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(state[part][key], value, msg=f"{name} {part} {key}")
        for mine, theirs in zip(state["history"], expected["history"], strict=True):
            assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-9)
            assert mine["train_accuracy"] == theirs["train_accuracy"]
            assert mine["alpha"] == pytest.approx(theirs["alpha"])
        found = read_json(tmp_path / name / "results.json")["known"]
        assert all(found[key] == pytest.approx(one["known"][key]) for key in ("accuracy", "ece", "nll"))


def average(rank):
    """What the loss of a process with half of each batch has found."""
    loss = ua.UnknownAwareLoss(4, warmup_epochs=1, total_epochs=3, process_group=dist.group.WORLD).double()
    for logits, target in batches():
        loss(logits[rank::2].requires_grad_(), target[rank::2]).backward()
    return loss.average


def batches():
    """In the second, one process has no known samples; in the third, none has."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 6, 5, dtype=torch.float64, generator=generator)
    targets = torch.tensor([[0, 4, 1, 2, 4, 3], [4, 0, 4, 1, 4, 2], [4] * 6, [0, 1, 2, 3, 0, 1]])
    return list(zip(logits, targets, strict=True))


def the_threshold_is_that_of_the_whole_batch(folder):
    loss = ua.UnknownAwareLoss(4, warmup_epochs=1, total_epochs=3).double()
    for logits, target in batches():
        loss(logits.requires_grad_(), target).backward()
    for rank in range(2):
        torch.testing.assert_close(torch.load(folder / f"average-{rank}.pt"), loss.average)
