"""A method of your own, beside RigL and SET: what to drop by a score of yours, where to grow by another's rule.

python examples/own_method.py [--small]
"""

import sys

import torch
import torch.nn.functional as F
from data import accuracy, batches, images
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels.topology import METHODS, GradientGrowth, Method

small = "--small" in sys.argv
epochs = 3 if small else 8
train, test = images(4096 if small else 16384), images(512 if small else 4096, "test")


def first_order(layer):
    """What the loss changes by without a weight, to first order: |w * gradient|, one number for each active weight."""
    return (layer.weight * layer.gradient).abs()


# Known by its name from here on.
METHODS["first-order"] = lambda: Method(drop=first_order, grow=GradientGrowth(), scope="global")

for method in ("static", "set", "rigl", "first-order"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    model = ua.sparsify(model, 0.99)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    steps = epochs * (len(train[0]) // 64)
    topology = ua.DynamicSparsity(model, optimizer, method=method, total_steps=steps, delta_t=max(1, steps // 24))
    for x, y in batches(*train, 64, epochs):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        topology.step()
        optimizer.zero_grad()
    print(f"{method}: test accuracy {accuracy(model, *test):.3f} with {ua.summary(model).active:,} weights")
