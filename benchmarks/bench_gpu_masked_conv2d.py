"""Suite gpu-conv: masked_conv2d, forward and forward with backward, beside cuDNN dense and convolution by w * m.

    python -m benchmarks.bench_gpu_masked_conv2d [--seconds 100] [--only KIND BLOCK] [--folder DIR]

3x3 convolutions of ResNet's sizes, batch 256, channels_last; results are kept after each cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import gpu
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
    for channels, size, stride in [(256, 14, 1), (128, 28, 1), (512, 7, 1), (64, 56, 1), (256, 28, 2)]:
        for with_backward in (False, True):
            for density in (0.1, 0.05):
                yield Cell(channels, size, stride, "bf16", density, 64, with_backward)
    for kind, block in (("bf16", 32), ("bf16", 128), ("tf32", 64), ("fp32", 64)):
        yield Cell(256, 14, 1, kind, 0.1, block, True)


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
        "ours": (blocks, values),
    }
    compiled = torch.compile(lambda x, w: F.conv2d(x, w * mask, None, *geometry))
    if gpu.DEVICE == "cuda" and not cell.step and cell.density == 0.1:
        functions["masked, torch.compile"] = (compiled, dense)
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
        "density": pattern.density,  # of few blocks not what was asked for
        "ms": ms,
        "roof_ms": roof_ms,
        "times_dense": {name: ms["dense"] / value for name, value in ms.items()},
        "of_roof": roof_ms / ms["ours"],
    }


def main() -> None:
    arguments = gpu.parser(__doc__).parse_args()
    gpu.run_suite("gpu-conv", gpu.only(cells(), arguments), measure, show, arguments)


if __name__ == "__main__":
    main()
