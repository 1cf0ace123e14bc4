"""What the tests of topology updates share: a small network in float64, and how it trains."""

import math

import torch
from torch import nn

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


def tied(n, g, dtype=torch.float32):
    """Scores with ties, both zeros, infinities and NaN."""
    x = (4 * torch.randn(n, generator=g)).round().div(4).to(dtype)
    for value, share in [(0.0, 0.1), (-0.0, 0.1), (math.inf, 0.02), (-math.inf, 0.02), (math.nan, 0.05)]:
        x[torch.rand(n, generator=g) < share] = value
    return x
