"""The gradient by which an update grows is the one in ``.grad``, and an update waits until it is finite."""

import copy
import gc
import logging
import math
import threading

import pytest
import torch
from topology_support import METHODS, data, dynamic, kept, loss_of, network, patterns, same
from torch import nn
from torch.utils.checkpoint import checkpoint

import uasparse_kernels as ua
from uasparse_kernels.topology import growth


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
    elif how == "zeroed through .data":
        other.backward()
        for parameter in model.parameters():
            parameter.grad.data.zero_()
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
    [
        "frozen meanwhile",
        "zeroed",
        "zeroed through .data",
        "none",
        "autograd.grad",
        "inputs=",
        "sam",
        "retain_graph",
        "create_graph",
    ],
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


def test_zeros_of_a_pass_are_no_zeroed_gradient():
    """A micro-batch of which all that is active gets nothing counts nevertheless."""
    pattern = ua.SparsityPattern.from_mask((torch.arange(8) < 2).expand(4, 8))
    layer = ua.SparseLinear(8, 4, pattern=pattern, dtype=torch.float64)
    topology, _ = dynamic(layer)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    x[0, :, :2] = 0
    for micro in x:
        layer(micro).sum().backward()
    (capture,) = topology._captures.values()
    tiles = torch.cat([tile for _, tile in capture.tiles(layer)])
    torch.testing.assert_close(tiles, x.sum((0, 1)).expand(4, 8))


def test_a_forward_pass_in_another_thread_takes_nothing_away():
    """Threads that share a model: one begins a pass while another is in the middle of its own."""
    model = network()
    topology, _ = dynamic(model)

    def begin(grad):
        thread = threading.Thread(target=lambda: model(data()[0]))
        thread.start()
        thread.join()

    x, y = data()
    hidden = model[:3](x)
    hidden.register_hook(begin)
    model[2].weight.register_hook(begin)
    nn.functional.cross_entropy(model[3:](hidden), y).backward()
    for name, layer in topology.layers.items():
        tiles = torch.cat([tile for _, tile in topology._captures[name].tiles(layer)])
        torch.testing.assert_close(layer.pattern.pack(tiles), layer.weight.grad)


def test_a_pass_that_fails_leaves_nothing():
    model = network()
    topology, _ = dynamic(model)

    def fail(grad):
        raise KeyboardInterrupt

    hidden = model[:2](data()[0])
    hidden.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model[4](model[3](model[2](hidden))).square().sum().backward(inputs=[hidden, model[2].bias])
    gc.collect()
    assert kept(model) == 0 and topology.steps == 0


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


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("how", ["merged", "in place", "added up", "SAM", "clipped"])
def test_passes_that_are_merged_by_hand_are_said(how, storage, caplog):
    """PCGrad and its like: growth sees the last pass alone. Other writers of .grad and discarded passes are fine."""
    model = network(0.7, storage=storage)
    topology, optimizer = dynamic(model)
    grads = []
    for _ in range(2):
        if how != "added up":
            optimizer.zero_grad()
        loss_of(model, *data()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for p, first, second in zip(model.parameters(), *grads, strict=True):
        if how == "in place":
            p.grad.copy_(first + second)
        elif how == "merged":
            p.grad = first + second
        elif how == "added up":
            p.grad = second * 0.5
    if how == "clipped":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert topology.step()
    assert bool(caplog.messages) == (how in ("merged", "in place"))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.gate, self.inner, self.last = (nn.Linear(10, n) for n in (10, 10, 10, 1))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.inner(h)) * self.gate(h))


def convolutions():
    first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2), nn.Softplus(), nn.Flatten(), nn.Linear(32, 1))


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("make", [Residual, convolutions])
@pytest.mark.parametrize("penalty", ["input", "input's grad", "weights", "none"])
def test_second_derivatives_count(penalty, make, storage):
    """The gradient of a gradient penalty reaches a weight by way of the products of the first backward pass, too."""
    torch.manual_seed(0)
    model = ua.sparsify(make().double(), 0.6, distribution="erk", storage=storage)
    topology, _ = dynamic(model)
    masks = {name: layer.pattern.to_mask() for name, layer in topology.layers.items()}
    dense = ua.densify(copy.deepcopy(model))
    data = torch.randn(6, *((10,) if make is Residual else (3, 6, 6)), dtype=torch.float64)
    for net in (model, dense):
        x = data.clone().requires_grad_()
        y = net(x)
        loss = y.square().mean()
        if penalty == "input":  # WGAN-GP
            (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            loss = loss + (grad.flatten(1).norm(dim=1) - 1).square().sum()
        elif penalty == "input's grad":
            y.sum().backward(create_graph=True, inputs=[x])
            loss = loss + x.grad.square().sum()
        elif penalty == "weights":
            weights = [net.get_submodule(name).weight for name in masks]
            grads = torch.autograd.grad(loss, weights, create_graph=True)
            if net is dense:
                grads = [grad * mask for grad, mask in zip(grads, masks.values(), strict=True)]
            loss = loss + sum(grad.square().sum() for grad in grads)
        loss.backward()
    for name, layer in topology.layers.items():
        tiles = torch.cat([tile for _, tile in topology._captures[name].tiles(layer)])
        torch.testing.assert_close(tiles, dense.get_submodule(name).weight.grad)
    assert topology.step()


@pytest.mark.parametrize(
    "kind", ["vmap", "forward mode", "third", "hook", "forward", "before", "looked at alone", "wrapped", "clipped"]
)
def test_passes_that_growth_cannot_follow_are_said(kind, caplog):
    model = network()
    topology, _ = dynamic(model)
    layer = model[2]
    if kind == "hook":
        layer.weight.register_hook(lambda grad: grad * (torch.arange(grad.numel()) < 50))
    elif kind == "clipped":
        layer.weight.register_hook(lambda grad: grad * 0.5)
    elif kind == "before":
        layer.register_forward_hook(lambda module, args, output: output.tanh() * output, prepend=True)
    elif kind in ("forward", "wrapped"):
        forward, factor = layer.forward, 2 if kind == "forward" else 1
        layer.forward = lambda x: forward(x**factor)
    x = data()[0].requires_grad_()
    loss = model(x).square().mean()
    if kind == "vmap":
        loss = loss + torch.vmap(model)(x).pow(3).sum()
    elif kind == "forward mode":
        loss = loss + torch.func.jvp(model, (x,), (torch.ones_like(x),))[1].square().sum()
    elif kind == "third":
        (first,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        loss = loss + 1000 * second.square().sum()
    elif kind == "looked at alone":
        torch.vmap(torch.func.jacrev(model))(x)
    loss.backward()
    assert topology.step()
    assert len(caplog.messages) == (kind not in ("looked at alone", "wrapped", "clipped"))


def test_a_learned_input_keeps_no_hooks():
    model, learned = network(), nn.Parameter(data()[0].clone())
    topology, _ = dynamic(model)
    for _ in range(3):
        model.zero_grad()
        model(learned).square().mean().backward()
        assert topology.step()
    topology.detach()
    assert not learned._backward_hooks
