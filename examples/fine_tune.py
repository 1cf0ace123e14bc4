"""From pretrained weights to a 90 %-sparse network: keep the largest weights, then fine-tune.

python examples/fine_tune.py [--small]
"""

import copy
import sys

import torch
import torch.nn.functional as F
from data import accuracy, batches, images
from torch import nn

import uasparse_kernels as ua

small = "--small" in sys.argv
train, test = images(1024 if small else 8192), images(512 if small else 2048, "test")


def train_on(model, optimizer, epochs, topology=None):
    for x, y in batches(*train, 64, epochs):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if topology is not None:
            topology.step()
        optimizer.zero_grad()


# A quickly trained network stands for pretrained weights. With real ones:
#     model = torchvision.models.resnet50(weights="IMAGENET1K_V2")
torch.manual_seed(0)
pretrained = nn.Sequential(
    nn.Conv2d(1, 32, 3, stride=2, padding=1),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Conv2d(32, 64, 3, stride=2, padding=1),
    nn.BatchNorm2d(64),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(64 * 49, 128),
    nn.ReLU(),
    nn.Linear(128, 10),
)
train_on(pretrained, torch.optim.Adam(pretrained.parameters(), 1e-3), epochs=2 if small else 3)
print(f"dense: accuracy {accuracy(pretrained, *test):.3f}")

# At once: one threshold over all layers.
model = ua.sparsify(copy.deepcopy(pretrained), 0.9, keep="magnitude", distribution="global")
print(ua.summary(model))
print(f"90 % at once, before fine-tuning: accuracy {accuracy(model, *test):.3f}")
train_on(model, torch.optim.Adam(ua.param_groups(model, weight_decay=1e-4), 5e-4), epochs=1)
print(f"90 % at once, fine-tuned: accuracy {accuracy(model, *test):.3f}")

# Step by step: gradual magnitude pruning while training. First and last layer are small, and stay dense.
epochs = 2 if small else 4
model = ua.sparsify(copy.deepcopy(pretrained), 0.0, include_dense=True, exempt=["0", "9"])
optimizer = torch.optim.Adam(ua.param_groups(model, weight_decay=1e-4), 5e-4)
steps = epochs * (len(train[0]) // 64)
topology = ua.DynamicSparsity(
    model,
    optimizer,
    method=ua.topology.GMP(final_sparsity=0.95),
    total_steps=steps,
    delta_t=max(1, steps // 32),
    stop_fraction=0.6,
)
train_on(model, optimizer, epochs, topology)
ua.repack(model, optimizer=optimizer)  # each layer in the storage that suits it now
print(f"step by step: accuracy {accuracy(model, *test):.3f}, sparsity {ua.summary(model).sparsity:.3f}")
