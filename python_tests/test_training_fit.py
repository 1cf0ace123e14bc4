"""Runs of training/ on scikit-learn's 8x8 digits: resuming, stopping, the vote, checkpoints, studies."""

import errno
import json
import math
import resource
import signal
import time
from dataclasses import replace

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pytorch_ood")

import torch
from rich.console import Console
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels.training import recipe, report
from uasparse_kernels.training.checkpoint import load_checkpoint, read_json, save_checkpoint
from uasparse_kernels.training.config import FitConfig, with_arm
from uasparse_kernels.training.data import ImageSet, TrainTest, load_train_test
from uasparse_kernels.training.demo import demo
from uasparse_kernels.training.errors import CheckpointError, NonFiniteLossError, TrainingError
from uasparse_kernels.training.evaluate import evaluate_checkpoint, load_model
from uasparse_kernels.training.losses import LOSSES, LossSpec
from uasparse_kernels.training.models import MODELS, build_model
from uasparse_kernels.training.recipe import Trainer, learning_rate
from uasparse_kernels.training.run import fit
from uasparse_kernels.training.study.compare import compare, spread
from uasparse_kernels.training.study.suites import Suite, plan
from uasparse_kernels.unknowns import Vote
from uasparse_kernels.unknowns.errors import UnknownsError
from uasparse_kernels.unknowns.head import head_of
from uasparse_kernels.unknowns.scores import SCORES

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = FitConfig(
    data="digits", model="convnet", epochs=5, warmup_epochs=1, delta_t=3, batch_size=64, limit_train=640, sparsity=0.8
)
QUIET = Console(quiet=True)


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes longer than these runs; test_run_folder_and_evaluate and the demo draw."""
    monkeypatch.setattr(report, "draw_run", lambda *_: [])


@pytest.fixture(scope="module")
def digits():
    return load_train_test("digits", limit_train=640)


def run(config, folder, data, **options):
    return fit(config, folder, device="cpu", console=QUIET, data=data, scores=["msp", "u"], **options)


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["rigl+moon+vote", "set+vote+patch-shuffle", "static", "dense+moon", "rigl+cigl"])
@pytest.mark.parametrize("interrupted_step", [23, 44])  # in the third epoch, and in the last one, where the vote runs
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, digits, monkeypatch, arm, interrupted_step, no_figures):
    config = with_arm(TINY, arm)
    whole = run(config, tmp_path / "whole", digits, unknowns=["noise"])

    update = Trainer._update_weights

    def interrupt(trainer):
        if trainer.step == interrupted_step:
            raise KeyboardInterrupt
        update(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update_weights", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "cut", digits, unknowns=["noise"])
    assert not (tmp_path / "cut" / "results.json").exists()
    torch.manual_seed(987)  # whatever ran in between must not matter
    resumed = run(config, tmp_path / "cut", digits, unknowns=["noise"], resume=True)

    for name in ("model.pt", "last.pt"):
        first, second = (load_checkpoint(tmp_path / folder / name) for folder in ("whole", "cut"))
        assert_equal(*(without_seconds(state) for state in (first, second)))
    assert_equal(whole["known"], resumed["known"])
    assert_equal(whole["unknown"], resumed["unknown"])
    lines = [(tmp_path / folder / "metrics.jsonl").read_text().splitlines() for folder in ("whole", "cut")]
    assert_equal(*([without_seconds(json.loads(line)) for line in part] for part in lines))


def test_compute_seconds_leave_out_waiting(digits):
    record = Trainer(TINY, digits).train_epoch(lambda *_: time.sleep(0.05))
    assert 0 < record["compute_seconds"] < record["seconds"] - 0.05


def without_seconds(state):
    if isinstance(state, dict):
        return {key: without_seconds(value) for key, value in state.items() if not str(key).endswith("seconds")}
    return [without_seconds(value) for value in state] if isinstance(state, list) else state


def assert_equal(first, second):
    """Bit for bit, through nested containers."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_equal(a, b)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def test_folder_of_another_run_is_refused(tmp_path, digits, no_figures):
    run(replace(TINY, epochs=2, warmup_epochs=1, vote=False), tmp_path, digits)
    with pytest.raises(CheckpointError, match=r"holds a run already .*Use --resume"):
        run(TINY, tmp_path, digits)
    with pytest.raises(CheckpointError, match=r"other settings: .*epochs: 2 and 5"):
        run(TINY, tmp_path, digits, resume=True)


def test_seeds_differ_and_repeat(tmp_path, digits, no_figures):
    states = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(replace(TINY, epochs=2, vote=False, seed=seed), tmp_path / folder, digits)
        states.append(load_checkpoint(tmp_path / folder / "model.pt")["result"])
    assert_equal(states[0], states[1])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0] if states[0][key].dim() == 1)


# --- a loss that is not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_fit_stops_at_a_loss_that_is_not_finite(tmp_path, digits, monkeypatch, value):
    class Breaks(LOSSES["ce"]):
        calls = 0

        def forward(self, logits, target):
            Breaks.calls += 1
            return super().forward(logits, target) * (value if Breaks.calls == 14 else 1.0)

    monkeypatch.setitem(LOSSES, "ce", Breaks)
    config = with_arm(TINY, "rigl")
    with pytest.raises(NonFiniteLossError, match=r"at step 13 \(epoch 2\).*after epoch 1, is .*last.pt") as error:
        run(config, tmp_path, digits)
    assert error.value.step == 13
    kept = load_checkpoint(tmp_path / "last.pt")
    assert kept["epoch"] == 1 and kept["step"] == 10
    assert all(v.isfinite().all() for v in kept["model"].values())
    assert "step 13" in (tmp_path / "fit.log").read_text()
    assert not (tmp_path / "results.json").exists()


def test_the_first_bad_step_is_remembered_between_looks():
    """As on a GPU, where the loss is looked at only now and then."""
    check = recipe._FiniteCheck(torch.device("cpu"))
    check.every = 50
    for step in range(1, 30):
        check(torch.tensor(math.nan if step in (7, 9) else 1.0), step, epoch=0)
    with pytest.raises(NonFiniteLossError) as error:
        check.raise_if_found(0)
    assert error.value.step == 7


# --- the vote -------------------------------------------------------------------------------------------------------


def sparse_mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    return ua.sparsify(model, 0.5)


def test_vote_refuses_a_topology_that_changes():
    model = sparse_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = ua.DynamicSparsity(model, optimizer, method="set", total_steps=8, delta_t=2, stop_fraction=0.5)
    with pytest.raises(UnknownsError, match=r"Expected a frozen topology"):
        Vote(model, topology)
    while not topology.frozen:
        model(torch.randn(4, 12)).sum().backward()
        topology.step()
    vote = Vote(model, topology)
    topology = type("Thawed", (), {"frozen": False})()
    vote.topology = topology
    with pytest.raises(UnknownsError, match=r"Expected a frozen topology"):
        vote.update(model)


def test_vote_is_the_mean_with_fresh_batch_norm():
    model = sparse_mlp()
    vote = Vote(model)
    weights = []
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
        vote.update(model)
    batches = [(torch.randn(32, 12) + 3, torch.zeros(32)) for _ in range(4)]
    result = vote.result(batches)
    for averaged, seen in zip(result.parameters(), zip(*weights, strict=True), strict=True):
        torch.testing.assert_close(averaged, torch.stack(seen).mean(0))
    with torch.no_grad():
        hidden = result[0](torch.cat([x for x, _ in batches]))
    torch.testing.assert_close(result[1].running_mean, hidden.mean(0))
    for mine, theirs in zip(result.modules(), model.modules(), strict=True):
        if isinstance(mine, ua.SparseLinear):
            assert mine.pattern.equal(theirs.pattern)
    assert not result.training
    with pytest.raises(UnknownsError, match=r"at least one update"):
        Vote(model).result(batches)
    expected, batches = result[1].running_mean.clone(), iter(batches)
    assert torch.equal(vote.result(batches)[1].running_mean, expected)
    with pytest.raises(UnknownsError, match=r"got none; a generator"):
        vote.result(batches)
    assert torch.equal(result[1].running_mean, expected)


def test_fit_refuses_a_vote_before_the_topology_is_frozen(digits):
    with pytest.raises(TrainingError, match=r"vote starts after 80% .*until stop_fraction 90%.*at most 0.8"):
        Trainer(replace(TINY, stop_fraction=0.9), digits)


# --- training itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update_step", ["instead", "extra"])
def test_update_step(digits, monkeypatch, update_step):
    trainer = Trainer(replace(TINY, update_step=update_step), digits)
    steps = []
    step = trainer.optimizer.step
    monkeypatch.setattr(trainer.optimizer, "step", lambda: steps.append(trainer.step) or step())
    trainer.train_epoch()
    updates = {2, 5, 8}  # every third of the ten steps
    assert steps == [n for n in range(10) if update_step == "extra" or n not in updates]


def test_counts_stay_exact(digits):
    trainer = Trainer(TINY, digits)
    layers = [m for m in trainer.model.modules() if isinstance(m, ua.SparseLinear | ua.SparseConv2d)]
    before = [(layer.pattern.nnz, layer.pattern.to_mask().clone()) for layer in layers]
    for _ in range(5):
        trainer.train_epoch()
    assert trainer.topology.frozen and int(trainer.vote.averaged.n_averaged) == 10
    for layer, (nnz, mask) in zip(layers, before, strict=True):
        assert layer.pattern.nnz == nnz
        assert layer.pattern.density == 1 or not torch.equal(layer.pattern.to_mask(), mask)


def test_learning_rate():
    assert learning_rate(0, 80, 0.12, 0.008) == pytest.approx(0.12)
    assert learning_rate(40, 80, 0.12, 0.008) == pytest.approx(0.064)
    assert [learning_rate(n, 80, 0.12, 0.008) for n in (80, 81, 1000)] == pytest.approx([0.008] * 3)
    rising = [learning_rate(n, 80, 0.12, 0.008, rise_steps=3) for n in range(200)]
    assert rising[:4] == pytest.approx([0.03, 0.06, 0.09, 0.12]) and rising[80:] == pytest.approx([0.008] * 120)
    assert rising[3:81] == sorted(rising[3:81], reverse=True)


def test_whitened_patches_have_unit_variance():
    """Components of the training images' patches, and their negatives; a network that goes on keeps its filters."""
    images = torch.randint(256, (40, 3, 12, 12), dtype=torch.uint8).float().cumsum(-1).remainder(256).byte()
    data = ImageSet("x", images, torch.arange(40) % 4, tuple("abcd"))
    config = FitConfig(model="quicknet", method="dense", loss="ce", vote=False, epochs=1, batch_size=8, lr_rise=0.5)
    trainer = Trainer(config, TrainTest(data, data))
    responses = trainer.model.whitening(trainer.normalise(images)).transpose(0, 1).flatten(1).double()
    assert torch.equal(responses[:12], -responses[12:])
    torch.testing.assert_close(responses[:12].cov(correction=0), torch.eye(12).double(), atol=2e-2, rtol=0)
    before = trainer.model.whitening.filters.clone()
    trainer.train_epoch()
    assert torch.equal(trainer.model.whitening.filters, before)
    other = TrainTest(replace(data, images=255 - images.flip(0)), data)
    assert torch.equal(Trainer(config, other, start=trainer.model).model.whitening.filters, before)


def test_it_learns(tmp_path, digits, no_figures):
    for arm in ("rigl", "rigl+moon+vote", "set+vote+patch-shuffle"):
        results = run(replace(with_arm(TINY, arm), epochs=8), tmp_path / arm, digits)
        assert results["known"]["accuracy"] > 0.8
        assert ("mean_u" in results["known"]) == (arm != "rigl") and 0 < results["known"].get("mean_u", 0.01) < 0.1
        cost = results["cost"]
        assert cost["memory_bytes"] < 0.5 * cost["dense_memory_bytes"]
        held_by_model = sum(t.nbytes for t in torch.load(tmp_path / arm / "model.pt")["result"].values())
        assert cost["vote_bytes"] == (held_by_model if "vote" in arm else 0)


@pytest.mark.parametrize(
    ("method", "density"), [("mest", 0.2), ("gmp", 0.2), ("granet", 0.2), ("srigl", 0.2), ("2:4", 0.5)]
)
def test_every_method_ends_at_its_density_and_is_read_back(tmp_path, digits, no_figures, method, density):
    config = replace(with_arm(TINY, f"{method}+vote"), epochs=3, stop_fraction=0.6, distribution="uniform")
    run(config, tmp_path, digits)
    model, _, _ = load_model(tmp_path)
    layers = [m for m in model.modules() if isinstance(m, ua.nn.SparseLayer)]
    active, all_ = sum(m.pattern.nnz for m in layers), sum(math.prod(m.pattern.shape) for m in layers)
    assert active / all_ == pytest.approx(density, abs=0.02 if method == "srigl" else 0.002)


def test_cross_entropy_with_unknowns_is_weighted_cross_entropy():
    loss_fn = LOSSES["ce"](LossSpec(num_classes=3, epochs=5, with_unknowns=True, unknown_weight=0.25))
    logits, target = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 3, 1, 2, 3, 0])
    weight = torch.where(target == 3, 0.25, 1.0)
    expected = (nn.functional.cross_entropy(logits, target, reduction="none") * weight).mean()
    torch.testing.assert_close(loss_fn(logits, target), expected)
    assert loss_fn.num_outputs == 4 and LOSSES["ce"](LossSpec(3, 5)).num_outputs == 3


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet34", "resnet50")])
def test_models(name):
    size = 32 if name == "vgg16-bn" else 16
    model = build_model(name, 11, 1, size).eval()
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 11)
    assert head_of(model).out_features == 11
    if name != "mlp":
        sparse = ua.sparsify(model, 0.9)
        assert sparse(torch.zeros(2, 1, size, size)).shape == (2, 11)


def test_imagenet_stem_and_small_images():
    assert build_model("resnet18", 5, 3, 224).conv1.kernel_size == (7, 7)
    assert build_model("resnet18", 5, 3, 32).conv1.kernel_size == (3, 3)
    with pytest.raises(TrainingError, match=r"at least 32x32, got 28x28"):
        build_model("vgg16-bn", 10, 1, 28)


# --- files ----------------------------------------------------------------------------------------------------------


def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    """The limit on file sizes makes the system refuse a write midway, as a full disk does."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"config": {}, "weights": torch.ones(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(CheckpointError, match=r"Could not write .*last.pt.*the old last.pt is untouched"):
            save_checkpoint(path, {"config": {}, "weights": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.equal(load_checkpoint(path)["weights"], torch.ones(10))
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]  # nothing half-written is left


def test_full_disk_stops_fit_and_it_resumes(tmp_path, digits, monkeypatch, no_figures):
    real, calls = torch.save, []

    def full_disk(state, file):
        calls.append(0)
        if len(calls) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, file)

    config = with_arm(TINY, "rigl")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(CheckpointError, match=r"No space left on device.*old last.pt is untouched"):
            run(config, tmp_path, digits)
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 2
    run(config, tmp_path, digits, resume=True)
    assert (tmp_path / "results.json").is_file()


def test_damaged_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match=r"Expected a checkpoint at .*found none"):
        load_checkpoint(tmp_path / "last.pt")
    (tmp_path / "last.pt").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=r"damaged or no checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
    torch.save({"weights": torch.ones(1)}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"expected a dict with 'config'"):
        load_checkpoint(tmp_path / "last.pt")


def test_checkpoint_of_another_architecture(tmp_path, digits, no_figures):
    run(replace(with_arm(TINY, "rigl"), epochs=1), tmp_path, digits)
    state = load_checkpoint(tmp_path / "model.pt")
    state["config"]["model"] = "mlp"
    save_checkpoint(tmp_path / "model.pt", state)
    with pytest.raises(CheckpointError, match=r"does not hold the mlp"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"a checkpoint to resume from"):
        load_model(tmp_path / "last.pt")


def test_run_folder_and_evaluate(tmp_path, digits):
    config = replace(TINY, epochs=2, vote=False)
    results = fit(config, tmp_path, unknowns=["noise", "mirrored"], device="cpu", console=QUIET, data=digits)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {
        "config.json", "last.pt", "model.pt", "metrics.jsonl", "results.json", "scores.npz", "fit.log",
        "training.png", "roc.png", "scores.png", "reliability.png",
    }  # fmt: skip
    assert FitConfig.from_dict(read_json(tmp_path / "config.json")) == config
    assert set(results["unknown"]) == {"noise", "mirrored"} and len(results["unknown"]["noise"]) == len(SCORES)
    assert read_json(tmp_path / "results.json") == results

    again = evaluate_checkpoint(tmp_path, ["mirrored", "blobs"])
    assert again.results["known"] == results["known"]
    assert again.results["unknown"]["mirrored"] == results["unknown"]["mirrored"]
    assert "blobs" in again.results["unknown"]
    with pytest.raises(TrainingError, match=r"Unknown scores mpp"):
        evaluate_checkpoint(tmp_path, ["noise"], scores=["mpp"])


def test_holdout_is_an_unknown_set(tmp_path, no_figures):
    config = replace(with_arm(TINY, "rigl"), epochs=1, holdout="8,9")
    results = fit(config, tmp_path, unknowns=["holdout"], device="cpu", console=QUIET, scores=["msp"])
    assert results["unknown_images"]["holdout"] + results["known"]["images"] == 397
    assert evaluate_checkpoint(tmp_path, ["holdout"], scores=["msp"]).results["unknown"] == results["unknown"]


# --- arms and studies -----------------------------------------------------------------------------------------------


def test_arms():
    config = with_arm(TINY, "set+moon+vote+patch-shuffle")
    assert (config.method, config.loss, config.vote, config.unknowns) == ("set", "moon", True, "patch-shuffle")
    assert config.arm == "set+moon+vote+patch-shuffle" and with_arm(TINY, "rigl+ce").arm == "rigl"
    assert with_arm(config, "dense") == with_arm(TINY, "dense+ce")
    for wrong in ("rigl+set", "rigle", "", "moon+moon"):
        with pytest.raises(TrainingError, match=r"Cannot read"):
            with_arm(TINY, wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity in \[0, 1\), got 1.0"),
        ({"epochs": 1}, "warmup_epochs below the 1 epochs"),
        ({"lr_min": 0.2}, "0 < lr_min <= lr_max"),
        ({"block": "16"}, "block as 1x1"),
        ({"holdout": "a,b"}, "class indices as 7,8,9"),
        ({"model": "resnet19"}, "model to be one of"),
        ({"vote_fraction": 0.0}, "vote_fraction in"),
        ({"batch_size": 0}, "batch_size to be at least 1"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(TrainingError, match=message):
        replace(TINY, **changes)


def study(**changes):
    config = with_arm(replace(TINY, epochs=2), "rigl")
    return Suite(config, ("dense", "rigl", "rigl+moon"), ("noise",), (0, 1), scores=("msp", "u"), **changes)


def test_plan():
    runs = plan(study(sparsities=(0.8, 0.9)))
    labels = ["dense", "rigl@0.8", "rigl@0.9", "rigl+moon@0.8", "rigl+moon@0.9"]
    assert [run.label for run in runs] == labels * 2
    assert [run.config.seed for run in runs] == [0] * 5 + [1] * 5
    assert len({run.folder for run in runs}) == 10


def test_compare_resumes_and_summarises(tmp_path, digits, monkeypatch, no_figures):
    first = compare(study(), tmp_path, device="cpu", console=QUIET, data=digits)
    assert list(first["arms"]) == ["dense", "rigl", "rigl+moon"] and first["failed"] == []
    accuracy = first["arms"]["rigl"]["known"]["accuracy"]
    values = [read_json(tmp_path / f"rigl/seed{s}/results.json")["known"]["accuracy"] for s in (0, 1)]
    assert accuracy["values"] == values
    assert accuracy["mean"] == pytest.approx(sum(values) / 2)
    assert accuracy["std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    assert set(first["arms"]["rigl"]["mean_auroc"]) == {"msp"}
    assert set(first["arms"]["rigl+moon"]["unknown"]["noise"]) == {"msp", "u"}
    assert (tmp_path / "comparison.png").is_file()
    assert read_json(tmp_path / "summary.json") == first

    # A second call trains nothing; a new OOD set is evaluated on the networks that are there.
    monkeypatch.setattr(Trainer, "train_epoch", lambda *_: pytest.fail("trained again"))
    assert compare(study(), tmp_path, device="cpu", console=QUIET, data=digits) == first
    wider = replace(study(), unknowns=("noise", "blobs"))
    second = compare(wider, tmp_path, device="cpu", console=QUIET, data=digits)
    assert set(second["arms"]["dense"]["unknown"]) == {"noise", "blobs"}
    assert second["arms"]["dense"]["known"] == first["arms"]["dense"]["known"]

    # A run from before there were metrics with a temperature gets them.
    file = tmp_path / "rigl+moon/seed1/results.json"
    complete = read_json(file)
    older = {name: v for name, v in complete["known"].items() if "scaled" not in name and name != "temperature"}
    file.write_text(json.dumps(complete | {"known": older}))
    compare(wider, tmp_path, device="cpu", console=QUIET, data=digits)
    assert len(older) < len(complete["known"]) and read_json(file)["known"] == complete["known"]
    with pytest.raises(CheckpointError, match=r"other settings: .*delta_t: 3 and 4"):
        compare(
            replace(study(), config=replace(study().config, delta_t=4)),
            tmp_path,
            device="cpu",
            console=QUIET,
            data=digits,
        )


def test_compare_goes_on_after_a_failed_run(tmp_path, digits):
    suite = Suite(replace(with_arm(TINY, "rigl"), epochs=1), ("static", "dense"), (), (0,), scores=("msp",))
    suite = replace(suite, config=replace(suite.config, lr_max=1e30, lr_min=1e29))
    summary = compare(suite, tmp_path, device="cpu", console=QUIET, data=digits)
    assert summary["arms"] == {} and len(summary["failed"]) == 2
    assert "NaN or infinite at step" in summary["failed"][0]


def test_spread():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(math.sqrt(2)), "values": [1.0, 3.0]}
    assert spread([5.0])["std"] == 0.0


def test_demo_on_small_data(tmp_path, capsys):
    arms = ("rigl", "rigl+moon+vote", "rigl+vote+hard-shuffle")
    suite = Suite(TINY, arms, ("noise", "mirrored"), scores=("msp", "u", "moon", "mahalanobis"))
    summary = demo(tmp_path, suite=suite, device="cpu", console=Console(width=80), jobs=1, seconds=0.01)
    printed = capsys.readouterr().out
    tables = printed[printed.index("Unknown images found") : printed.index("One picture")]
    assert max(map(len, tables.splitlines())) <= 80 and "…" not in printed
    for expected in ("Training step", "Inference", "Memory", "Accuracy", "(by outputs)", "(by features)"):
        assert expected in printed
    assert f"MOON {summary['arms']['rigl+moon+vote']['known']['accuracy']['mean'] * 100:.1f}" in printed
    assert (tmp_path / "demo.png").is_file() and read_json(tmp_path / "summary.json")["speed"] == summary["speed"]
    assert min(summary["speed"].values()) > 0
