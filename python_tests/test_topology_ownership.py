"""A topology update touches only what it fully owns, and refuses before it changes anything."""

import gc
import weakref

import pytest
import torch
from topology_support import METHODS, data, dynamic, loss_of, network, patterns, same
from torch import nn

import uasparse_kernels as ua

# ---- frozen layers ----


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_layer_stays_bit_for_bit(method, storage):
    model = network(0.3, storage=storage)
    model[2].requires_grad_(False)
    before, others = (model[2].weight.detach().clone(), model[2].pattern.blocks()), patterns(model)
    topology, optimizer = dynamic(model, method=method, delta_t=2, total_steps=20)
    for _ in range(8):
        loss_of(model, *data()).backward()
        optimizer.step()
        topology.step()
        optimizer.zero_grad()
    assert torch.equal(model[2].weight, before[0])
    assert torch.equal(model[2].pattern.blocks(), before[1])
    assert not torch.equal(patterns(model)[0], others[0])


def test_frozen_weights_do_not_count_in_a_threshold_over_all_layers():
    """GraNet takes as much from the other layers as if the frozen one were not there."""
    counts = []
    for scale in (1e-3, 1e3):
        model = network(0.3)
        with torch.no_grad():
            model[2].weight.mul_(scale)
        model[2].requires_grad_(False)
        topology, _ = dynamic(model, method="granet", total_steps=4)
        x, y = data()
        loss_of(model, x, y).backward()
        assert topology.step()
        counts.append([model[0].pattern.num_blocks, model[4].pattern.num_blocks])
    assert sum(counts[0]) == sum(counts[1])


def test_nothing_to_do_is_no_update():
    model = network()
    model.requires_grad_(False)
    model[4].bias.requires_grad_(True)
    topology, _ = dynamic(model, torch.optim.SGD(model.parameters(), 0.1))
    loss_of(model, *data()).backward()
    assert not topology.step()


# ---- hooks ----


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_second_one_takes_over_and_a_dead_one_leaves_nothing(method):
    model = network()
    first, optimizer = dynamic(model, method=method)
    second, _ = dynamic(model, optimizer, method=method)
    loss_of(model, *data()).backward()
    with pytest.raises(RuntimeError, match="another DynamicSparsity"):
        first.step()
    assert second.step()
    dead = weakref.ref(second)
    del second
    gc.collect()
    assert dead() is None
    assert not any(m._forward_hooks for m in model.modules())
    assert not model._load_state_dict_pre_hooks
    third, _ = dynamic(model, optimizer, method=method)
    third.detach()
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="detach"):
        third.step()


def test_input_by_keyword_is_seen():
    results = []
    for keyword in (False, True):
        torch.manual_seed(2)
        layer = ua.SparseLinear(10, 12, sparsity=0.7)
        topology, _ = dynamic(layer)
        x = torch.randn(5, 10)
        (layer(input=x) if keyword else layer(x)).square().sum().backward()
        assert topology.step()
        results.append(layer.pattern.blocks())
    assert torch.equal(*results)


# ---- weights that are not what they seem ----


def test_parametrised_weights_and_freed_memory_are_refused():
    model = network()
    topology, _ = dynamic(model)
    loss_of(model, *data()).backward()
    before = patterns(model)
    model[0].weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="memory of its weight was freed"):
        topology.step()
    assert same(before, patterns(model))

    model = network()
    view = model[0].weight.view(-1)[:]
    del model[0]._parameters["weight"]
    model[0].weight = view  # as FullyShardedDataParallel does
    with pytest.raises(ValueError, match="use_orig_params=True does not help"):
        dynamic(model, torch.optim.SGD([p for p in model.parameters() if p.is_leaf], 0.1))

    model = network()
    model[2].weight = model[0].weight if model[0].weight.shape == model[2].weight.shape else model[2].weight
    model[0].weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    with pytest.raises(ValueError, match="0: expected a weight of shape"):
        dynamic(model)


# ---- said ----


@pytest.mark.parametrize("method", ["rigl", "set", "mest", "2:4"])
def test_a_training_shorter_than_an_interval_is_said(method):
    model = network(0.5, structure="2:4") if method == "2:4" else network()
    with pytest.warns(UserWarning, match="never change"):
        dynamic(model, method=method, delta_t=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "set"}, "method"),
        ({"delta_t": 3}, "schedule"),
        ({"method": ua.topology.RigL(drop=ua.topology.relative_magnitude)}, "method"),
    ],
)
def test_the_state_of_another_training_is_refused(options, message):
    state = dynamic(network())[0].state_dict()
    topology, _ = dynamic(network(), **options)
    with pytest.raises(ValueError, match=message):
        topology.load_state_dict(state)
    other = ua.sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5)
    with pytest.raises(ValueError, match="sparse layers only there: 2, 4"):
        dynamic(other)[0].load_state_dict(state)
    assert topology.steps == 0
    wrapped = nn.Module()
    wrapped.module = network()
    dynamic(wrapped)[0].load_state_dict(state)


class ReadsTheMatrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        layer = self.qkv  # by another name: sparsify() does not see it in the source
        return self.head(nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_read_as_a_matrix_is_named(method):
    model = ua.sparsify(ReadsTheMatrix().double(), 0.3, distribution="uniform", storage="dense")
    topology, _ = dynamic(model, method=method)
    loss_of(model, *data()).backward()
    with pytest.raises(RuntimeError, match=r"qkv.*exempt=\['qkv'\]"):
        topology.step()


def test_a_regulariser_may_read_the_weights():
    for method in ("rigl", "set"):
        model = network(0.3, storage="dense")
        topology, _ = dynamic(model, method=method)
        penalty = sum((m.weight @ m.weight.T).square().sum() for m in topology.layers.values())
        (loss_of(model, *data()) + penalty).backward()
        assert topology.step()


def test_ordinary_steps_do_no_work():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    for method in METHODS:
        model = network(0.3)
        topology, _ = dynamic(model, method=method, delta_t=10)
        topology.step()
        loss_of(model, *data()).backward()
        with Count() as count:
            for _ in range(8):
                topology.step()
        assert count.calls == 0
