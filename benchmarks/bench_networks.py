"""Suite networks: training steps, optimiser included, of whole networks made sparse, beside the dense ones.

python -m benchmarks networks                    one and two threads
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import uasparse_kernels as ua
from benchmarks import harness, rivals
from benchmarks.bench_step import mlp

SETTINGS = [(s, d) for s in (0.8, 0.9, 0.95) for d in ("uniform", "erk")]


class Network(NamedTuple):
    """A network, its input, and what stays dense."""

    name: str
    model: Callable[[], nn.Module]
    input: tuple[int, ...]
    exempt: tuple[str, ...] = ()


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)()

    return build


def _resnet18_cifar() -> nn.Module:
    import torchvision

    model = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


class Attention(nn.Module):
    """Self-attention whose four projections are linear layers, so that all of them can be sparse."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """A transformer block: norms before (ViT) or after (BERT) attention and MLP."""

    def __init__(self, width: int, heads: int, *, norm_first: bool):
        super().__init__()
        self.norm_first = norm_first
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.norm_first:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class ViT(nn.Module):
    """ViT-S/16 (Dosovitskiy et al., arXiv 2010.11929; the size S of DeiT): 12 blocks of 384."""

    def __init__(self, width: int = 384, depth: int = 12, heads: int = 6):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 197, width))
        self.blocks = nn.Sequential(*(Block(width, heads, norm_first=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def _bert() -> nn.Module:
    """The encoder of BERT-base (Devlin et al., arXiv 1810.04805): 12 blocks of 768 over embedded tokens, and a head."""
    return nn.Sequential(*(Block(768, 12, norm_first=False) for _ in range(12)), _FirstToken(), nn.Linear(768, 10))


class _FirstToken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0]


NETWORKS = [
    Network("ResNet-50 224 b8", _torchvision("resnet50"), (8, 3, 224, 224), ("conv1", "fc")),
    Network("ResNet-18 224 b8", _torchvision("resnet18"), (8, 3, 224, 224), ("conv1", "fc")),
    Network("ResNet-18 CIFAR b64", _resnet18_cifar, (64, 3, 32, 32), ("conv1", "fc")),
    Network("MobileNetV2 224 b8", _torchvision("mobilenet_v2"), (8, 3, 224, 224), ("features.0.0", "classifier.1")),
    Network("ViT-S/16 b8", ViT, (8, 3, 224, 224), ("patches", "head")),
    Network("BERT-base encoder b8x128", _bert, (8, 128, 768), ("13",)),
    Network("MLP b128", mlp, (128, 784), ("4",)),
]


def step(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """A step of SGD with momentum."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    target = torch.randint(10, (x.shape[0],))

    def call() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return call


def variants(network: Network, settings: list[tuple[float, str]], *, compiled: bool = False) -> dict[str, Any]:
    """Steps by name: the dense network in both layouts, with linear layers by oneDNN if it is made of them, maybe
    through torch.compile, and each sparse one."""
    dense, x = network.model(), torch.randn(network.input)
    found = {"dense": step(dense, x)}
    last: Any = {"memory_format": torch.channels_last}
    if x.dim() == 4:
        found["dense channels_last"] = step(copy.deepcopy(dense).to(**last), x.to(**last))
    linear = sum(module.weight.numel() for module in dense.modules() if isinstance(module, nn.Linear))
    if 2 * linear > sum(p.numel() for p in dense.parameters()):
        found["oneDNN"] = step(rivals.on_onednn(copy.deepcopy(dense)), x)
    if compiled:
        found["compiled dense"] = step(torch.compile(copy.deepcopy(dense)), x)  # type: ignore[arg-type]
        if x.dim() == 4:
            model = torch.compile(copy.deepcopy(dense).to(**last))
            found["compiled dense channels_last"] = step(model, x.to(**last))  # type: ignore[arg-type]
    for sparsity, distribution in settings:
        sparse = ua.sparsify(copy.deepcopy(dense), sparsity, distribution=distribution, exempt=network.exempt)
        found[f"{sparsity} {distribution}"] = step(sparse, x)
    return found


def rows(network: Network, seconds: float, *, compiled: bool = False) -> Iterator[dict[str, Any]]:
    times = harness.interleave(variants(network, SETTINGS, compiled=compiled), seconds=seconds, rounds=3)
    others = {name: s for name, s in times.items() if "dense" in name or name == "oneDNN"}
    threads = torch.get_num_threads()
    for sparsity, distribution in SETTINGS:
        shape = f"{network.name} {distribution}, {threads} thread{'s' if threads > 1 else ''}"
        compared = harness.compare(others | {"ours": times[f"{sparsity} {distribution}"]})
        yield {"shape": shape, "sparsity": sparsity, "pass": "step"} | compared


def run(seconds: float = 1.0) -> list[dict[str, Any]]:
    """``UASPARSE_BENCH_NETWORKS``: only networks whose name contains it, or one of several with commas between.
    ``UASPARSE_BENCH_COMPILE=1``: beside ``torch.compile`` of the dense network too, which takes minutes."""
    only = os.environ.get("UASPARSE_BENCH_NETWORKS", "").split(",")
    compiled = "UASPARSE_BENCH_COMPILE" in os.environ
    threads, found = torch.get_num_threads(), []
    for count in {threads, 2} if (os.cpu_count() or 1) > 1 else {threads}:
        torch.set_num_threads(count)
        for network in NETWORKS:
            if any(part in network.name for part in only):
                found += harness.rows(rows(network, seconds, compiled=compiled))
    torch.set_num_threads(threads)
    return found
