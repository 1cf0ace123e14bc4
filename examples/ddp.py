"""DistributedDataParallel: several processes train one sparse network and end with the same pattern.

torchrun --nproc-per-node 2 examples/ddp.py [--small]
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import accuracy, batches, images
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import uasparse_kernels as ua

small = "--small" in sys.argv
dist.init_process_group("gloo")  # "nccl" on GPUs
rank, size = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
epochs, batch = (1, 32) if small else (3, 64)
x, y = images(1024 if small else 16384)
x, y = x[rank::size], y[rank::size]  # each process has its share

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
model = DistributedDataParallel(ua.sparsify(model, 0.9))
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
steps = epochs * (len(x) // batch)
topology = ua.DynamicSparsity(model, optimizer, method="rigl", total_steps=steps, delta_t=max(1, steps // 12))
torch.manual_seed(rank)
for images_here, labels_here in batches(x, y, batch, epochs):
    F.cross_entropy(model(images_here), labels_here).backward()
    optimizer.step()
    topology.step()
    optimizer.zero_grad()

mask = model.module[1].pattern.to_mask().int()
total = mask.clone()
dist.all_reduce(total)
assert torch.equal(total, size * mask), "the patterns differ"
if rank == 0:
    test = images(512 if small else 4096, "test")
    dense, active = ua.summary(model.module).weights, ua.summary(model.module).active
    print(f"{size} processes, one pattern; each step sends {active:,} gradients of {dense:,}")
    print(f"test accuracy: {accuracy(model.module, *test):.3f}")
dist.destroy_process_group()
