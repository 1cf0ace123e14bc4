"""Suite gpu-networks: whole training steps of networks, dense beside sparse, eager and compiled by inductor.

    python -m benchmarks.bench_gpu_networks [--seconds 150] [--only KIND BLOCK] [--folder DIR]

Networks: the MLP of a transformer block and a stage of 3x3 convolutions (those of gpu-step), ResNet-50 (128 images of
224x224, channels_last; layers that blocks do not divide stay dense), and the twelve blocks of ViT-B/16 (128 images).
"dense" and "ours" are compiled in the cell's mode; both are timed as they are, too. Compiling is not timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

import uasparse_kernels as ua
from benchmarks import bench_gpu_step, gpu
from benchmarks.bench_gpu_masked_linear import DTYPES
from benchmarks.bench_networks import Block

TUNED = "max-autotune-no-cudagraphs"
VIT_BLOCKS = 12


class Cell(NamedTuple):
    model: str
    width: int  # features or channels; of ResNet-50 the side of the images
    batch: int  # tokens or images
    kind: str
    density: float
    block: int
    mode: str = "default"  # of torch.compile
    step: bool = True


def cells() -> Iterator[Cell]:
    yield Cell("transformer MLP", 4096, 8192, "bf16", 0.1, 64)
    yield Cell("conv stage", 256, 256, "bf16", 0.1, 64)
    yield Cell("ResNet-50", 224, 128, "bf16", 0.1, 64)
    yield Cell("ViT-B/16 blocks", 768, 128, "bf16", 0.1, 64)
    yield Cell("ViT-B/16 blocks", 768, 128, "bf16", 0.1, 32)
    yield Cell("transformer MLP", 4096, 8192, "bf16", 0.1, 64, TUNED)
    yield Cell("conv stage", 256, 256, "bf16", 0.1, 64, TUNED)
    yield Cell("ResNet-50", 224, 128, "bf16", 0.05, 64)


def build(cell: Cell) -> tuple[nn.Module, torch.Tensor]:
    """The dense network, and an input for it."""
    dtype = DTYPES[cell.kind][0]
    if cell.model == "ResNet-50":
        import torchvision

        model: nn.Module = torchvision.models.resnet50().to(memory_format=torch.channels_last)
        input = torch.randn(cell.batch, 3, cell.width, cell.width).to(memory_format=torch.channels_last)
    elif cell.model == "ViT-B/16 blocks":
        model = nn.Sequential(*(Block(cell.width, cell.width // 64 or 1, norm_first=True) for _ in range(VIT_BLOCKS)))
        input = torch.randn(cell.batch, 197, cell.width)
    else:
        return bench_gpu_step.build(bench_gpu_step.Cell(*cell[:6]))
    return model.to(gpu.DEVICE, dtype), input.to(gpu.DEVICE, dtype)


def sparse(cell: Cell, dense: nn.Module) -> nn.Module:
    """As users make it: each layer with the storage that suits it on this device."""
    model = ua.sparsify(
        copy.deepcopy(dense),
        1 - cell.density,
        distribution="uniform",
        block=(cell.block, cell.block),
        exempt=("conv1", "fc") if cell.model == "ResNet-50" else (),
        overrides={"0": 1 - cell.density} if cell.model == "conv stage" else None,  # from the midst of a network
    )
    return model.to(memory_format=torch.channels_last) if cell.model in ("ResNet-50", "conv stage") else model


def measure(cell: Cell, clock: gpu.Clock, roof: dict[str, float]) -> dict[str, Any]:
    precision = DTYPES[cell.kind][1]
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = precision
    dense, input = build(cell)
    eager = {"dense": dense, "ours": sparse(cell, dense)}
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in eager.items():
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(model), mode=None if cell.mode == "default" else cell.mode)
        calls[name] = bench_gpu_step.training_step(compiled, input)
        calls[f"{name}, eager"] = bench_gpu_step.training_step(model, input)
        calls[name](), calls[f"{name}, eager"]()  # compiled here, before the next reset
    ms = clock.medians_ms(calls)
    layers = [m for m in eager["ours"].modules() if isinstance(m, ua.nn.SparseLayer)]
    active = sum(layer.pattern.nnz for layer in layers)
    held = sum(layer.weight.numel() for layer in layers)
    return {
        **cell._asdict(),
        "ms": ms,
        "times_dense": {name: ms["dense"] / value for name, value in ms.items()},
        "sparse_layers": len(layers),
        "sparse_weights": sum(torch.Size(layer.pattern.shape).numel() for layer in layers),
        "active_weights": active,
        "held_weights": held,  # more than active: dense-stored layers, which run on the vendor's kernels
    }


def show(row: dict[str, Any]) -> None:
    times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in row["ms"].items())
    print(
        f"{row['model']} {row['batch']} {row['kind']} {1 - row['density']:.0%} {row['block']}x{row['block']} "
        f"{row['mode']} | {times} | compiled {row['ms']['dense'] / row['ms']['ours']:.2f}x, eager "
        f"{row['ms']['dense, eager'] / row['ms']['ours, eager']:.2f}x, {row['sparse_layers']} sparse layers",
        flush=True,
    )


def main() -> None:
    arguments = gpu.parser(__doc__).parse_args()
    gpu.run_suite("gpu-networks", gpu.only(cells(), arguments), measure, show, arguments)


if __name__ == "__main__":
    main()
