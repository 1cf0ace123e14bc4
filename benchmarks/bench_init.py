"""Suite init: which initial values train, by accuracy on Fashion-MNIST.

    python -m benchmarks init

A random pattern takes the values of a dense layer's active weights: as they are ("dense"), times density ** -.5
("layer"), or every output times (share of its inputs that it has) ** -.5 ("row"). Three short trainings each, with and
without batch norm; chance is 0.1. Patterns, values and batches are the same for all three. Needs Fashion-MNIST, as
`python -m training` does.
"""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any

import torch
from torch import Tensor, nn

import uasparse_kernels as ua
from uasparse_kernels.training.data import load_train_test

BATCH = 128
SCALES = ("dense", "layer", "row")


def mlp(batch_norm: bool) -> nn.Sequential:
    sizes, parts = [784, 512, 512, 512, 512], [nn.Flatten()]
    for inp, out in itertools.pairwise(sizes):
        parts += [nn.Linear(inp, out), *([nn.BatchNorm1d(out)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(512, 10))


def convnet(batch_norm: bool) -> nn.Sequential:
    parts: list[nn.Module] = []
    for inp, out in ((1, 16), (16, 32), (32, 64)):
        conv = nn.Conv2d(inp, out, 3, stride=1 if inp == 1 else 2, padding=1)
        parts += [conv, *([nn.BatchNorm2d(out)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


# Network, batch norm, sparsity; images and epochs.
CASES = [
    *(("mlp", norm, sparsity, 60_000, 2) for norm in (False, True) for sparsity in (0.9, 0.95, 0.98)),
    *(("convnet", norm, sparsity, 25_600, 2) for norm in (False, True) for sparsity in (0.9, 0.98)),
]


@torch.no_grad()
def scaled(dense: nn.Module, sparse: nn.Module, scale: str) -> None:
    """Gives sparse layers the dense layers' values, scaled."""
    for name, layer in sparse.named_modules():
        if not isinstance(layer, ua.nn.SparseLayer):
            continue
        mask = layer.pattern.to_mask()
        share = mask.flatten(1).double().mean(1) if scale == "row" else mask.double().mean().expand(len(mask))
        factor = torch.ones_like(share) if scale == "dense" else share.clamp(min=1e-9).rsqrt()
        weight = dense.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        layer.set_dense_weight(weight * factor.view(-1, *[1] * (mask.dim() - 1)))


def accuracy(network: str, batch_norm: bool, sparsity: float, scale: str, seed: int, data: Any, epochs: int) -> float:
    torch.manual_seed(seed)
    dense = {"mlp": mlp, "convnet": convnet}[network](batch_norm)
    model = ua.sparsify(copy.deepcopy(dense), sparsity, distribution="uniform")
    scaled(dense, model, scale)
    images, labels, test, answers = data
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    dst = ua.DynamicSparsity(model, optimizer, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            dst.step()
            optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        found = [model(some).argmax(1) for some in test.split(1000)]
    return float((torch.cat(found) == answers).double().mean())


def row(case: tuple[str, bool, float, int, int], seeds: int = 3) -> dict[str, Any]:
    network, batch_norm, sparsity, limit, epochs = case
    data, begin = _data(limit), time.perf_counter()
    found = {
        scale: [accuracy(network, batch_norm, sparsity, scale, seed, data, epochs) for seed in range(seeds)]
        for scale in SCALES
    }
    shape = f"{network}, {'' if batch_norm else 'no '}batch norm"
    spent = time.perf_counter() - begin
    return {"shape": shape, "sparsity": sparsity, "images": limit, "epochs": epochs, "s": spent, "accuracy": found}


def _data(limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = load_train_test("fashion-mnist", limit_train=limit)
    parts = [
        (images.images.float().div(255).sub(0.286).div(0.353), images.labels) for images in (found.train, found.test)
    ]
    return *parts[0], *parts[1]


def run(seconds: float) -> list[dict[str, Any]]:
    found = []
    for case in CASES:
        found.append(row(case))
        print(found[-1], flush=True)
    return found
