"""A topology update touches only what it fully owns, and refuses before it changes anything."""

import copy
import gc
import logging
import math
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import uasparse_kernels as ua
from uasparse_kernels.topology import growth

METHODS = ["rigl", "set", "mest", "gmp", "granet"]


def network(sparsity=0.7, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8)).double()
    return ua.sparsify(model, sparsity, distribution="uniform", include_dense=True, **options)


def data(size=12):
    return torch.randn(size, 16, dtype=torch.float64), torch.randint(8, (size,))


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def dynamic(model, optimizer=None, method="rigl", **options):
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, momentum=0.9)
    options = {"total_steps": 100, "delta_t": 1, "generator": torch.Generator().manual_seed(5)} | options
    return ua.DynamicSparsity(model, optimizer, method=method, **options), optimizer


def patterns(model):
    return [m.pattern.blocks() for m in model.modules() if isinstance(m, ua.nn.SparseLayer)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def kept(model):
    hooks = [h for m in model.modules() for h in m._forward_hooks.values() if isinstance(h, growth.GradientCapture)]
    return sum(len(h.pairs) + sum(map(len, h._open.values())) for h in hooks)


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


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_at_a_rate_of_zero_is_frozen(method):
    """Gradual unfreezing by rates."""
    model = network(0.3)
    optimizer = torch.optim.AdamW([{"params": list(layer.parameters())} for layer in model], 0.1)
    before, others = model[2].dense_weight(), patterns(model)
    topology, _ = dynamic(model, optimizer, method=method, total_steps=20)
    for rate in (0.0, torch.tensor(0.0), 0.1):
        optimizer.param_groups[2]["lr"] = rate
        assert torch.equal(model[2].dense_weight(), before)
        loss_of(model, *data()).backward()
        optimizer.step()
        assert topology.step()
        optimizer.zero_grad()
    assert not same(patterns(model)[:1], others[:1]) and not same(patterns(model)[1:2], others[1:2])


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


# ---- the gradient that grows is the one in .grad ----


def passes(how, model, x, y, optimizer):
    """Backward passes of which only the last (or all, accumulating) stand in .grad."""
    other = 100 * model(torch.randn(7, 16, dtype=torch.float64, requires_grad=True)).square().sum()
    if how == "frozen meanwhile":
        weights = [m.weight for m in model if isinstance(m, ua.nn.SparseLayer)]
        for weight in weights:
            weight.requires_grad_(False)
        (100 * model(torch.randn(7, 16, dtype=torch.float64, requires_grad=True)).square().sum()).backward()
        for weight in weights:
            weight.requires_grad_(True)
        optimizer.zero_grad()
    elif how == "zeroed":
        other.backward()
        optimizer.zero_grad(set_to_none=False)
    elif how == "none":
        other.backward()
        optimizer.zero_grad()
    elif how == "autograd.grad":
        torch.autograd.grad(other, list(model.parameters()))
    elif how == "inputs=":
        other.backward(inputs=[model[0].bias])
        optimizer.zero_grad()
    elif how == "sam":
        loss_of(model, x, y).backward()
        with torch.no_grad():
            ascent = [(p, 0.5 * p.grad) for p in model.parameters()]
            for p, e in ascent:
                p.add_(e)
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        with torch.no_grad():
            for p, e in ascent:
                p.sub_(e)
        return
    loss = loss_of(model, x, y)
    if how == "retain_graph":
        loss.backward(retain_graph=True)
        optimizer.zero_grad()
    loss.backward(create_graph=how == "create_graph")


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize(
    "how",
    ["frozen meanwhile", "zeroed", "none", "autograd.grad", "inputs=", "sam", "retain_graph", "create_graph"],
)
def test_only_what_stands_in_grad_counts(how, storage):
    """The captured dense gradient equals .grad at the active weights, and so is of the same passes."""
    model = network(0.7, storage=storage)
    topology, optimizer = dynamic(model)
    passes(how, model, *data(), optimizer)
    for name, layer in topology.layers.items():
        capture = topology._captures[name]
        assert capture.has_gradient
        tiles = torch.cat([tile for _, tile in capture.tiles(layer)])
        grad = layer.weight.grad if storage == "packed" else layer.pattern.pack(layer.weight.grad)
        torch.testing.assert_close(layer.pattern.pack(tiles), grad.detach())
    assert topology.step()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("micro", [1, 3])
def test_checkpointing_and_micro_batches_capture_the_same(reentrant, micro):
    model = network()
    topology, _ = dynamic(model)
    for _ in range(micro):
        x, y = data()
        hidden = checkpoint(model[:3], x.requires_grad_(), use_reentrant=reentrant)
        hidden = checkpoint(lambda h: model[2](model[3](h)), hidden, use_reentrant=reentrant)  # a layer used twice
        nn.functional.cross_entropy(model[4](hidden), y).backward()
    for name, layer in topology.layers.items():
        tiles = torch.cat([tile for _, tile in topology._captures[name].tiles(layer)])
        torch.testing.assert_close(layer.pattern.pack(tiles), layer.weight.grad)
    assert topology.step()


def test_an_optimizer_that_steps_in_the_backward_pass():
    model = network()
    optimizers = {p: torch.optim.SGD([p], 0.1, momentum=0.9) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    topology, _ = dynamic(model, list(optimizers.values()))
    for _ in range(3):
        before = patterns(model)
        loss_of(model, *data()).backward()
        assert topology.step()
        assert not same(before, patterns(model))


def test_a_layer_without_a_gradient_of_this_step_is_left_alone():
    """Its pairs were discarded, and .grad of an earlier step may still stand as zeros."""
    for to_none in (True, False):
        model = nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 12)})
        ua.sparsify(model, 0.7, distribution="uniform")
        topology, optimizer = dynamic(model)
        (model["a"](torch.randn(4, 12)) + model["b"](torch.randn(4, 12))).square().sum().backward()
        optimizer.zero_grad(set_to_none=to_none)  # a discarded batch
        before = patterns(model)
        model["a"](torch.randn(4, 12)).square().sum().backward()
        assert topology.step()
        assert not torch.equal(patterns(model)[0], before[0])
        assert torch.equal(patterns(model)[1], before[1])


def test_gradients_set_to_none_before_step_are_an_error_that_says_so():
    model = network()
    topology, optimizer = dynamic(model)
    loss_of(model, *data()).backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="before zero_grad"):
        topology.step()
    assert topology.steps == 0


def test_kept_memory_is_bounded_by_the_dense_gradient(monkeypatch):
    """Many micro-batches fold into one dense gradient, and grow what they would have grown."""
    monkeypatch.setattr(growth, "_TILE_ENTRIES", 50)
    grown = []
    for micro in (1, 16):
        model = network()
        topology, _ = dynamic(model)
        torch.manual_seed(3)
        x, y = data(16)
        sizes = []
        for i in range(micro):
            part = slice(i * 16 // micro, (i + 1) * 16 // micro)
            (loss_of(model, x[part], y[part]) / micro).backward()
            for name, capture in topology._captures.items():
                pairs = sum(t.numel() * t.element_size() for pair in capture.pairs for t in pair)
                dense = 0 if capture._dense is None else capture._dense.numel() * 8
                sizes.append((pairs + dense) / (8 * math.prod(topology.layers[name].pattern.shape)))
        assert max(sizes) <= 1
        assert micro == 1 or sizes[-1] == 1
        topology.step()
        grown.append(patterns(model))
    assert same(*grown)


def test_nothing_piles_up_without_step():
    model = network()
    topology, optimizer = dynamic(model, delta_t=5)
    for _ in range(4):
        loss_of(model, *data()).backward()
        topology.step()
        optimizer.zero_grad()
    x, y = data()
    for _ in range(10):
        loss_of(model, x, y).backward()
        optimizer.zero_grad()
    assert 0 < kept(model) <= 3
    loss = loss_of(model, x, y)
    for _ in range(10):
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert kept(model) == 0


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


# ---- gradients that are not finite ----


@pytest.mark.parametrize("method", METHODS)
def test_an_update_waits_for_finite_gradients(method, caplog):
    model = network(0.3)
    topology, optimizer = dynamic(model, method=method, delta_t=3, total_steps=12)
    results, before = [], patterns(model)
    with caplog.at_level(logging.WARNING, "uasparse_kernels"):
        for step in range(1, 9):
            x, y = data()
            if step in (3, 4):
                x[0, 0] = math.nan
            loss_of(model, x, y).backward()
            results.append(topology.step())
            if step <= 4:
                assert same(patterns(model), before)
            assert not (topology.frozen and step == 3)
            optimizer.zero_grad()
    assert results == [False, False, False, False, True, True, False, False]
    assert sum("not finite" in r.message for r in caplog.records) == 1


def scaled_step(model, optimizer, topology, scaler, instead, factor=1.0):
    """The lines of the docstring."""
    x, y = data()
    scaler.scale(loss_of(model, x.float(), y) * factor).backward()
    scaler.unscale_(optimizer)
    if instead:
        updated = topology.step()
        if not updated:
            scaler.step(optimizer)
    else:
        scaler.step(optimizer)
        updated = topology.step()
    scaler.update()
    optimizer.zero_grad()
    return updated


@pytest.mark.parametrize("instead", [True, False])
@pytest.mark.parametrize("method", ["rigl", "mest"])
def test_a_step_that_a_grad_scaler_skips_is_no_update(method, instead):
    model = network().float()
    topology, optimizer = dynamic(model, method=method, delta_t=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    before, updates = patterns(model), []
    for factor in (1, 1e38, 1, 1):
        updates.append(scaled_step(model, optimizer, topology, scaler, instead, factor))
        assert same(before, patterns(model)) == (len(updates) < 3)
    assert updates == [False, False, True, True]
    assert scaler.get_scale() == 2.0**11


@pytest.mark.parametrize("instead", [True, False])
@pytest.mark.parametrize("method", ["rigl", "mest"])
def test_the_scale_does_not_matter(method, instead):
    results = []
    for enabled in (True, False):
        model = network().float()
        topology, optimizer = dynamic(model, method=method, delta_t=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        torch.manual_seed(6)
        updates = [scaled_step(model, optimizer, topology, scaler, instead) for _ in range(4)]
        assert updates == [False, True, False, True]
        results.append(patterns(model))
    assert same(*results)


# ---- the optimiser ----


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


# ---- what others do between ----


@pytest.mark.parametrize("what", ["input", "input.data", "gradient"])
def test_memory_that_is_used_again_before_step(what):
    """Micro-batches through one buffer, as prefetching loaders and pipelines have it."""
    first, grown = ua.sparsify(nn.Sequential(nn.Linear(24, 64)).double(), 0.7, distribution="uniform"), []
    for again in (False, True):
        model = copy.deepcopy(first)
        topology, _ = dynamic(model)
        torch.manual_seed(3)
        x, dy = torch.zeros(2, 24, dtype=torch.float64), torch.zeros(2, 64, dtype=torch.float64)
        for _ in range(3):
            new, grad = torch.randn_like(x), torch.randn_like(dy)
            if again and what == "gradient":
                grad = dy.copy_(grad)
            elif again:
                (x if what == "input" else x.data).copy_(new)
                new = x
            model(new).backward(grad)
        assert topology.step()
        grown.append(patterns(model))
    assert same(*grown)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_an_empty_batch_adds_nothing(kind):
    layers = {"linear": nn.Linear(6, 8), "conv1d": nn.Conv1d(6, 8, 3), "conv2d": nn.Conv2d(6, 8, 3)}
    shape = (4, 6, 5, 5)[: {"linear": 2, "conv1d": 3, "conv2d": 4}[kind]]
    one = ua.sparsify(nn.Sequential(layers[kind]), 0.7, distribution="erk", overrides={"0": 0.7})
    other, x = copy.deepcopy(one), torch.randn(shape)
    for model, batches in ((one, (x, x[:0])), (other, (x,))):
        topology, _ = dynamic(model)
        for batch in batches:
            model(batch).square().sum().backward()
        assert topology.step()
    assert same(patterns(one), patterns(other))


def test_a_layer_whose_gradient_a_hook_withholds_is_left_alone():
    model = network(0.3)
    model[2].weight.register_hook(torch.zeros_like)
    before, others = model[2].dense_weight(), patterns(model)
    topology, optimizer = dynamic(model)
    loss_of(model, *data()).backward()
    optimizer.step()
    assert topology.step()
    assert torch.equal(model[2].dense_weight(), before) and not torch.equal(patterns(model)[0], others[0])


def test_inputs_that_are_zero_do_not_keep_a_layer_from_growing():
    """All that is active is zero there, but not what could grow."""
    layer = ua.SparseLinear(8, 4, pattern=ua.SparsityPattern.from_mask((torch.arange(8) < 2).expand(4, 8)))
    topology, _ = dynamic(layer)
    layer(torch.randn(3, 8) * (torch.arange(8) >= 2)).square().sum().backward()
    assert not layer.weight.grad.any()
    assert topology.step()
    assert layer.pattern.to_mask()[:, 2:].any()


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("change", ["another", "more", "fewer"])
def test_a_model_whose_layers_were_changed_is_refused(method, change):
    model = network()
    topology, optimizer = dynamic(model, method=method)
    new = ua.SparseLinear(8, 8, sparsity=0.5, dtype=torch.float64)
    if change == "fewer":
        model[4] = nn.Linear(24, 8).double()
    elif change == "more":
        model.append(new)
    else:
        model[4] = ua.SparseLinear(24, 8, sparsity=0.5, dtype=torch.float64)
    optimizer.add_param_group({"params": list(model[-1].parameters())})
    loss_of(model, *data()).backward()
    before = patterns(model)
    with pytest.raises(
        ValueError, match={"another": "new '4'; gone '4'", "more": "new '5'", "fewer": "gone '4'"}[change]
    ):
        topology.step()
    assert same(before, patterns(model))


def test_the_default_device_does_not_matter():
    model = network()
    with torch.device("meta"):
        ua.DynamicSparsity(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=9, delta_t=1)


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


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("how", ["wrapper", "part", "layer"])
def test_a_part_that_is_loaded_takes_its_momentum_along(how, storage):
    """What DynamicSparsity was given is not what load_state_dict is called of."""
    inner = network(storage=storage)
    topology, optimizer = dynamic(nn.ModuleDict({"module": inner}) if how == "wrapper" else inner, method="set")
    states = []
    for _ in range(3):
        loss_of(inner, *data()).backward()
        optimizer.step()
        topology.step()
        optimizer.zero_grad()
        states.append(copy.deepcopy(inner.state_dict()))
    layer = inner[2]
    part = {"wrapper": inner, "part": inner[:3], "layer": layer}[how]
    prefix, old = "2." if how == "layer" else "", layer.pattern.to_mask()
    momentum = optimizer.state[layer.weight]["momentum_buffer"]
    held = layer.pattern.unpack(momentum.clone()) if storage == "packed" else momentum.clone()
    loss_of(inner, *data()).backward()
    part.load_state_dict({key: states[0][prefix + key] for key in part.state_dict()})
    assert layer.weight.grad is None  # of other places
    momentum = optimizer.state[layer.weight]["momentum_buffer"]
    now = layer.pattern.unpack(momentum) if storage == "packed" else momentum
    assert not torch.equal(old, layer.pattern.to_mask())
    assert torch.equal(now, held * layer.pattern.to_mask())
