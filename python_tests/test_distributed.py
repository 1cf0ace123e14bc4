"""Two processes (gloo) that train together end every update with the same pattern, the one a single process finds,
however DynamicSparsity is given the model; and it refuses where it cannot know that they train together."""

import os

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import uasparse_kernels as ua

STEPS, WORLD = 6, 2


METHODS = {  # and how its network is made
    "rigl": {},
    "set": {},
    "mest": {},
    "granet": {"storage": "dense"},
    "srigl": {"structure": "fan-in", "storage": "dense"},
    "2:4": {"structure": "2:4"},
}


def build(seed, method="rigl", **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.ReLU(), nn.Linear(6 * 16, 10)).double()
    sparsity = 0.5 if method == "2:4" else 0.8
    options = METHODS[method] | options
    return ua.sparsify(model, sparsity, distribution="uniform", overrides={"0": 0.5}, **options)


def train(model, method, rank, world, given=None, optimizer=None, **options):
    """Patterns after each step, on this rank's share of the batches. ``given`` is what DynamicSparsity is given."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    topology = ua.DynamicSparsity(
        model if given is None else given,
        optimizer,
        method=method,
        total_steps=2 * STEPS,
        delta_t=2,
        generator=generator,
        **options,
    )
    data = torch.Generator().manual_seed(7)
    history = []
    for _ in range(STEPS):
        x = torch.randn(8, 4, 6, 6, dtype=torch.float64, generator=data)
        y = torch.randint(10, (8,), generator=data)
        nn.functional.cross_entropy(model(x[rank::world]), y[rank::world]).backward()
        if "process_group" in options:  # no DDP
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
        optimizer.step()
        topology.step()
        optimizer.zero_grad()
        history.append([layer.pattern.blocks() for layer in topology.layers.values()])
    return history


def in_a_module(model):
    outer = nn.Module()
    outer.inner = nn.ModuleDict({"net": model})
    return outer


WAYS = {  # how DynamicSparsity is given a model that is trained by DDP
    "unwrapped": lambda ddp: ddp.module,
    "compiled": torch.compile,
    "inside": in_a_module,
    "unwrapped inside": lambda ddp: in_a_module(ddp.module),
}


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    for method in METHODS:
        # Different seeds: what DDP sends at construction must include the patterns.
        model = DistributedDataParallel(build(rank, method), broadcast_buffers=False)
        torch.save(train(model, method, rank, WORLD), f"{folder}/{method}-{rank}.pt")
    for way, give in WAYS.items():
        model = DistributedDataParallel(build(rank))
        torch.save(train(model, "rigl", rank, WORLD, give(model)), f"{folder}/{way}-{rank}.pt")
    model = DistributedDataParallel(build(rank))
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    torch.save(train(model, "rigl", rank, WORLD, optimizer=zero), f"{folder}/zero-{rank}.pt")
    del model
    model = build(rank)
    for parameter in model.parameters():  # as one does by hand: patterns are not among them
        dist.broadcast(parameter.detach(), 0)
    torch.save(train(model, "rigl", rank, WORLD, process_group=dist.group.WORLD), f"{folder}/no DDP-{rank}.pt")
    with pytest.raises(ValueError, match="process_group="):
        train(build(rank), "rigl", rank, WORLD)
    alone = build(rank)
    optimizer = torch.optim.SGD(alone.parameters(), 0.1)
    assert ua.DynamicSparsity(alone, optimizer, total_steps=9, delta_t=1, process_group=False).group is None
    with pytest.raises(ValueError, match="same sparse layers in every process"):
        train(build(0, storage="packed" if rank else "dense"), "rigl", rank, WORLD, process_group=dist.group.WORLD)
    # One process's trouble is every process's, before anything changes; a gradient that overflows on one waits on all.
    model = DistributedDataParallel(build(0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    topology = ua.DynamicSparsity(model, optimizer, total_steps=9, delta_t=1)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with model.no_sync():
        model(x * (float("inf") if rank else 1)).sum().backward()
    assert not topology.step()
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    assert topology.step()
    optimizer.zero_grad()
    model(x).sum().backward()
    # torch's helpers take the wrapper's names off and put them on.
    other = DistributedDataParallel(build(5))
    set_model_state_dict(other, get_model_state_dict(model))
    torch.testing.assert_close(other(x), model(x))
    if rank:
        optimizer.state[topology.layers["module.3"].weight]["momentum_buffer"] = torch.zeros(7)
    with pytest.raises(ValueError, match="momentum_buffer" if rank else "Another process"):
        topology.step()
    # Sizes that change are refused where DDP's buckets hold packed weights.
    packed = DistributedDataParallel(build(0, "granet", storage="packed"))
    with pytest.raises(ValueError, match="fixed sizes"):
        train(packed, "granet", rank, WORLD)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    """A folder of what every process found with every method."""
    folder = tmp_path_factory.mktemp("histories")
    processes.start(worker, folder, WORLD)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_every_rank_ends_with_the_same_pattern(method, histories):
    first, second = (torch.load(histories / f"{method}-{rank}.pt") for rank in range(WORLD))
    single = train(build(0, method), method, 0, 1)
    changes = 0
    for step in range(STEPS):
        for a, b, c in zip(first[step], second[step], single[step], strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
        changes += step > 0 and not torch.equal(first[step][0], first[step - 1][0])
    assert changes == STEPS // 2


@pytest.mark.distributed
@pytest.mark.parametrize("way", [*WAYS, "zero", "no DDP"])
def test_every_way_to_give_the_model_finds_the_processes(way, histories):
    mine, theirs = (torch.load(histories / f"{way}-{rank}.pt") for rank in range(WORLD))
    expected = torch.load(histories / "rigl-0.pt")
    for a, b, c in zip(mine, theirs, expected, strict=True):
        assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(a, b, c, strict=True))
