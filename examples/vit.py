"""A timm vision transformer, 80 % sparse, with AdamW and RigL.

python examples/vit.py [--small]
"""

import sys

import timm
import torch
import torch.nn.functional as F
from data import accuracy, batches, images

import uasparse_kernels as ua

small = "--small" in sys.argv
epochs, batch = (3, 32) if small else (4, 64)
train, test = images(1024 if small else 4096), images(256 if small else 1024, "test")

torch.manual_seed(0)
# Pretrained: timm.create_model("vit_small_patch16_224", pretrained=True), and sparsify(..., keep="magnitude").
model = timm.create_model(
    "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, num_classes=10, depth=2 if small else 4
)
model = ua.sparsify(model, 0.8)
print(ua.summary(model))  # position and class embeddings have no sparse form

# timm's own rule would take packed weights, which have one dimension, for biases, and not decay them.
steps = epochs * (len(train[0]) // batch)
optimizer = torch.optim.AdamW(ua.param_groups(model, weight_decay=0.05), 1e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
topology = ua.DynamicSparsity(model, optimizer, method="rigl", total_steps=steps, delta_t=max(1, steps // 12))
averaged = ua.AveragedModel(model, decay=0.95)  # an EMA that follows the weights as they move
for x, y in batches(*train, batch, epochs):
    F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
    optimizer.step()
    schedule.step()
    topology.step()
    optimizer.zero_grad()
    averaged.update_parameters(model)
print(f"test accuracy: {accuracy(model, *test):.3f}, of the average {accuracy(averaged, *test):.3f}")

with torch.no_grad():
    served = ua.optimize_for_inference(model.eval(), test[0][:1])
    torch.testing.assert_close(served(test[0][:4]), model(test[0][:4]), rtol=1e-3, atol=1e-3)
print("served: same answers")
