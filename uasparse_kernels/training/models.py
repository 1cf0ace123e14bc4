"""Networks by name. Each takes images [N, in_channels, size, size] and ends in one linear layer, its head.

ResNets and VGG are torchvision's, WRN is pytorch-ood's, with their first layers fitted to small or grey images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from pytorch_ood.model import WideResNet
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import cfgs, make_layers

from uasparse_kernels.training.errors import TrainingError

STEMS = ("auto", "cifar", "imagenet")


@dataclass(frozen=True)
class ModelSpec:
    """What a network has to fit: `num_outputs` is K, or K+1 with an output for "unknown"."""

    num_outputs: int
    in_channels: int
    image_size: int
    stem: str = "auto"  # cifar, imagenet, or by the size of the images

    @property
    def small_stem(self) -> bool:
        return self.stem == "cifar" or (self.stem == "auto" and self.image_size <= 64)


def build_model(name: str, num_outputs: int, in_channels: int, image_size: int, stem: str = "auto") -> nn.Module:
    """Builds a dense network; `uasparse_kernels.sparsify` makes it sparse. Raises TrainingError."""
    if name not in MODELS:
        raise TrainingError(f"Unknown model {name!r}. Expected one of {', '.join(MODELS)}.")
    if stem not in STEMS:
        raise TrainingError(f"Expected the stem to be one of {', '.join(STEMS)}, got {stem!r}.")
    smallest = MIN_IMAGE_SIZE.get(name, 1)
    if image_size < smallest:
        raise TrainingError(
            f"{name} needs images of at least {smallest}x{smallest}, got {image_size}x{image_size}: give --image-size "
            f"{smallest}."
        )
    return MODELS[name](ModelSpec(num_outputs, in_channels, image_size, stem))


def _mlp(spec: ModelSpec) -> nn.Module:
    """784-300-100-K for MNIST-sized images (LeNet-300-100, usual in work on pruning)."""
    num_inputs = spec.in_channels * spec.image_size**2
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(num_inputs, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, spec.num_outputs),
    )


def _convnet(*widths: int) -> Callable[[ModelSpec], nn.Module]:
    """3x3 convolutions of these widths; every other one has stride 2, instead of pooling, for speed on a CPU."""

    def build(spec: ModelSpec) -> nn.Module:
        layers: list[nn.Module] = []
        inputs = spec.in_channels
        for index, outputs in enumerate(widths):
            conv = nn.Conv2d(inputs, outputs, 3, stride=1 if index % 2 else 2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, spec.num_outputs))

    return build


def _resnet(factory: Callable[..., nn.Module]) -> Callable[[ModelSpec], nn.Module]:
    def build(spec: ModelSpec) -> nn.Module:
        model = factory(num_classes=spec.num_outputs)
        if spec.small_stem:
            model.conv1 = nn.Conv2d(spec.in_channels, 64, 3, padding=1, bias=False)
            model.maxpool = nn.Identity()
        elif spec.in_channels != 3:
            model.conv1 = nn.Conv2d(spec.in_channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(model.get_parameter("conv1.weight"), mode="fan_out", nonlinearity="relu")
        return model

    return build


class _SmallResNet(nn.Module):
    """Residual network for small images (He et al. 2015, section 4.2): three stages of `blocks` basic blocks, which
    are `width`, 2 `width` and 4 `width` channels wide; shortcuts that change the shape are 1x1 convolutions.

    `stride` of the first convolution: 2 quarters the work of every layer.
    """

    def __init__(self, spec: ModelSpec, width: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(spec.in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        stages, channels = [], width
        for outputs in (width, 2 * width, 4 * width):
            for index in range(blocks):
                step = 2 if outputs > width and index == 0 else 1
                shortcut = None
                if step > 1:
                    conv = nn.Conv2d(channels, outputs, 1, stride=step, bias=False)
                    shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))
                stages.append(BasicBlock(channels, outputs, step, shortcut))
                channels = outputs
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, spec.num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.pool(x).flatten(1))


def _resnet8(spec: ModelSpec) -> nn.Module:
    """64 and 128 channels, so that blocks of weights fit, on maps of 1/4 and 1/8 of the size: 0.5 million weights."""

    def conv(inputs: int, outputs: int) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *conv(spec.in_channels, 64),
        *conv(64, 64),
        BasicBlock(64, 64),
        *conv(64, 128),
        BasicBlock(128, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, spec.num_outputs),
    )


def _resnet20(spec: ModelSpec) -> nn.Module:
    """The usual small network for CIFAR-10, 0.27 million weights."""
    return _SmallResNet(spec, width=16, blocks=3, stride=1)


class _ResNet9(nn.Module):
    """Page's network for quick CIFAR-10 training (DAWNBench 2018): max pooling, two residual pairs of convolutions."""

    def __init__(self, spec: ModelSpec, width: int) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
            layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))

        self.stem = conv(spec.in_channels, width)
        self.down1 = conv(width, 2 * width, pool=True)
        self.pair1 = nn.Sequential(conv(2 * width, 2 * width), conv(2 * width, 2 * width))
        self.down2 = conv(2 * width, 4 * width, pool=True)
        self.down3 = conv(4 * width, 8 * width, pool=True)
        self.pair3 = nn.Sequential(conv(8 * width, 8 * width), conv(8 * width, 8 * width))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, spec.num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down1(self.stem(x))
        x = self.down3(self.down2(x + self.pair1(x)))
        return self.fc(self.pool(x + self.pair3(x)).flatten(1))


def _resnet9(spec: ModelSpec) -> nn.Module:
    """Half as wide as Page's, 1.6 million weights, which a CPU can train."""
    return _ResNet9(spec, width=32)


class Whitening(nn.Module):
    """Takes 2x2 patches apart into their principal components, each of unit variance, and their negatives.

    A first layer that need not be learnt (Page, "How to train your ResNet 8: Bag of tricks", 2019; filters and
    negatives as in Jordan, arXiv 2404.00498, section 3.1). Before `fit` it gives the pixels of the patches.
    """

    filters: Tensor

    def __init__(self, channels: int, size: int = 2, eps: float = 5e-4) -> None:
        super().__init__()
        self.eps = eps
        basis = torch.eye(channels * size**2).view(-1, channels, size, size)
        self.register_buffer("filters", torch.cat([basis, -basis]))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Takes the components of the patches of normalised images [N, channels, H, W]."""
        _, channels, size, _ = self.filters.shape
        patches = F.unfold(images, size).transpose(1, 2).flatten(0, 1).double()
        patches = patches - patches.mean(0)
        variances, vectors = torch.linalg.eigh(patches.T @ patches / max(1, len(patches) - 1))
        basis = (vectors / (variances.clamp(min=0) + self.eps).sqrt()).T.reshape(-1, channels, size, size)
        self.filters.copy_(torch.cat([basis, -basis]))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filters)


class _QuickBlock(nn.Module):
    """Two convolutions, the second one residual; pooled before norm and ReLU, which then have a quarter to do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.pool(self.conv1(x))))
        return x + self.relu(self.bn2(self.conv2(x)))


class _QuickNet(nn.Module):
    """Whitened patches and three blocks on maps of 15, 7 and 3 (of 32): after Jordan's for CIFAR-10 (arXiv 2404.00498),
    with ReLU and a shortcut in each block.

    `scale` keeps a head on maxima as slow as the other layers.
    """

    scale = 1 / 9

    def __init__(self, spec: ModelSpec, *widths: int) -> None:
        super().__init__()
        self.whitening = Whitening(spec.in_channels)
        blocks, channels = [], len(self.whitening.filters)
        for width in widths:
            blocks.append(_QuickBlock(channels, width))
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.fc = nn.Linear(channels, spec.num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.whitening(x)))
        return self.fc(self.pool(x).flatten(1) * self.scale)


def _quicknet(spec: ModelSpec) -> nn.Module:
    """1.2 million weights; made 90 % sparse, an epoch of CIFAR-10 is a minute of one core."""
    return _QuickNet(spec, 64, 128, 256)


def _quicknet_wide(spec: ModelSpec) -> nn.Module:
    """Jordan's widths, 2.0 million weights: a third slower when 90 % sparse, two thirds when dense."""
    return _QuickNet(spec, 64, 256, 256)


class _WideResNet(WideResNet):
    """pytorch-ood's WRN with a global pooling that takes any image size."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.feature_maps(x).mean((2, 3)))


def _wrn_22_2(spec: ModelSpec) -> nn.Module:
    return _WideResNet(spec.num_outputs, depth=22, widen_factor=2, drop_rate=0.0, in_channels=spec.in_channels)


def _vgg16_bn(spec: ModelSpec) -> nn.Module:
    """torchvision's thirteen convolutions with one linear layer behind, as usual for small images."""
    features = make_layers(cfgs["D"], batch_norm=True)
    features[0] = nn.Conv2d(spec.in_channels, 64, 3, padding=1)
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, spec.num_outputs))


MODELS: dict[str, Callable[[ModelSpec], nn.Module]] = {
    "mlp": _mlp,
    "convnet": _convnet(16, 32, 48, 64),  # 47 thousand weights for grey images
    "convnet-wide": _convnet(32, 64, 128, 256),  # 391 thousand
    "resnet8": _resnet8,
    "resnet20": _resnet20,
    "resnet9": _resnet9,
    "quicknet": _quicknet,
    "quicknet-wide": _quicknet_wide,
    "resnet18": _resnet(torchvision.models.resnet18),
    "resnet34": _resnet(torchvision.models.resnet34),
    "resnet50": _resnet(torchvision.models.resnet50),
    "wrn-22-2": _wrn_22_2,
    "vgg16-bn": _vgg16_bn,
}
MIN_IMAGE_SIZE = {"resnet9": 8, "quicknet": 9, "quicknet-wide": 9, "wrn-22-2": 8, "vgg16-bn": 32}
