"""The arms of the study: losses, weight dropout, the released program's faults, and that each is scored in full."""

from dataclasses import replace

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pytorch_ood")

import torch
from pytorch_ood.loss import LogitNorm
from torch import nn
from torch.nn import functional as F

import uasparse_kernels as ua
from uasparse_kernels.training.config import ARM_PARTS, FitConfig, with_arm
from uasparse_kernels.training.data import load_train_test, load_unknowns
from uasparse_kernels.training.errors import TrainingError
from uasparse_kernels.training.evaluate import evaluate
from uasparse_kernels.training.losses import LOSSES, LossSpec
from uasparse_kernels.training.recipe import Trainer, topology_method
from uasparse_kernels.training.weight_dropout import WeightDropout
from uasparse_kernels.unknowns.errors import UnknownsError
from uasparse_kernels.unknowns.patch_shuffle import PatchShuffle, shuffle_patches
from uasparse_kernels.unknowns.scores import SCORES

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = FitConfig(
    data="digits", epochs=5, warmup_epochs=1, delta_t=3, batch_size=64, limit_train=640, sparsity=0.8,
    stop_fraction=0.7, logit_temperature=0.2,
)  # fmt: skip
STUDY_ARMS = (
    "dense", "rigl", "rigl+vote", "rigl+moon", "rigl+moon+vote", "rigl+reweight+vote", "rigl+logitnorm+vote",
    "rigl+cigl", "rigl+moon+vote+as-released", "set+moon+vote", "rigl+vote+patch-shuffle",
    "rigl+relative+vote+patch-shuffle", "rigl+relative+moon+vote+patch-shuffle+own-u",
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return load_train_test("digits", limit_train=640)


@pytest.mark.parametrize("arm", STUDY_ARMS)
def test_every_arm_trains_and_has_every_score(digits, arm):
    config = with_arm(replace(TINY, epochs=3, stop_fraction=0.6), arm)
    trainer = Trainer(config, digits)
    for _ in range(config.epochs):
        trainer.train_epoch()
    noise = load_unknowns("noise", digits).select(slice(100))
    results = evaluate(trainer.result(), digits, [noise], normalise=trainer.normalise).results
    without = {name for name, score in SCORES.items() if score.needs_unknown_output}
    assert set(results["unknown"]["noise"]) == set(SCORES) - (set() if config.has_unknown_output else without)
    assert config.has_unknown_output == ("moon" in arm or "shuffle" in arm)
    assert results["known"]["accuracy"] > 0.2


@pytest.mark.parametrize("arm", STUDY_ARMS)
def test_arm_is_its_own_name(arm):
    assert with_arm(TINY, arm).arm == arm
    assert with_arm(with_arm(TINY, "set+moon+cigl+patch-shuffle+own-u+as-released"), arm) == with_arm(TINY, arm)


def test_drop_is_the_topology_s(digits):
    method = topology_method(with_arm(TINY, "set+relative"))
    assert isinstance(method, ua.topology.SET) and method.drop is ua.topology.relative_magnitude
    granet = topology_method(replace(TINY, method="granet", drop="relative", sparsity=0.7))
    assert granet.drop is ua.topology.relative_magnitude and granet.final_sparsity == 0.7
    assert topology_method(with_arm(TINY, "rigl")).drop is ua.topology.magnitude
    with pytest.raises(TrainingError, match="method of set, rigl, granet with drop relative, got mest"):
        replace(TINY, method="mest", drop="relative")


def test_tokens_are_unique():
    tokens = [token for kind in ARM_PARTS.values() for token in kind]
    assert len(tokens) == len(set(tokens))


# --- losses ---------------------------------------------------------------------------------------------------------


def test_reweight_is_cross_entropy_with_weight_on_wrong_samples():
    loss_fn = LOSSES["reweight"](LossSpec(num_classes=4, epochs=5, warmup_epochs=1))
    assert loss_fn.num_outputs == 4
    logits, target = torch.randn(16, 4, requires_grad=True), torch.randint(4, (16,))
    h = F.cross_entropy(logits.detach(), target, reduction="none")
    torch.testing.assert_close(loss_fn(logits, target), h.mean())  # the warm-up
    assert float(loss_fn.average) == pytest.approx(float(h.mean()))
    loss_fn.step_epoch()
    alpha = float(loss_fn.alpha)
    assert alpha == pytest.approx(float(h.mean()) / 64)
    weight = 1 + alpha * (logits.argmax(1) != target)
    expected = (weight * F.cross_entropy(logits, target, reduction="none")).mean()
    loss = loss_fn(logits, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))
    for _ in range(3):
        loss_fn.step_epoch()
    assert float(loss_fn.alpha) == pytest.approx(1.0)
    with pytest.raises(TrainingError, match="no synthetic unknowns"):
        LOSSES["reweight"](LossSpec(4, 5, with_unknowns=True, warmup_epochs=1))


def test_logitnorm_is_pytorch_oods():
    loss_fn = LOSSES["logitnorm"](LossSpec(num_classes=4, epochs=5, logit_temperature=0.1))
    logits, target = torch.randn(16, 4, requires_grad=True), torch.randint(4, (16,))
    values = loss_fn(logits, target), LogitNorm(t=0.1)(logits, target)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in values), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss_fn(3 * logits, target), values[0])


# --- CigL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_weight_dropout(storage):
    model = ua.sparsify(
        nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)), 0.5, distribution="uniform", storage=storage
    )
    dropout, x = WeightDropout(model, 0.25), torch.randn(8, 40)
    before = [layer.weight.detach().clone() for layer in dropout.layers]
    dropout.draw()
    with dropout:
        masked = model(x)
        masked.square().sum().backward()
    for layer, weight in zip(dropout.layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
    shares = [float(mask.mean()) for mask in dropout.masks]
    assert len(shares) == 2 and all(0.6 < share < 0.9 for share in shares)
    gradients = [layer.weight.grad.clone() for layer in dropout.layers]
    model.zero_grad()

    # The same network with the masked weights for good.
    for layer, mask in zip(dropout.layers, dropout.masks, strict=True):
        layer.weight.data.mul_(mask)
    output = model(x)
    output.square().sum().backward()
    torch.testing.assert_close(masked, output)
    for layer, mask, gradient in zip(dropout.layers, dropout.masks, gradients, strict=True):
        torch.testing.assert_close(gradient, mask * layer.weight.grad)


def test_cigl_averages_the_masked_weights(digits):
    trainer = Trainer(replace(with_arm(TINY, "rigl+cigl"), vote_fraction=0.2, votes_per_epoch=1), digits)
    for _ in range(5):
        trainer.train_epoch()
    layer = trainer.dropout.layers[-1]
    averaged = dict(trainer.vote.averaged.module.named_modules())
    name = next(n for n, m in trainer.model.named_modules() if m is layer)
    torch.testing.assert_close(averaged[name].weight, layer.weight * trainer.dropout.masks[-1])
    assert (trainer.dropout.masks[-1] == 0).any() and (layer.weight != 0).all()


def test_cigl_needs_sparse_layers():
    with pytest.raises(TrainingError, match="sparse method with weight_dropout"):
        with_arm(TINY, "dense+cigl")


# --- as released ----------------------------------------------------------------------------------------------------


def test_as_released_stops_the_topology_and_votes_early(digits, monkeypatch):
    config = with_arm(replace(TINY, delta_t=2, votes_per_epoch=5), "rigl+moon+vote+as-released")
    trainer = Trainer(config, digits)
    assert trainer.total_steps == 50
    assert trainer.topology.schedule.end == 4  # 0.7 * 5 epochs, taken as steps
    assert not trainer.topology.schedule.is_update(4) and trainer.topology.schedule.is_update(2)
    assert [index for index in range(10) if trainer._is_vote(index)] == [0, 1]
    right = Trainer(replace(config, as_released=False), digits)
    assert right.topology.schedule.end == 35
    assert [index for index in range(10) if right._is_vote(index)] == [1, 3, 5, 7, 9]
    for _ in range(5):
        trainer.train_epoch()
    assert int(trainer.vote.averaged.n_averaged) == 2


def test_as_released_is_of_rigl_and_set():
    with pytest.raises(TrainingError, match="rigl or set with as_released, got gmp"):
        with_arm(TINY, "gmp+as-released")


# --- synthetic unknowns ---------------------------------------------------------------------------------------------


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("grid", "seam"), [(2, 1), (2, 4), (4, 2)])
def test_soft_seams_fade(grid, seam):
    side = 16 // grid
    assert torch.allclose(shuffle_patches(torch.full((2, 3, 16, 16), 5.0), grid, generator(), seam), torch.tensor(5.0))
    # An image that is one number a patch: away from the seams the same numbers in another order, between them a fade.
    x = torch.arange(float(grid * grid)).view(1, 1, grid, grid).repeat_interleave(side, 2).repeat_interleave(side, 3)
    hard, soft = (shuffle_patches(x, grid, generator(), width) for width in (0, seam))
    assert not torch.equal(hard, x)
    middle = torch.zeros(16, dtype=torch.bool)
    for patch in range(grid):
        middle[patch * side + seam : (patch + 1) * side - seam] = True
    if middle.any():
        assert torch.allclose(soft[0, 0, middle][:, middle], hard[0, 0, middle][:, middle])
    assert not torch.equal(soft, hard)
    assert soft.min() >= x.min() and soft.max() <= x.max()


def test_several_grids_share_the_unknowns():
    x = torch.rand(32, 1, 8, 8)
    new, labels = PatchShuffle(9, share=0.25, grids=(2, 4))(x, torch.zeros(32, dtype=torch.int64), generator())
    assert labels.tolist() == [9] * 8 + [0] * 24

    def halves(image):
        return sorted(quarter.sum().item() for rows in image.split(4, 1) for quarter in rows.split(4, 2))

    same_halves = [halves(a) == pytest.approx(halves(b), abs=1e-4) for a, b in zip(new[:8], x[:8], strict=True)]
    assert same_halves[:4] == [True] * 4 and not all(same_halves[4:])  # quarters stay whole on a grid of 2


def test_a_grid_of_0_shuffles_pixels():
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    new = shuffle_patches(x, 0, generator())
    order = new[:, 0].flatten(1) - torch.tensor([[0.0], [72.0]])  # which pixel came where
    assert torch.equal(order.sort(1).values, torch.arange(24.0).expand(2, -1))
    assert not torch.equal(order[0], order[1])
    taken = x.flatten(2).gather(2, order.long()[:, None].expand(-1, 3, -1))
    assert torch.equal(new.flatten(2), taken)  # the channels of a pixel stay together


def test_settings_of_unknowns():
    config = with_arm(TINY, "rigl+vote+mixed-shuffle")
    assert (config.unknowns, config.unknown_grids, config.unknown_seams) == ("patch-shuffle", (4, 4, 2), (0, 3, 0))
    assert config.arm == "rigl+vote+mixed-shuffle"
    config = with_arm(TINY, "rigl+vote+hard-shuffle")
    assert (config.unknowns, config.unknown_grids, config.unknown_seams) == ("patch-shuffle", (4, 2, 0), (0,))
    assert config.arm == "rigl+vote+hard-shuffle"
    with pytest.raises(TrainingError, match="patches per side as 4 or 2,4"):
        replace(TINY, unknown_grid="two")
    with pytest.raises(UnknownsError, match="one for each of 3 grids, got 2"):
        PatchShuffle(9, grids=(2, 4, 8), seams=(0, 1))
    with pytest.raises(UnknownsError, match="half of the 2x2 patches, got 2"):
        shuffle_patches(torch.rand(1, 1, 8, 8), 4, generator(), 2)
