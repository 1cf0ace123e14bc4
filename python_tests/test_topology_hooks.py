"""The hooks of DynamicSparsity: who holds what, copies, garbage collection, and what torch does in between."""

import copy
import gc
import weakref

import pytest
import torch
from topology_support import data, dynamic, loss_of, network
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import uasparse_kernels as ua


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
    model(data()[0])  # they go when they are called: never while others loop over hooks
    assert not any(m._forward_hooks for m in model.modules())
    assert not model._load_state_dict_pre_hooks
    third, _ = dynamic(model, optimizer, method=method)
    third.detach()
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="detach"):
        third.step()


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_it_may_be_collected_while_torch_loops_over_hooks(method):
    """The garbage collector runs anywhere, and a loop over hooks that change ends in an error."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def garbage():
        topology, _ = dynamic(model, optimizer, method=method)
        topology.itself = topology
        return weakref.ref(topology)

    def collect(*_):
        gc.collect()

    def nothing(*_):
        return None

    def use():
        loss_of(model, *data()).backward()
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        model(data()[0])

    hold = gc.isenabled()
    for register in (
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        optimizer.register_load_state_dict_pre_hook,
        optimizer.register_load_state_dict_post_hook,
        model[2].register_forward_pre_hook,
        model[2].register_forward_hook,
        model[2].weight.register_post_accumulate_grad_hook,
        model[2].register_load_state_dict_post_hook,
    ):
        gc.disable()
        first = register(collect)
        try:
            dead = garbage()
            last = register(nothing)
            use()
            model.load_state_dict(model.state_dict())
            assert dead() is None
        finally:
            if hold:
                gc.enable()
            first.remove(), last.remove()


@pytest.mark.parametrize("holder", ["optimizer", "layer", "hook of the layer", "model"])
@pytest.mark.parametrize("passes", [0, 1])
def test_who_holds_it_does_not_live_for_ever(holder, passes):
    """Loops keep it where it is at hand; a sweep of trainings would fill the memory."""
    model = network()
    topology, optimizer = dynamic(model)
    if holder == "optimizer":
        optimizer.register_step_post_hook(lambda *_, topology=topology: topology.step())
    elif holder == "layer":
        object.__setattr__(model[0], "topology", topology)
    elif holder == "hook of the layer":
        model[0].register_forward_hook(lambda *_, topology=topology: None)
    else:
        model.topology = topology
    for _ in range(passes):
        loss_of(model, *data()).backward()
    alive = [weakref.ref(o) for o in (topology, optimizer, model[0])]
    del model, optimizer, topology
    gc.collect()
    assert not any(reference() for reference in alive)


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("together", [False, True])
def test_a_copy_is_detached(method, together):
    """It has no hooks: it would leave the state of the copied optimizer behind when a pattern is loaded."""
    model = network()
    topology, optimizer = dynamic(model, method=method)
    model.topology = topology
    held = (model, optimizer) if together else (model,)
    model2, *rest = copy.deepcopy(held)
    copied, optimizer2 = model2.topology, model2.topology.optimizer
    assert rest in ([], [optimizer2]) and copied.layers["0"] is model2[0] and model2[0] is not model[0]
    del topology, model, optimizer, held
    gc.collect()
    loss_of(model2, *data()).backward()
    with pytest.raises(RuntimeError, match="it is a copy"):
        copied.step()
    copied.detach()
    new, _ = dynamic(model2, optimizer2, method=method)
    new.load_state_dict(copied.state_dict())
    loss_of(model2, *data()).backward()
    assert new.step()


def test_a_copy_of_a_static_one_counts_on():
    model = network()
    topology, _ = dynamic(model, method="static")
    assert not copy.deepcopy(topology).step()


@pytest.mark.parametrize("hash_", [None, lambda self: 1])
def test_optimizers_that_are_equal_are_told_apart(hash_):
    """Those that compare by settings, and so may have no hash, whoever's they are."""

    class Equal(torch.optim.SGD):
        def __eq__(self, other):
            return self.defaults == other.defaults

        __hash__ = hash_

    model = network()
    parts = [model[0].parameters(), [*model[2].parameters(), *model[4].parameters()]]
    optimizers = [Equal(part, 0.05, momentum=0.9) for part in parts]
    topology, _ = dynamic(model, optimizers)
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        loss_of(model, *data()).backward()
        optimizer.step()
    assert topology.step() and topology._watch.steps == 2
    stranger = Equal(model.parameters(), 0.05, momentum=0.9)
    loss_of(model, *data()).backward()
    stranger.step()
    with pytest.raises(ValueError, match="another Equal has trained its weight"):
        topology.step()


def test_it_may_be_detached_while_its_layer_is_called():
    """torch loops over a copy of the hooks, and looks up then how to call each: other threads may be that far."""
    model = network()
    topology, _ = dynamic(model)
    model[0].register_forward_hook(lambda *_: topology.detach(), prepend=True)
    loss_of(model, *data()).backward()
    assert not topology.layers["2"]._forward_hooks


def test_a_loaded_state_is_checked_before_the_hooks_of_others():
    model = network()
    topology, optimizer = dynamic(model)
    seen = []
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.register_step_pre_hook(lambda *_: seen.append(1))
        loss_of(model, *data()).backward()
        optimizer.step()
        assert topology.step()
    assert len(seen) == 3


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
