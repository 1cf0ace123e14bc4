"""Suite gpu-conv: masked_conv2d, forward and forward with backward, beside cuDNN dense and convolution by w * m.

    python -m benchmarks.bench_gpu_masked_conv2d [--seconds 100] [--folder DIR]

3x3 convolutions of ResNet's sizes, batch 256, channels_last; results are kept after each cell.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import gpu, harness
from benchmarks.bench_gpu_masked_linear import DTYPES, show, step
from uasparse_kernels import SparsityPattern
from uasparse_kernels.ops._common import dense_form, pattern_tensors


class Cell(NamedTuple):
    channels: int
    size: int
    stride: int
    kind: str
    density: float
    block: int
    step: bool


def cells() -> Iterator[Cell]:
    layers = [(256, 14, 1), (128, 28, 1), (512, 7, 1), (64, 56, 1), (256, 28, 2)]
    for channels, size, stride in layers:
        for with_backward in (False, True):
            for density in (0.1, 0.05):
                yield Cell(channels, size, stride, "bf16", density, 64, with_backward)
    for block in (32, 128):
        yield Cell(256, 14, 1, "bf16", 0.1, block, True)
    yield Cell(256, 14, 1, "tf32", 0.1, 64, True)


def measure(cell: Cell, clock: gpu.Clock, roof: dict[str, float], batch: int = 256) -> dict[str, Any]:
    dtype, precision = DTYPES[cell.kind]
    torch.backends.cudnn.conv.fp32_precision = precision
    torch.backends.cudnn.benchmark = True
    shape, geometry = (cell.channels, cell.channels, 3, 3), ((cell.stride,) * 2, (1, 1), (1, 1))
    pattern = SparsityPattern.random(shape, cell.density, block=(cell.block, cell.block)).to(gpu.DEVICE)
    values = torch.randn(pattern.packed_shape, device=gpu.DEVICE, dtype=dtype)
    last = torch.channels_last
    dense = pattern.unpack(values).to(memory_format=last)
    mask = pattern.to_mask().to(memory_format=last)
    x = torch.randn(batch, cell.channels, cell.size, cell.size, device=gpu.DEVICE, dtype=dtype).to(memory_format=last)

    def blocks(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        arguments = (*pattern_tensors(pattern), pattern.shape, pattern.block, *geometry, 1)
        return torch.ops.uasparse.masked_conv2d(x, values, None, *arguments)

    functions: dict[str, tuple[Callable, torch.Tensor]] = {
        "dense": (lambda x, w: F.conv2d(x, w, None, *geometry), dense),
        "masked by w * m": (lambda x, w: F.conv2d(x, w * mask, None, *geometry), dense),
        "ours, dense-stored": (lambda x, w: F.conv2d(x, dense_form(w, pattern), None, *geometry), dense),
        "ours, blocks": (blocks, values),
    }
    dy = torch.randn_like(functions["dense"][0](x, dense))
    variants: dict[str, Callable[[], Any]] = {}
    for name, (function, weight) in functions.items():
        if cell.step:
            variants[name] = step(function, x, weight, dy)
        else:
            variants[name] = lambda function=function, weight=weight: function(x, weight)
    ms = clock.medians_ms(variants)
    products = 3 if cell.step else 1
    flops = products * 2 * pattern.nnz * dy.numel() // cell.channels
    moved = products * (x.nbytes + values.nbytes + dy.nbytes)
    roof_ms = max(flops / roof[f"{cell.kind}_tflops"] / 1e9, moved / roof["copy_gbs"] / 1e6)
    return {
        **cell._asdict(),
        "ms": ms,
        "roof_ms": roof_ms,
        "times_dense": {name: ms["dense"] / value for name, value in ms.items()},
        "of_roof": roof_ms / ms["ours, blocks"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--folder", type=Path, default=harness.RESULTS)
    arguments = parser.parse_args()
    clock = gpu.Clock()
    roof = gpu.roofs(clock)
    rows: list[dict[str, Any]] = []
    budget = gpu.Budget(arguments.seconds)
    for cell in cells():
        if not budget.left():
            print(f"gpu-conv: out of time after {len(rows)} cells")
            break
        try:
            rows.append(measure(cell, clock, roof))
        except Exception as error:
            print(f"{cell}: {type(error).__name__}: {error}", flush=True)
            continue
        show(rows[-1])
        harness.save("gpu-conv", rows, arguments.folder, roofs=roof)


if __name__ == "__main__":
    main()
