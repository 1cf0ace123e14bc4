"""A torchvision ResNet-18: made sparse, trained by RigL, and served on the CPU.

python examples/resnet.py [--small]
"""

import copy
import sys

import torch
import torch.nn.functional as F
import torchvision
from data import accuracy, batches, images
from torch import nn
from torch.utils.benchmark import Timer

import uasparse_kernels as ua

small = "--small" in sys.argv
epochs, batch = (1, 32) if small else (2, 64)
train, test = images(1024 if small else 4096), images(256 if small else 1024, "test")

torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10)
model.conv1 = nn.Conv2d(1, 64, 3, stride=1, padding=1, bias=False)  # the images are grey and small
dense = copy.deepcopy(model)
model = ua.sparsify(model, 0.9, distribution="uniform")
print(ua.summary(model))

# What a training step costs, forward and backward.
x, y = train[0][:batch], train[1][:batch]
for name, network in (("dense", dense), ("sparse", model)):
    step = Timer("F.cross_entropy(network(x), y).backward()", globals={"F": F, "network": network, "x": x, "y": y})
    print(f"a step, {name}: {1e3 * step.timeit(2 if small else 8).median:.0f} ms")
model.zero_grad()

steps = epochs * (len(train[0]) // batch)
optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
topology = ua.DynamicSparsity(model, optimizer, method="rigl", total_steps=steps, delta_t=max(1, steps // 12))
for x, y in batches(*train, batch, epochs):
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    schedule.step()
    topology.step()
    optimizer.zero_grad()
print(f"test accuracy: {accuracy(model, *test):.3f}")

# Serving: folded, fused, and saved to a file from which another process serves it.
few = test[0][:16]
served = ua.optimize_for_inference(model.eval(), few)
served.save("resnet.safetensors")
served = ua.load_optimized("resnet.safetensors")
with torch.no_grad():
    torch.testing.assert_close(served(few), model(few), rtol=1e-3, atol=1e-3)
    for name, network in (("dense torch", ua.densify(copy.deepcopy(model)).eval()), ("served", served)):
        call = Timer("network(few)", globals={"network": network, "few": few})
        print(f"{len(few)} images, {name}: {1e3 * call.timeit(3 if small else 30).median:.1f} ms")
