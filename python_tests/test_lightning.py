"""The callback for Lightning: the topology of a loop written by hand, bit for bit, resumed and in two processes."""

import logging
import os
import warnings

import processes
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import uasparse_kernels as ua
from uasparse_kernels.integrations.lightning import DynamicSparsityCallback

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
BATCHES = 6


def network(storage="auto", sparsity=0.8, seed=1):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5)).double()
    return ua.sparsify(model, sparsity, distribution="uniform", include_dense=True, storage=storage)


def batches():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCHES * 8, 12, dtype=torch.float64, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(5, (BATCHES * 8,), generator=generator)), batch_size=8)


class Module(LightningModule):
    def __init__(self, **options):
        super().__init__()
        self.net = network(**options)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Manual(Module):
    """Two optimisers of its own, which step at every batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9) for layer in (self.net[0], self.net[2])]


def callback(method="rigl", delta_t=2, **options):
    return DynamicSparsityCallback(
        method=method, delta_t=delta_t, generator=torch.Generator().manual_seed(5), **options
    )


def fit(module, *callbacks, epochs=2, ckpt_path=None, **options):
    options = {"enable_checkpointing": False, "devices": 1} | options
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, batches(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def by_hand(method, *, epochs=2, accumulate=1, total_steps=None, **options):
    model = network(**options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    topology = ua.DynamicSparsity(
        model,
        optimizer,
        method=method,
        delta_t=2,
        total_steps=total_steps or epochs * BATCHES // accumulate,
        generator=torch.Generator().manual_seed(5),
    )
    for _ in range(epochs):
        for i, (x, y) in enumerate(batches()):
            (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
            if i % accumulate == accumulate - 1:
                optimizer.step()
                topology.step()
                optimizer.zero_grad()
    return model


def assert_same(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for key in expected:
        assert torch.equal(state[key], expected[key]), key


@pytest.mark.parametrize("method, sparsity", [("rigl", 0.8), ("set", 0.8), ("granet", 0.3)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_steps_as_a_loop_by_hand_does(method, sparsity, accumulate):
    module = Module(sparsity=sparsity)
    before = module.net[0].pattern.blocks()
    counted = callback(method)
    fit(module, counted, accumulate_grad_batches=accumulate)
    assert counted.topology.steps == 2 * BATCHES // accumulate
    assert not torch.equal(module.net[0].pattern.blocks(), before)
    assert_same(module.net, by_hand(method, accumulate=accumulate, sparsity=sparsity))


def test_several_optimizers_are_one_step():
    module, counted = Manual(), callback()
    fit(module, counted)
    assert counted.topology.steps == 2 * BATCHES
    assert_same(module.net, by_hand("rigl"))


@pytest.mark.parametrize("method, sparsity", [("rigl", 0.8), ("set", 0.8), ("granet", 0.3)])
def test_an_interrupted_training_is_the_uninterrupted_one(method, sparsity, tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=BATCHES, save_top_k=-1, filename="{step}")
    fit(Module(sparsity=sparsity), saver, callback(method), enable_checkpointing=True)
    # As a new process would: another seed, another first pattern.
    module = Module(sparsity=sparsity, seed=9)
    resumed = DynamicSparsityCallback(method=method, delta_t=2)
    fit(module, resumed, ckpt_path=tmp_path / f"step={BATCHES}.ckpt")
    assert resumed.topology.steps == 2 * BATCHES
    assert_same(module.net, by_hand(method, sparsity=sparsity))


def test_checkpoints_of_others_and_endless_trainings_are_refused(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=BATCHES, save_top_k=-1, filename="{step}")
    fit(Module(), saver, enable_checkpointing=True)
    with pytest.raises(ValueError, match="without it"):
        fit(Module(), callback(), ckpt_path=tmp_path / f"step={BATCHES}.ckpt")
    with pytest.raises(ValueError, match="total_steps="):
        fit(Module(), callback(), epochs=-1)


def test_a_skipped_step_of_a_gradient_scaler_postpones_the_update():
    class Overflows(Module):
        def on_after_backward(self):
            if self.trainer.global_step == 1:  # the first update
                self.net[0].weight.grad[0] = torch.inf

    seen = []

    class Watched(DynamicSparsityCallback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            before = pl_module.net[0].pattern.blocks()
            super().on_train_batch_end(trainer, pl_module, *args)
            seen.append(not torch.equal(before, pl_module.net[0].pattern.blocks()))

    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    module = Overflows()
    fit(module, Watched(delta_t=2), plugins=[scaled])
    assert seen[:5] == [False, False, True, True, False]
    assert module.net[0].weight.isfinite().all()


class AfterEpoch(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


AVERAGES = {
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2),
    "by steps": WeightAveraging,
    "by epochs": AfterEpoch,
}


@pytest.mark.parametrize("average", AVERAGES)
def test_averages_over_a_moving_topology_are_refused(average):
    module = Module()
    with pytest.raises(ValueError, match="would average"):
        fit(module, AVERAGES[average](), callback(), epochs=3)
    # Those of weights that stay where they are go on.
    later = callback("static") if average == "by steps" else callback(stop_fraction=0.2)
    fit(Module(), AVERAGES[average](), later, epochs=3)


def train_in_two_processes(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE="2", RANK=str(rank))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from lightning.pytorch.plugins.environments import LightningEnvironment

    module, mine = Module(), callback()
    torch.manual_seed(rank)
    module.net = ua.sparsify(ua.densify(module.net), 0.8, distribution="uniform")  # each rank another pattern
    fit(module, mine, devices=2, strategy="ddp", plugins=[LightningEnvironment()])
    torch.save(module.net.state_dict(), f"{folder}/{rank}.pt")


@pytest.mark.distributed
def test_two_processes_end_alike(tmp_path):
    processes.start(train_in_two_processes, tmp_path, 2)
    mine, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
