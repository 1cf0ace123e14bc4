"""Two processes (gloo) that train together end every update with the same pattern, the one a single process finds."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
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


def train(model, method, rank, world):
    """Patterns after each step, on this rank's share of the batches."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    topology = ua.DynamicSparsity(
        model, optimizer, method=method, total_steps=2 * STEPS, delta_t=2, generator=generator
    )
    data = torch.Generator().manual_seed(7)
    history = []
    for _ in range(STEPS):
        x = torch.randn(8, 4, 6, 6, dtype=torch.float64, generator=data)
        y = torch.randint(10, (8,), generator=data)
        nn.functional.cross_entropy(model(x[rank::world]), y[rank::world]).backward()
        optimizer.step()
        topology.step()
        optimizer.zero_grad()
        history.append([layer.pattern.blocks() for layer in topology.layers.values()])
    return history


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    for method in METHODS:
        # Different seeds: what DDP sends at construction must include the patterns.
        model = DistributedDataParallel(build(rank, method), broadcast_buffers=False)
        torch.save(train(model, method, rank, WORLD), f"{folder}/{method}-{rank}.pt")
    # Sizes that change are refused where DDP's buckets hold packed weights.
    packed = DistributedDataParallel(build(0, "granet", storage="packed"))
    with pytest.raises(ValueError, match="fixed sizes"):
        train(packed, "granet", rank, WORLD)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    """A folder of what every process found with every method."""
    folder = tmp_path_factory.mktemp("histories")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, str(folder)), nprocs=WORLD)
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
