"""What the tests of the methods share: a small network that every method can train, and its training."""

import torch
from torch import nn

import uasparse_kernels as ua


def network(name="rigl", storage="packed", block=(1, 1), sparsity=0.75, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 9, 16),
        nn.ReLU(),
        nn.Linear(16, 8),
    ).to(dtype)
    options = {"distribution": "uniform", "storage": storage, "block": block}
    if name == "gmp":
        return ua.sparsify(model, 0.0, include_dense=True, **options)
    if name == "granet":
        return ua.sparsify(model, 0.5, include_dense=True, **options)
    if name == "2:4":
        return ua.sparsify(model, 0.5, structure="2:4", **options)
    return ua.sparsify(model, sparsity, structure="fan-in" if name == "srigl" else None, **options)


def sparse_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, ua.nn.SparseLayer)}


def batch(dtype=torch.float64):
    return torch.randn(8, 4, 6, 6, dtype=dtype), torch.randint(8, (8,))


def train(model, method, steps=20, delta_t=2, make=None, on_update=None, seed=3, **kwargs):
    optimizer = (make or (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)))(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    dst = ua.DynamicSparsity(
        model, optimizer, method=method, total_steps=steps, delta_t=delta_t, generator=generator, **kwargs
    )
    torch.manual_seed(seed)
    for _ in range(steps):
        x, y = batch(next(model.parameters()).dtype)
        loss = nn.functional.cross_entropy(model(x), y)  # lives on, and its graph, until the next one is there
        loss.backward()
        optimizer.step()
        if dst.step() and on_update is not None:
            on_update(dst)
        optimizer.zero_grad()
    assert dst.frozen
    return dst, optimizer
