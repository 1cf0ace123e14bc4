"""Optimiser state moves with the weights, or the optimiser is refused at first."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from topology_support import data, dynamic, loss_of, network, patterns, same
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import uasparse_kernels as ua


def make_muon(p):
    return torch.optim.Muon([w for w in p if w.dim() == 2], 0.02)


@pytest.mark.parametrize(
    ("make", "storage", "message"),
    [
        (lambda p: torch.optim.SGD([nn.Parameter(torch.zeros(3))], 0.1), "packed", "does not hold.*0, 2, 4"),
        (lambda p: torch.optim.SGD(p[:2], 0.1), "packed", "does not hold.*2, 4"),
        (lambda p: torch.optim.LBFGS(p), "packed", "LBFGS"),
        (make_muon, "dense", "Muon"),
        (lambda p: torch.optim.SparseAdam(p), "packed", "SparseAdam"),
        (lambda p: torch.optim.Adafactor(p, 0.1), "dense", "Adafactor"),
    ],
)
def test_an_optimizer_that_cannot_follow_is_refused_at_first(make, storage, message):
    model = network(storage=storage)
    with pytest.raises(ValueError, match=message):
        dynamic(model, make(list(model.parameters())))


def test_an_optimizer_must_be_one():
    model = network()
    with pytest.raises(TypeError, match="param_groups"):
        dynamic(model, "sgd")


class RowScaled(torch.optim.Optimizer):
    """State of another shape, and lists: what no table knows."""

    def __init__(self, params, as_list=False):
        super().__init__(params, {"as_list": as_list})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                rows = torch.ones(7)
                self.state[p] = {"step": torch.zeros(()), "n": 3, "factors": [rows, rows] if group["as_list"] else rows}


@pytest.mark.parametrize("as_list", [True, False])
def test_state_of_another_shape_is_refused_before_anything_changes(as_list):
    model = network()
    topology, optimizer = dynamic(model, RowScaled(model.parameters(), as_list))
    loss_of(model, *data()).backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'factors' of RowScaled"):
        topology.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("method", ["rigl", "granet"])
@pytest.mark.parametrize(
    ("make", "key", "start"),
    [
        (lambda p: torch.optim.Rprop(p, 0.003), "step_size", 0.003),
        (lambda p: torch.optim.Adagrad(p, 0.03, initial_accumulator_value=0.5), "sum", 0.5),
        (lambda p: torch.optim.AdamW(p, 0.03), "exp_avg_sq", 0.0),
    ],
)
def test_grown_entries_start_as_at_the_first_step(make, key, start, method, storage):
    model = network(storage=storage)
    topology, optimizer = dynamic(model, make(model.parameters()), method=method)
    loss_of(model, *data()).backward()
    optimizer.step()
    before = model[0].pattern.to_mask()
    topology.step()
    pattern, state = model[0].pattern, optimizer.state[model[0].weight][key]
    state = pattern.unpack(state) if storage == "packed" else state
    grown = pattern.to_mask() & ~before
    assert grown.any()
    assert (state[grown] == start).all()
    others = state[pattern.to_mask() & before] != 0
    assert others.all() if start else others.any()  # what was dropped and grown again may start anew


class Wrapper:
    """Holds an optimiser under some name, as Lookahead and others do."""

    def __init__(self, inner):
        self._base_optimizer = inner
        self.state = {}
        self.param_groups = inner.param_groups

    def step(self):
        self._base_optimizer.step()

    def zero_grad(self):
        self._base_optimizer.zero_grad()


@pytest.mark.parametrize("how", ["plain", "wrapped", "wrapped twice", "two"])
def test_state_moves_in_wrapped_and_several_optimizers(how):
    model = network()
    weights = list(model.parameters())
    inner = [torch.optim.SGD(weights, 0.1, momentum=0.9)]
    if how == "two":
        inner = [torch.optim.SGD(weights[:2], 0.1, momentum=0.9), torch.optim.SGD(weights[2:], 0.1, momentum=0.9)]
    given = {"plain": inner[0], "two": tuple(inner), "wrapped": Wrapper(inner[0])}.get(how, Wrapper(Wrapper(inner[0])))
    topology, _ = dynamic(model, given)
    loss_of(model, *data()).backward()
    for optimizer in inner:
        optimizer.step()
    layer = model[4]
    state = next(o.state[layer.weight] for o in inner if layer.weight in o.state)
    before, mask = layer.pattern.unpack(state["momentum_buffer"]), layer.pattern.to_mask()
    assert topology.step()
    kept_places = mask & layer.pattern.to_mask()
    after = layer.pattern.unpack(state["momentum_buffer"])
    assert 0 < kept_places.sum() < mask.sum()
    moved = kept_places & (after != 0)
    assert moved.any()
    assert torch.equal(after[moved], before[moved])


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("method", ["set", "gmp"])
def test_weights_put_back_take_their_momentum_along(method, storage):
    """Early stopping: the model's state_dict alone is restored, and training goes on."""
    model = network(0.0 if method == "gmp" else 0.7, storage=storage)
    topology, optimizer = dynamic(model, method=method, total_steps=20, delta_t=2)

    def steps(n):
        for _ in range(n):
            loss_of(model, *data()).backward()
            optimizer.step()
            topology.step()
            optimizer.zero_grad()

    steps(3)
    best = copy.deepcopy(model.state_dict())
    steps(8)
    layer = model[2]
    momentum, mask = optimizer.state[layer.weight]["momentum_buffer"], layer.pattern.to_mask()
    held = layer.pattern.unpack(momentum) if storage == "packed" else momentum.clone()
    model.load_state_dict(best)
    assert not torch.equal(layer.pattern.to_mask(), mask)
    momentum = optimizer.state[layer.weight]["momentum_buffer"]
    now = layer.pattern.unpack(momentum) if storage == "packed" else momentum
    assert torch.equal(now, held * layer.pattern.to_mask() * mask)
    steps(2)


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("method", ["set", "gmp"])
def test_a_whole_checkpoint_loads_in_any_order(method, model_first):
    def start():
        model = network(0.0 if method == "gmp" else 0.7)
        return model, *dynamic(model, method=method, total_steps=20, delta_t=2)

    def steps(model, topology, optimizer, n):
        torch.manual_seed(9)
        for _ in range(n):
            loss_of(model, *data()).backward()
            optimizer.step()
            topology.step()
            optimizer.zero_grad()

    first = start()
    steps(*first, 5)
    saved = [copy.deepcopy(part.state_dict()) for part in first]
    steps(*first, 4)
    second = start()
    steps(*second, 3)
    parts = list(zip(second, saved, strict=True))
    for part, state in parts if model_first else reversed(parts):
        part.load_state_dict(state)
    steps(*second, 4)
    for a, b in zip(first[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)


class Application:
    """What dcp.save and dcp.load take, as torch's recipe has it."""

    def __init__(self, model, topology, optimizer):
        self.model, self.topology, self.optimizer = model, topology, optimizer

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "topology": self.topology.state_dict()}

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.topology.load_state_dict(state["topology"])


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_a_distributed_checkpoint_brings_its_momentum(storage, before, tmp_path):
    """dcp.load writes into the tensors of state_dict(): what is there is of the checkpoint, and must not move again."""

    def steps(model, topology, optimizer, n, seed):
        torch.manual_seed(seed)
        for _ in range(n):
            loss_of(model, *data()).backward()
            optimizer.step()
            topology.step()
            optimizer.zero_grad()

    first = network(storage=storage)
    first = first, *dynamic(first, torch.optim.Adam(first.parameters(), 0.01), delta_t=2)
    steps(*first, 5, seed=2)
    dcp.save({"app": Application(*first)}, checkpoint_id=tmp_path, no_dist=True)
    steps(*first, 4, seed=3)
    second = network(storage=storage)
    second = second, *dynamic(second, torch.optim.Adam(second.parameters(), 0.01), delta_t=2)
    steps(*second, before, seed=4)  # a run that goes back is as good as a new one
    assert not same(patterns(first[0]), patterns(second[0]))
    dcp.load({"app": Application(*second)}, checkpoint_id=tmp_path, no_dist=True)
    steps(*second, 4, seed=3)
    for key, value in first[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[key]), key


@pytest.mark.parametrize("update", [True, False])
def test_a_state_dict_that_was_only_looked_at_loads_nothing(update):
    model = network()
    topology, optimizer = dynamic(model, method="set")
    layer = model[2]
    best = copy.deepcopy(model.state_dict())
    for _ in range(3):
        loss_of(model, *data()).backward()
        optimizer.step()
        optimizer.state_dict()
        topology.step()
        optimizer.zero_grad()
    if not update:
        optimizer.state_dict()
    held = layer.pattern.unpack(optimizer.state[layer.weight]["momentum_buffer"])
    mask = layer.pattern.to_mask()
    for _ in range(2):
        model.load_state_dict(best)
        now = layer.pattern.unpack(optimizer.state[layer.weight]["momentum_buffer"])
        assert now.any() and torch.equal(now, held * mask * layer.pattern.to_mask())


def test_an_optimizers_state_dict_that_nobody_copied_is_the_running_state():
    """Early stopping again, with ``best = optimizer.state_dict()``, loaded before the model."""
    model = network()
    topology, optimizer = dynamic(model, method="set")
    best, running = copy.deepcopy(model.state_dict()), None
    for _ in range(4):
        loss_of(model, *data()).backward()
        optimizer.step()
        running = running or optimizer.state_dict()
        topology.step()
        optimizer.zero_grad()
    layer = model[2]
    held = layer.pattern.unpack(optimizer.state[layer.weight]["momentum_buffer"])
    mask = layer.pattern.to_mask()
    optimizer.load_state_dict(running)
    model.load_state_dict(best)
    now = layer.pattern.unpack(optimizer.state[layer.weight]["momentum_buffer"])
    assert now.any() and torch.equal(now, held * mask * layer.pattern.to_mask())


def test_momentum_of_a_dense_network_is_masked_or_an_error_that_explains():
    dense = nn.Linear(16, 24)
    trained = torch.optim.SGD(dense.parameters(), 0.1, momentum=0.9)
    dense(torch.randn(3, 16)).sum().backward()
    trained.step()
    for storage in ("dense", "packed"):
        layer = ua.SparseLinear(16, 24, sparsity=0.6, storage=storage)
        topology, optimizer = dynamic(layer)
        optimizer.load_state_dict(trained.state_dict())
        layer(torch.randn(3, 16)).sum().backward()
        if storage == "packed":
            with pytest.raises(ValueError, match=r"'momentum_buffer'.*load the model's state_dict"):
                optimizer.step()
            continue
        optimizer.step()
        assert not layer.weight[~layer.pattern.to_mask()].any()
        assert topology.step()


class SlowWeights(Wrapper):
    """Lookahead that keeps its slow weights in a list."""

    def __init__(self, inner, late=False):
        super().__init__(inner)
        self.weights = [p for group in inner.param_groups for p in group["params"]]  # no copies
        self.late, self.slow = late, None if late else self.copies()

    def copies(self):
        return [w.detach().clone() for w in self.weights]

    def step(self):
        super().step()
        self.slow = self.slow or self.copies()


@pytest.mark.parametrize("late", [True, False])
def test_what_an_optimizer_keeps_beside_its_state_is_refused(late):
    model = network()
    make = SlowWeights(torch.optim.SGD(model.parameters(), 0.1), late)
    if not late:
        with pytest.raises(ValueError, match="SlowWeights holds a tensor of the weight's shape in 'slow'"):
            dynamic(model, make)
        ua.DynamicSparsity(model, make, method="static", total_steps=9)
        return
    topology, _ = dynamic(model, make)
    loss_of(model, *data()).backward()
    make.step()
    before = patterns(model)
    with pytest.raises(ValueError, match="'slow'"):
        topology.step()
    assert same(before, patterns(model))


class SharpnessAware(torch.optim.Optimizer):
    """SAM as many write it: the old weight, kept in the state, is put back as the parameter's own memory."""

    def __init__(self, params, base):
        super().__init__(params, {})
        self.base = base

    @torch.no_grad()
    def away(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old_p"] = p.detach().clone()
            p.add_(p.grad, alpha=0.1)
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["old_p"]
        self.base.step()


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("what", ["rigl", "granet", "load"])
def test_state_that_is_the_weights_memory_moves_once(what, storage):
    model = network(0.3, storage=storage)
    optimizer = SharpnessAware(model.parameters(), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))
    topology, _ = dynamic(model, optimizer, method="rigl" if what == "load" else what)
    first = copy.deepcopy(model.state_dict())
    for _ in range(3):
        x, y = data()
        loss_of(model, x, y).backward()
        optimizer.away()
        loss_of(model, x, y).backward()
        optimizer.step()
        layers = [model[0], model[2], model[4]]
        before = [(layer.dense_weight(), layer.pattern.to_mask()) for layer in layers]
        assert topology.step()
        for layer, (weight, mask) in zip(layers, before, strict=True):
            assert torch.equal(layer.dense_weight(), weight * (mask & layer.pattern.to_mask()))
        optimizer.zero_grad()
    if what == "load":
        model.load_state_dict(first)
        assert all(torch.equal(value, first[key]) for key, value in model.state_dict().items())


def test_an_optimizer_that_was_not_given_is_refused():
    """Training goes on with another one: its momentum would stay where the weights were."""
    model = network()
    topology, optimizer = dynamic(model, method="set", delta_t=2)
    elsewhere = torch.optim.Adam([nn.Parameter(torch.ones(3))], 0.1)
    elsewhere.param_groups[0]["params"][0].grad = torch.ones(3)
    without_state = torch.optim.SGD(model.parameters(), 0.1)
    other = torch.optim.Adam(model.parameters(), 0.01)

    def train(*optimizers):
        loss_of(model, *data()).backward()
        for one in optimizers:
            one.step()
        model.zero_grad()
        return topology.step()

    assert [train(optimizer), train(without_state, elsewhere), train(optimizer, other)] == [False, True, False]
    before, momentum = patterns(model), other.state[model[0].weight]["exp_avg"]
    with pytest.raises(ValueError, match="0: another Adam has trained its weight"):
        train(optimizer)
    assert same(before, patterns(model))
    topology, _ = dynamic(model, [optimizer, other], method="set")
    held = momentum.clone()
    assert train(optimizer) and not torch.equal(momentum, held)


@pytest.mark.parametrize("method", ["rigl", "granet"])
def test_what_is_kept_as_an_attribute_of_a_packed_weight_moves(method):
    """As AdaHessian keeps its estimate between the steps that make it anew."""
    model = network(0.3, storage="packed")
    topology, _ = dynamic(model, method=method)
    layer = model[2]
    layer.weight.hess = layer.weight.detach().clone()
    loss_of(model, *data()).backward()
    mask = layer.pattern.to_mask()
    assert topology.step() and not torch.equal(mask, layer.pattern.to_mask())
    torch.testing.assert_close(layer.weight.hess, layer.weight.detach())
