"""Two processes (gloo) whose weights are sharded: fully_shard trains as one process does, others are refused."""

import copy
import os

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import uasparse_kernels as ua

STEPS, WORLD = 6, 2
CASES = {  # method, how the network is made, micro-batches, whether each layer is sharded on its own
    "rigl": ("rigl", {}, 1, True),
    "rigl, one group": ("rigl", {}, 1, False),
    "rigl, micro-batches": ("rigl", {}, 2, True),
    "rigl, blocks": ("rigl", {"overrides": {"0": 0.5, "3": {"block": (2, 2)}}}, 1, True),
    "rigl, dense-stored": ("rigl", {"storage": "dense"}, 1, True),
    "set": ("set", {}, 1, True),
    "mest": ("mest", {}, 1, True),
    "granet, dense-stored": ("granet", {"storage": "dense"}, 1, True),
}


def build(seed=0, sparsity=0.7, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Tanh(), nn.Linear(6 * 16, 10)).double()
    return ua.sparsify(model, sparsity, distribution="uniform", **({"overrides": {"0": 0.5}} | options))


def sharded(model, by_layer=True, **options):
    mesh = init_device_mesh("cpu", (WORLD,))
    if by_layer:
        for layer in (model[0], model[3]):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def make(model, method="rigl", seed=5):
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    topology = ua.DynamicSparsity(
        model,
        optimizer,
        method=method,
        total_steps=2 * STEPS,
        delta_t=2,
        generator=torch.Generator().manual_seed(seed),
    )
    return optimizer, topology


def train(model, optimizer, topology, rank=0, world=1, micro=1, steps=range(STEPS)):
    """What the patterns were after each step."""
    history = []
    for step in range(STEPS):
        data = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, 6, 6, dtype=torch.float64, generator=data)[rank::world].chunk(micro)
        y = torch.randint(10, (8,), generator=data)[rank::world].chunk(micro)
        if step not in steps:
            continue
        for i in range(micro):
            if world > 1:
                model.set_requires_gradient_sync(i == micro - 1)
            (nn.functional.cross_entropy(model(x[i]), y[i]) / micro).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        topology.step()
        optimizer.zero_grad()
        history.append([layer.pattern.blocks() for layer in topology.layers.values()])
    return history


def full(model):
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {key: value.clone() for key, value in state.items()}


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    for name, (method, options, micro, by_layer) in CASES.items():
        model = sharded(build(**options), by_layer)
        optimizer, topology = make(model, method, seed=rank)  # a draw is the first process's
        history = train(model, optimizer, topology, rank, WORLD, micro)
        torch.save((history, full(model)), f"{folder}/{name}-{rank}.pt")
    resume(rank, folder)
    mixed_precision(rank)
    refusals(rank)
    dist.destroy_process_group()


def resume(rank, folder):
    """From a checkpoint in the middle, into a network with other patterns."""
    model = sharded(build())
    optimizer, topology = make(model)
    train(model, optimizer, topology, rank, WORLD, steps=range(3))
    weights = full(model)
    states = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    saved = copy.deepcopy((weights, states, topology.state_dict()))
    model = sharded(build(seed=1))
    optimizer, topology = make(model, seed=9)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, {} if rank else saved[0], options=options)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    set_optimizer_state_dict(model, optimizer, saved[1], options=options)
    topology.load_state_dict(saved[2])
    history = train(model, optimizer, topology, rank, WORLD, steps=range(3, STEPS))
    torch.save((history, full(model)), f"{folder}/resumed-{rank}.pt")


def mixed_precision(rank):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(build().float(), mp_policy=policy)
    optimizer, topology = make(model)
    before = [layer.pattern.blocks() for layer in topology.layers.values()]
    for micro in range(2 * 2):
        model.set_requires_gradient_sync(micro % 2 == 1)
        model(torch.randn(4, 4, 6, 6)).square().mean().backward()
        if micro % 2:
            optimizer.step()
            topology.step()
            optimizer.zero_grad()
    assert not torch.equal(before[1], topology.layers["3"].pattern.blocks())
    alike(topology)


def alike(topology):
    for layer in topology.layers.values():
        blocks = layer.pattern.blocks()
        theirs = blocks.clone()
        dist.broadcast(theirs, 0)
        assert torch.equal(blocks, theirs)


def refusals(rank):
    with pytest.raises(ValueError, match="fixed sizes"):
        make(sharded(build()), "granet")
    with pytest.raises(ValueError, match="same patterns in every process"):
        make(sharded(build(seed=rank)))
    part = build()
    fully_shard(part[3], mesh=init_device_mesh("cpu", (WORLD,)))
    with pytest.raises(ValueError, match="one mesh"):
        make(part)
    both = build()
    fully_shard(both, mesh=init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("copies", "parts")))
    with pytest.raises(ValueError, match="one dimension"):
        make(both)
    with pytest.raises(ValueError, match="sharded"):
        ua.AveragedModel(sharded(build()))
    # Sharded or wrapped first, made sparse afterwards.
    dense = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for wrapped in (DistributedDataParallel(copy.deepcopy(dense)), fully_shard(copy.deepcopy(dense))):
        with pytest.raises(ValueError, match="call this on the model first"):
            ua.sparsify(wrapped, 0.5)
    # FSDP1, and tensor parallelism.
    for original in (True, False):
        model = FullyShardedDataParallel(build(), device_id=torch.device("cpu"), use_orig_params=original)
        with pytest.raises(ValueError, match=r"FullyShardedDataParallel|expected a weight of shape"):
            make(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    with pytest.raises(NotImplementedError, match="ColwiseParallel"):
        parallelize_module(build(), mesh, {"3": ColwiseParallel()})
    model = build()
    model[3].weight = nn.Parameter(distribute_tensor(model[3].weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="not by fully_shard"):
        make(model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of what each process found."""
    folder = tmp_path_factory.mktemp("sharded")
    processes.start(worker, folder, WORLD)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("case", [*CASES, "resumed"])
def test_sharded_processes_train_as_one_does(case, trained):
    method, options, *_ = CASES.get(case, CASES["rigl"])
    model = build(**options)
    history = train(model, *make(model, method, seed=5 if case == "resumed" else 0))
    expected = model.state_dict()
    for rank in range(WORLD):
        found, state = torch.load(trained / f"{case}-{rank}.pt")
        for step, (mine, theirs) in enumerate(zip(found[::-1], history[::-1], strict=False)):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), step
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value)
    assert not torch.equal(history[0][0], history[-1][0])
