"""Sparse deltas over frozen dense layers: the sum, its gradient at the active places, and what they cost."""

import copy
import pickle

import pytest
import torch
from torch import nn

import uasparse_kernels as ua

LAYERS = {
    "linear": lambda: (nn.Linear(14, 10), (3, 5, 14)),
    "no bias": lambda: (nn.Linear(14, 10, bias=False), (7, 14)),
    "conv": lambda: (nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2), (2, 8, 9, 7)),
    "same": lambda: (nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect"), (2, 4, 6, 7)),
}


def make(kind, block=(1, 1), density=0.3):
    layer, shape = LAYERS[kind]()
    layer = layer.double()
    original = copy.deepcopy(layer)
    delta = ua.SparseDelta(layer, density, block=block)
    x = torch.randn(shape, dtype=torch.float64)
    return delta, original, x


@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_layer_with_the_sum_as_weight(kind, block):
    delta, original, x = make(kind, block)
    pattern = delta.delta.pattern
    count = round(0.3 * original.weight.numel() / (block[0] * block[1]))
    assert [p.shape for p in delta.parameters() if p.requires_grad] == [pattern.packed_shape]
    assert pattern.num_blocks == count
    torch.testing.assert_close(delta(x), original(x))  # at first
    with torch.no_grad():
        delta.delta.weight.normal_()
        original.weight += pattern.unpack(delta.delta.weight)
    torch.testing.assert_close(delta.weight, original.weight)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [delta(inputs[0]), original(inputs[1])]
    torch.testing.assert_close(*outputs)
    upstream = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(upstream)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(delta.delta.weight.grad, pattern.pack(original.weight.grad))
    assert all(p.grad is None for p in delta.base.parameters())
    torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(delta, {"delta.weight": w}, (x,)),
        (inputs[0], delta.delta.weight.detach().clone().requires_grad_()),
        fast_mode=True,
    )
    base = delta.merge()
    assert base is delta.base and type(base) is type(original)
    torch.testing.assert_close(base.weight.detach(), original.weight.detach())
    torch.testing.assert_close(delta(x), original(x))  # nothing counts twice


def test_states_and_copies():
    delta, _, x = make("linear")
    optimizer = torch.optim.AdamW([p for p in delta.parameters() if p.requires_grad])
    delta(x).square().sum().backward()
    optimizer.step()
    sizes = [v.numel() for state in optimizer.state.values() for v in state.values() if v.dim()]
    assert sizes == [delta.delta.pattern.nnz] * 2
    expected = delta(x)
    other = ua.SparseDelta(nn.Linear(14, 10).double(), 0.5)
    other.load_state_dict(delta.state_dict())
    for one in (other, copy.deepcopy(delta), pickle.loads(pickle.dumps(delta))):
        assert one.delta.pattern.equal(delta.delta.pattern)
        torch.testing.assert_close(one(x), expected)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_rigl_moves_to_the_largest_gradients_of_the_sum(kind):
    delta, original, x = make(kind)
    optimizer = torch.optim.SGD([delta.delta.weight], 1e-30, momentum=0.9)
    topology = ua.DynamicSparsity(delta, optimizer, total_steps=9, delta_t=1, drop_fraction=0.5)
    with torch.no_grad():
        delta.delta.weight.normal_()
        original.weight.copy_(delta.weight)
    before, frozen = delta.delta.pattern.to_mask(), delta.base.weight.clone()
    values = delta.delta.dense_weight()
    for module in (delta, original):
        module(x).square().sum().backward()
    optimizer.step()
    assert topology.step()
    after = delta.delta.pattern.to_mask()
    assert after.sum() == before.sum() and not torch.equal(after, before)
    grown, gradient = after & ~before, original.weight.grad.abs()
    assert gradient[grown].min() >= gradient[~after & ~before].max()
    assert torch.equal(delta.delta.dense_weight(), values * (after & before))
    assert torch.equal(delta.base.weight, frozen)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.again = self.body[2]
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).mean((2, 3))
        return self.head(self.again(self.body[1](self.body[0](x))))


def test_a_whole_model_is_fine_tuned_and_merged():
    model = Network()
    before = copy.deepcopy(model)
    x, y = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))
    assert ua.add_sparse_deltas(model, 0.05, exempt=["head"]) is model
    model.head.requires_grad_(True)
    assert model.again is model.body[2]
    deltas = {n: m for n, m in model.named_modules() if isinstance(m, ua.SparseDelta)}
    assert set(deltas) == {"stem", "body.0", "body.2"}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {f"{n}.delta.weight" for n in deltas} | {"head.weight", "head.bias"}
    assert trained["body.0.delta.weight"].numel() == round(0.05 * 256)
    torch.testing.assert_close(model.eval()(x), before.eval()(x))
    optimizer = torch.optim.Adam(trained.values(), 0.05)
    topology = ua.DynamicSparsity(model, optimizer, total_steps=30, delta_t=3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
        topology.step()
    assert losses[-1] < 0.8 * losses[0]
    rows = {row.layer: row for row in ua.summary(model).rows}
    assert rows["stem.base"].dense_because == "the base of a sparse delta" and not rows["stem.delta"].dense_because
    expected = model(x)
    with pytest.raises(ValueError, match="merge_sparse_deltas"):
        ua.sparsify(model, 0.5)
    with pytest.raises(ValueError, match="already"):
        ua.add_sparse_deltas(model, 0.5)
    for merge in (ua.densify, ua.merge_sparse_deltas):
        merged = merge(copy.deepcopy(model))
        assert type(merged.stem) is nn.Conv2d and type(merged.body[0]) is nn.Linear
        assert merged.state_dict().keys() == before.state_dict().keys()
        torch.testing.assert_close(merged(x), expected)
        changed = (merged.body[0].weight != before.body[0].weight).sum()
        assert 0 < changed <= 13


def test_scores_say_where_to_train():
    model = Network()
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    ua.add_sparse_deltas(model, 0.1, scores=gradients, filter=lambda name, _: name != "stem")
    for name in ("body.0", "head"):
        mask = model.get_submodule(name).delta.pattern.to_mask()
        score = gradients[f"{name}.weight"].abs()
        assert mask.sum() == round(0.1 * mask.numel()) and score[mask].min() >= score[~mask].max()


def test_transformers_evaluate_the_sum():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    ua.add_sparse_deltas(layer, 0.2)
    layer.linear1.delta.weight.data.normal_()
    expected = layer.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)
    merged = ua.merge_sparse_deltas(layer)
    torch.testing.assert_close(merged.train()(x), expected)


def test_a_lone_layer_and_what_is_refused(caplog):
    delta = ua.add_sparse_deltas(nn.Linear(8, 8), 0.25)
    assert isinstance(delta, ua.SparseDelta) and "density=0.25" in repr(delta)
    assert type(ua.merge_sparse_deltas(delta)) is nn.Linear
    shared = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    shared[1].weight = shared[0].weight
    ua.add_sparse_deltas(shared, 0.5)
    assert [type(m) for m in shared] == [nn.Linear, nn.Linear, ua.SparseDelta] and "shared" in caplog.text
    for arguments, message in [
        ({"density": 0.0}, "density"),
        ({"density": 0.5, "exempt": ["3"]}, "'3'"),
        ({"density": 0.5, "filter": lambda *_: False}, "got none"),
        ({"density": 0.5, "scores": {"0.weight": torch.ones(8, 8)}}, "1.weight"),
        ({"density": 0.5, "block": (3, 3)}, "got none"),
    ]:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        before = list(model.modules())
        with pytest.raises(ValueError, match=message):
            ua.add_sparse_deltas(model, **arguments)
        assert list(model.modules()) == before and all(p.requires_grad for p in model.parameters())
    layer = nn.Linear(8, 8)
    for arguments in ({}, {"density": 0.5, "pattern": ua.SparsityPattern.random((8, 8), 0.5)}, {"density": 2.0}):
        with pytest.raises(ValueError):
            ua.SparseDelta(layer, **arguments)
    assert layer.weight.requires_grad
    with pytest.raises(TypeError, match=r"nn.Linear or nn.Conv2d, got Conv1d"):
        ua.SparseDelta(nn.Conv1d(3, 3, 1), 0.5)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_delta_that_is_stored_dense(kind):
    delta, _, x = make(kind)
    nn.init.normal_(delta.delta.weight)
    expected, weight = delta(x), delta.weight.detach()
    ua.repack(delta, storage="dense")
    assert delta.delta.storage == "dense"
    torch.testing.assert_close(delta(x), expected)
    assert torch.equal(delta.weight, weight)
    delta.weight.sum().backward()
    assert torch.equal(delta.delta.weight.grad, delta.delta.pattern.to_mask().to(weight))


def test_deltas_on_the_meta_device():
    dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model = ua.add_sparse_deltas(model, 0.5).to_empty(device="cpu")
    for name in ("0", "2"):
        model.get_submodule(f"{name}.base").load_state_dict(dense.get_submodule(name).state_dict())
        nn.init.zeros_(model.get_submodule(f"{name}.delta").weight)
    x = torch.randn(5, 6)
    torch.testing.assert_close(model(x), dense(x))


@pytest.mark.parametrize("name", ["0", "0.base", "0.delta"])
def test_no_output_is_added_to_a_part_of_a_delta(name):
    model = ua.add_sparse_deltas(nn.Sequential(nn.Linear(6, 1)), 0.5)
    with pytest.raises(ValueError, match="merge_sparse_deltas"):
        ua.add_unknown_output(model, name)
    assert model(torch.randn(4, 6)).shape == (4, 1)


def test_no_output_is_added_to_a_projection():
    model = ua.sparsify(nn.Sequential(nn.MultiheadAttention(8, 2)), 0.5)
    with pytest.raises(ValueError, match="a projection of an attention"):
        ua.add_unknown_output(model, "0.in_proj")
