"""AveragedModel: the dense average, masked by the last pattern, whatever the topology did."""

import copy
import io

import pytest
import timm.utils
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import uasparse_kernels as ua

STEPS = 12


def network(sparsity=0.7, **options):
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 8)]
    options = {"overrides": {"0": {"sparsity": 0.5, "block": (1, 1)}}} | options
    return ua.sparsify(nn.Sequential(*layers).double(), sparsity, distribution="uniform", **options)


def train(model, method="rigl", steps=STEPS):
    """Yields after each step of a training whose topology changes at every one."""
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    generator = torch.Generator().manual_seed(3)
    topology = ua.DynamicSparsity(
        model, optimizer, method=method, total_steps=steps, stop_fraction=1.0, delta_t=1, generator=generator
    )
    for _ in range(steps):
        x = torch.randn(6, 2, 5, 5, dtype=torch.float64)
        nn.functional.cross_entropy(model(x), torch.randint(8, (6,))).backward()
        optimizer.step()
        topology.step()
        optimizer.zero_grad()
        yield


def dense(model):
    return dict(ua.densify(copy.deepcopy(model)).named_parameters())


class DenseAverage:
    def __init__(self, decay):
        self.decay, self.count, self.values = decay, 0, {}

    def update(self, model):
        share = 1 / (self.count + 1) if self.decay is None else 1 - self.decay
        for name, new in dense(model).items():
            old = self.values.get(name, new)
            self.values[name] = (old + share * (new - old)).detach()
        self.count += 1


def masked(average, model):
    values = dict(average.values)
    for name, layer in model.named_modules():
        if isinstance(layer, ua.nn.SparseLayer):
            values[name + ".weight"] = values[name + ".weight"] * layer.pattern.to_mask()
    return values


def assert_is(averaged, expected, model):
    for name, value in dense(averaged.module).items():
        torch.testing.assert_close(value, masked(expected, model)[name])
    for mine, theirs in zip(averaged.module.modules(), model.modules(), strict=True):
        if isinstance(mine, ua.nn.SparseLayer):
            assert mine.pattern.equal(theirs.pattern)
            assert mine.storage == theirs.storage
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    assert averaged(x).isfinite().all()


@pytest.mark.parametrize("decay", [None, 0.8])
@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize(
    "method, options",
    [("rigl", {}), ("set", {}), ("set", {"block": (2, 2), "overrides": {"4": {"block": (2, 1)}}}), ("granet", {})],
)
def test_it_is_the_masked_dense_average(decay, storage, method, options):
    model = network(0.3 if method == "granet" else 0.7, storage=storage, **options)
    averaged, expected = ua.AveragedModel(model, decay), DenseAverage(decay)
    for step, _ in enumerate(train(model, method)):
        if step in (0, 5):  # averaging need not begin, or happen, at every step
            continue
        averaged.update_parameters(model)
        expected.update(model)
        assert_is(averaged, expected, model)
        if step == 6:  # goes on from a file, or as a copy
            file = io.BytesIO()
            torch.save(averaged.state_dict(), file)
            file.seek(0)
            averaged = ua.AveragedModel(network(0.5, storage=storage, **options), decay)
            averaged.load_state_dict(torch.load(file, weights_only=True))
        elif step == 8:
            averaged = copy.deepcopy(averaged)
    assert int(averaged.n_averaged) == STEPS - 2
    assert averaged._left


def test_a_distributed_checkpoint_has_what_left(tmp_path):
    """dcp.load asks for the keys that a new average has."""
    model = network(0.5)
    averaged = ua.AveragedModel(model, 0.9)
    for _ in train(model, "set"):
        averaged.update_parameters(model)
    dcp.save(averaged.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    again = ua.AveragedModel(network(0.5), 0.9)
    state = again.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    again.load_state_dict(state)
    assert averaged._left
    for name, (blocks, values, updates) in averaged._left.items():
        assert torch.equal(again._left[name].blocks, blocks) and torch.equal(again._left[name].values, values)
        assert again._left[name].updates == updates


def test_what_comes_back_is_remembered():
    """Without it the average of a position that left and came back would have begun anew."""
    layer = ua.SparseLinear(4, 2, sparsity=0.5).double()
    first, second = layer.pattern.blocks(), torch.tensor([0, 1, 2, 3])
    averaged = ua.AveragedModel(layer)
    averaged.update_parameters(layer)
    before = layer.dense_weight()
    for blocks in (second, first):
        layer.pattern.set_blocks_(blocks)
        with torch.no_grad():
            layer.weight.zero_()
        averaged.update_parameters(layer)
    torch.testing.assert_close(averaged.module.dense_weight(), before / 3)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_fixed_topology_averages_as_torch_and_timm_do(decay):
    model = network()
    multi = None if decay is None else get_ema_multi_avg_fn(decay)
    ours, torchs = ua.AveragedModel(model, decay), AveragedModel(model, multi_avg_fn=multi)
    timms = timm.utils.ModelEmaV3(model, decay=decay) if decay else None
    for _ in train(model, "static"):
        ours.update_parameters(model)
        torchs.update_parameters(model)
        if timms and ours.n_averaged > 1:  # its first average is the model as it was made
            timms.update(model)
        elif timms:
            timms.set(model)
    for mine, theirs in zip(ours.module.parameters(), torchs.module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    if timms:
        for mine, theirs in zip(ours.module.parameters(), timms.module.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(ours.module.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["torch", "torch, buffers", "ModelEmaV2", "ModelEmaV3"])
def test_those_of_others_refuse_a_topology_that_moves(kind):
    model = network()
    averaged = {
        "torch": lambda: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        "torch, buffers": lambda: AveragedModel(model, use_buffers=True),
        "ModelEmaV2": lambda: timm.utils.ModelEmaV2(model, decay=0.9),
        "ModelEmaV3": lambda: timm.utils.ModelEmaV3(model, decay=0.9),
    }[kind]()
    for _ in train(model, steps=3):
        (averaged.update_parameters if "torch" in kind else averaged.update)(model)
    with pytest.raises(RuntimeError, match="averaged"):
        averaged.module(torch.randn(3, 2, 5, 5, dtype=torch.float64))


def test_batch_norm_and_wrappers():
    model = network()
    averaged = ua.AveragedModel(torch.compile(model))
    for _ in train(model, steps=3):
        averaged.update_parameters(torch.compile(model))
    assert torch.equal(averaged.module[1].running_mean, model[1].running_mean)
    update_bn([torch.randn(6, 2, 5, 5, dtype=torch.float64)], averaged)
    assert not torch.equal(averaged.module[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize("change", ["dense", "wider", "block", "buffer", "more"])
def test_a_model_of_another_structure_is_refused(change):
    model = network(block=(2, 1))
    averaged = ua.AveragedModel(model)
    averaged.update_parameters(model)
    before = copy.deepcopy(averaged.state_dict())
    other = {
        "dense": lambda: ua.densify(network()),
        "wider": lambda: ua.sparsify(nn.Sequential(nn.Conv2d(2, 7, 3)).double(), 0.5),
        "block": network,
        "buffer": lambda: network(block=(2, 1)),
        "more": lambda: nn.Sequential(network(block=(2, 1))),
    }[change]()
    if change == "buffer":
        other.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ValueError, match="structure"):
        averaged.update_parameters(other)
    for key, value in averaged.state_dict().items():
        assert key == "_extra_state" or torch.equal(value, before[key])
    with pytest.raises(ValueError, match="decay"):
        ua.AveragedModel(model, 1.5)


@pytest.mark.parametrize("decay", [None, 0.8])
@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_weights_that_layers_share_are_averaged_once(storage, decay):
    def make(pattern):
        first, second = (ua.SparseLinear(12, 12, pattern=pattern, storage=storage) for _ in range(2))
        second.weight = first.weight
        model = nn.Sequential(first, second)
        model.register_parameter("again", first.weight)
        return model

    model = make(ua.SparsityPattern.random((12, 12), 0.5))
    averaged, mean = ua.AveragedModel(model, decay=decay), 0.0
    for step in range(6):
        if step == 4:
            model.load_state_dict(make(ua.SparsityPattern.random((12, 12), 0.5)).state_dict())
        with torch.no_grad():
            model[0].weight.mul_(-1.1)
        averaged.update_parameters(model)
        share = 1 / (step + 1) if decay is None or step == 0 else 1 - decay
        mean = (1 - share) * mean + share * model[0].dense_weight()
    expected = mean * model[0].pattern.to_mask()
    for layer in averaged.module:
        assert layer.weight is averaged.module.again and layer.pattern.equal(model[0].pattern)
        torch.testing.assert_close(layer.dense_weight(), expected)
