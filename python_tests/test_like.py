"""A checkpoint tells which layers are sparse, and where."""

import copy

import pytest
import torch
from torch import nn

import uasparse_kernels as ua

pytestmark = pytest.mark.usefixtures("one_thread")


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16)
    )


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False)


IMAGES, TOKENS, ROWS = (2, 3, 8, 8), (2, 5, 16), (3, 16)


@pytest.mark.parametrize(
    "build, shape, options",
    [
        (convnet, IMAGES, {"sparsity": 0.8, "exempt": ["5"]}),
        (convnet, IMAGES, {"sparsity": 0.0, "include_dense": True}),
        (convnet, IMAGES, {"sparsity": 0.5, "block": (4, 1), "storage": "dense"}),
        (encoder, TOKENS, {"sparsity": 0.75, "distribution": "uniform"}),
        (lambda: nn.Linear(16, 8), ROWS, {"sparsity": 0.75}),
    ],
)
def test_a_dense_model_becomes_as_the_checkpoint(build, shape, options):
    x = torch.randn(shape)
    model = ua.sparsify(build(), **options).eval()
    state = copy.deepcopy(model.state_dict())
    other = ua.sparsify_like(build(), state).eval()
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    assert [row[:7] for row in ua.summary(other).rows] == [row[:7] for row in ua.summary(model).rows]


def test_a_training_goes_on_bit_for_bit():
    def train(model, optimizer, topology, steps):
        for step in steps:
            torch.manual_seed(step)
            model(torch.randn(IMAGES)).square().mean().backward()
            optimizer.step()
            topology.step()
            optimizer.zero_grad()

    def start(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        method = ua.topology.GMP(final_sparsity=0.8)
        return optimizer, ua.DynamicSparsity(model, optimizer, method=method, total_steps=16, delta_t=2)

    model = ua.sparsify(convnet(), 0.0, include_dense=True)
    optimizer, topology = start(model)
    train(model, optimizer, topology, range(7))
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, topology)])
    train(model, optimizer, topology, range(7, 16))

    resumed = ua.sparsify_like(convnet(), states[0])
    parts = (resumed, *start(resumed))
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    train(*parts, range(7, 16))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_what_does_not_fit_changes_nothing():
    state = ua.sparsify(convnet(), 0.8).state_dict()
    model = convnet()
    layers = list(model)
    for wrong, said in (
        ({f"module.{key}": value for key, value in state.items()}, "No layer of the model is named 'module.0'"),
        ({key: value for key, value in state.items() if not key.endswith("crow")}, "pattern.crow in the state_dict"),
        (ua.sparsify(nn.Sequential(nn.Conv2d(3, 4, 3)), 0.5).state_dict(), r"0: expected a pattern of shape \(8, 3"),
    ):
        with pytest.raises(ValueError, match=said):
            ua.sparsify_like(model, wrong)
    assert list(model) == layers
    assert ua.sparsify_like(model, model.state_dict()) is model and list(model) == layers
    with pytest.raises(ValueError, match="sparse layers; call densify"):
        ua.sparsify_like(ua.sparsify(convnet(), 0.5), state)


@pytest.mark.parametrize("make", [convnet, encoder])
def test_a_model_without_values(make):
    model = ua.sparsify(make(), 0.6, block=(2, 1))
    state = model.state_dict()
    with torch.device("meta"):
        other = make()
    ua.sparsify_like(other, state).load_state_dict(state, assign=True)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), other.state_dict().values(), strict=True))


def test_the_pattern_of_a_layer_without_values():
    layer = ua.SparseLinear(8, 6, sparsity=0.5)
    before = layer.pattern.to_mask()
    layer.to("meta")
    assert torch.equal(ua.SparseLinear(8, 6, pattern=layer.pattern).pattern.to_mask(), before)
