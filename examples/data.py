"""Images for the examples: Fashion-MNIST where the machine has it, else made up. Nothing is downloaded."""

import gzip
from pathlib import Path

import numpy as np
import torch

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian: apt-get install dataset-fashion-mnist


def images(count, split="train"):
    """(images [count, 1, 28, 28] in [0, 1], labels [count]) of ten classes; split is "train" or "test"."""
    if FASHION_MNIST.is_dir():
        name = FASHION_MNIST / ("train" if split == "train" else "t10k")
        with gzip.open(f"{name}-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read(16 + 784 * count), np.uint8, offset=16).reshape(-1, 1, 28, 28)
        with gzip.open(f"{name}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(8 + count), np.uint8, offset=8)
        return torch.tensor(pixels).float() / 255, torch.tensor(labels).long()
    patterns = torch.rand(10, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
    labels = torch.randint(10, (count,), generator=generator)
    x = torch.nn.functional.interpolate(patterns[labels], size=28)
    return (0.5 * x + 0.5 * torch.rand(x.shape, generator=generator)), labels


def batches(x, y, size, epochs):
    """Shuffled batches of several epochs; the last, smaller one of an epoch is left out."""
    for _ in range(epochs):
        for places in torch.randperm(len(x)).split(size):
            if len(places) == size:
                yield x[places], y[places]


@torch.no_grad()
def accuracy(model, x, y):
    model.eval()
    right = sum((model(a).argmax(1) == b).sum().item() for a, b in zip(x.split(256), y.split(256), strict=True))
    model.train()
    return right / len(y)
