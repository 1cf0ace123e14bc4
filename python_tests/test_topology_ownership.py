"""A topology update touches only what it fully owns, and refuses before it changes anything."""

import copy

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
        layer = getattr(self, "qkv".lower())  # sparsify() does not see it in the source
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


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_momentum_of_an_optimizer_that_is_not_loaded_moves(storage, wrapped):
    """Of several optimisers one is loaded, and the model: the state of the others is not the checkpoint's."""

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer, self.param_groups, self.step = optimizer, optimizer.param_groups, optimizer.step

        state = property(lambda self: self.optimizer.state)

    model = network(storage=storage)
    parts = [model[0].parameters(), [*model[2].parameters(), *model[4].parameters()]]
    optimizers = [torch.optim.SGD(part, 0.05, momentum=0.9) for part in parts]
    topology, _ = dynamic(model, [Wrapper(o) if wrapped else o for o in optimizers], method="set")
    saved = []
    for _ in range(4):
        loss_of(model, *data()).backward()
        for optimizer in optimizers:
            optimizer.step()
        topology.step()
        model.zero_grad()
        saved.append(copy.deepcopy((model.state_dict(), [o.state_dict() for o in optimizers])))

    def momentum(i):
        layer = model[2 * i]
        held = optimizers[i].state[layer.weight]["momentum_buffer"].clone()
        return layer.pattern.unpack(held) if storage == "packed" else held

    other = momentum(1)
    optimizers[0].load_state_dict(copy.deepcopy(saved[0][1][0]))
    model.load_state_dict(saved[0][0])
    loaded = [momentum(0), momentum(1)]
    assert torch.equal(loaded[0].flatten()[model[0].pattern.indices()], _packed(saved[0][1][0], model[0]))
    assert torch.equal(loaded[1], other * model[2].pattern.to_mask())
    # A step of one optimiser does not settle what was loaded into the other.
    optimizers[1].load_state_dict(copy.deepcopy(saved[1][1][1]))
    loss_of(model, *data()).backward()
    optimizers[0].step()
    model.load_state_dict(saved[1][0])
    assert torch.equal(momentum(1).flatten()[model[2].pattern.indices()], _packed(saved[1][1][1], model[2]))


def _packed(state, layer):
    momentum = next(iter(state["state"].values()))["momentum_buffer"]
    return momentum if layer.storage == "packed" else momentum.flatten()[layer.pattern.indices()]


@pytest.mark.parametrize("what", ["weight", "pattern"])
def test_what_layers_share_is_refused(what):
    model = nn.Sequential(*(ua.SparseLinear(8, 8, sparsity=0.5, storage="packed") for _ in range(2)))
    model[1].pattern = model[0].pattern
    if what == "weight":
        model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=f"a {what} of its own"):
        dynamic(model)


@pytest.mark.parametrize("method", ["gmp", "granet"])
@pytest.mark.parametrize("why", ["rate", "gradient", ""])
def test_layers_that_the_last_pruning_leaves_out_are_named(method, why, caplog):
    model = network(0.0)
    optimizer = torch.optim.SGD([{"params": list(layer.parameters())} for layer in model], 0.05)
    topology, _ = dynamic(model, optimizer, method=method, total_steps=8)
    while not topology.frozen:
        last = topology.steps == 4
        optimizer.zero_grad()
        loss_of(model[:3] if last and why == "gradient" else model, *data()).backward()
        optimizer.param_groups[4]["lr"] = 0.0 if last and why == "rate" else 0.05
        topology.step()
    said = [message for message in caplog.messages if "left out" in message]
    if why == "rate" or (why == "gradient" and method == "granet"):
        assert len(said) == 1 and "'4' (" in said[0] and "'2'" not in said[0]
    else:
        assert not said


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("instead", [True, False])
def test_calls_for_every_micro_batch_are_said(micro_batches, instead, caplog):
    model = network()
    topology, optimizer = dynamic(model, delta_t=8)
    for batch in range(1, 49):
        loss_of(model, *data()).backward()
        updated = topology.step()
        assert updated == (batch % 8 == 0)
        if batch % micro_batches == 0:
            if not (instead and updated):
                optimizer.step()
            optimizer.zero_grad()
    assert len(caplog.messages) == (micro_batches > 1)
    resumed, _ = dynamic(model, optimizer, delta_t=8)
    resumed.load_state_dict(topology.state_dict() | {"steps": 7})
    caplog.clear()
    loss_of(model, *data()).backward()
    optimizer.step()
    assert resumed.step() and not caplog.messages


@pytest.mark.parametrize("each", ["in turn", "together"])
def test_calls_for_every_micro_batch_are_said_of_two_optimizers(each, caplog):
    for micro_batches in (1, 2, 4):
        model = network()
        parts = [model[0].parameters(), [*model[2].parameters(), *model[4].parameters()]]
        optimizers = [torch.optim.SGD(part, 0.05) for part in parts]
        topology = ua.DynamicSparsity(model, optimizers, method="set", total_steps=200, delta_t=20)
        caplog.clear()
        for i in range(44):
            loss_of(model, *data()).backward()
            if i % micro_batches == micro_batches - 1:
                turn = i // micro_batches % 2
                for optimizer in optimizers if each == "together" else [optimizers[turn]]:
                    optimizer.step()
                model.zero_grad()
            topology.step()
        said = [r.getMessage() for r in caplog.records if "once per optimizer step" in r.getMessage()]
        assert len(said) == (micro_batches > 1)
        assert all(f"called 20 times for {20 // micro_batches} steps" in line for line in said)
