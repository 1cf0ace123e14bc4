"""A LightningModule, 90 % sparse, with a callback that moves the topology and is in the checkpoint.

python examples/lightning_fit.py [--small]
"""

import sys
import tempfile

import torch
import torch.nn.functional as F
from data import accuracy, images
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import uasparse_kernels as ua
from uasparse_kernels.integrations.lightning import DynamicSparsityCallback

small = "--small" in sys.argv


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )
        self.net = ua.sparsify(layers, 0.9)

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(ua.param_groups(self, weight_decay=0.01), 1e-3)


torch.manual_seed(0)
train, test = images(1024 if small else 16384), images(512 if small else 4096, "test")
loader = DataLoader(TensorDataset(*train), batch_size=64, shuffle=True)
with tempfile.TemporaryDirectory() as folder:

    def make_trainer(epochs):
        return Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[DynamicSparsityCallback(method="rigl", delta_t=10, total_steps=4 * len(loader))],
        )

    model, trainer = Classifier(), make_trainer(2)
    trainer.fit(model, loader)
    trainer.save_checkpoint(f"{folder}/half.ckpt")
    print(f"after two epochs: test accuracy {accuracy(model.net, *test):.3f}")

    model = Classifier()  # another random pattern: the checkpoint brings its own
    make_trainer(4).fit(model, loader, ckpt_path=f"{folder}/half.ckpt", weights_only=False)
    print(f"after two more: test accuracy {accuracy(model.net, *test):.3f}")
print(ua.summary(model))
