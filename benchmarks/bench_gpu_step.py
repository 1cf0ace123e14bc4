"""Suite gpu-step: whole training steps (forward, loss, backward, optimiser) of models, dense beside sparse.

    python -m benchmarks.bench_gpu_step [--seconds 60] [--only KIND BLOCK] [--folder DIR]

Models: the MLP of a transformer block (4096 - 16384 - 4096, 8k tokens), a stage of 3x3 convolutions (256 channels at
14x14, batch 256, channels_last), and an MLP for float32. Each is timed dense, masked (``w * m`` as a parametrisation,
gradients masked by it), sparse and dense-stored, and sparse and packed, with SGD and momentum; the peak of allocated
memory is taken beside.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

import uasparse_kernels as ua
from benchmarks import gpu
from benchmarks.bench_gpu_masked_linear import DTYPES, show
from uasparse_kernels import SparsityPattern


class Cell(NamedTuple):
    model: str
    width: int  # features or channels
    batch: int  # tokens or images
    kind: str
    density: float
    block: int
    step: bool = True


def cells() -> Iterator[Cell]:
    for density, block in ((0.1, 64), (0.05, 64), (0.1, 128)):
        yield Cell("transformer MLP", 4096, 8192, "bf16", density, block)
        if block == 64:
            yield Cell("conv stage", 256, 256, "bf16", density, block)
    for density in (0.1, 0.05, 0.01):
        yield Cell("MLP", 4096, 8192, "fp32", density, 1)
    yield Cell("transformer MLP", 4096, 8192, "bf16", 0.1, 1)


def build(cell: Cell) -> tuple[nn.Module, torch.Tensor]:
    """The dense model, and an input for it."""
    width = cell.width
    if cell.model == "conv stage":
        layers = [
            layer
            for _ in range(4)
            for layer in (nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        ]
        input = torch.randn(cell.batch, width, 14, 14).to(memory_format=torch.channels_last)
        model: nn.Module = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    else:
        hidden = 4 * width if cell.model == "transformer MLP" else width
        model = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        input = torch.randn(cell.batch, width)
    dtype = DTYPES[cell.kind][0]
    return model.to(gpu.DEVICE, dtype), input.to(gpu.DEVICE, dtype)


class _Masked(nn.Module):
    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


def variants(cell: Cell, dense: nn.Module) -> dict[str, nn.Module]:
    """The model as each variant; all sparse ones have the same random patterns."""
    masked, stored, packed = (copy.deepcopy(dense) for _ in range(3))
    for name, layer in dense.named_children():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        kind = ua.SparseLinear if isinstance(layer, nn.Linear) else ua.SparseConv2d
        pattern = SparsityPattern.random(layer.weight.shape, cell.density, block=(cell.block,) * 2).to(gpu.DEVICE)
        setattr(stored, name, kind.from_dense(layer, pattern=pattern, storage="dense"))
        setattr(packed, name, kind.from_dense(layer, pattern=pattern, storage="packed"))
        mask = torch.empty_like(layer.weight, dtype=torch.bool).copy_(pattern.to_mask())
        parametrize.register_parametrization(getattr(masked, name), "weight", _Masked(mask))
    if cell.model == "conv stage":
        stored = stored.to(memory_format=torch.channels_last)
    return {"dense": dense, "masked by w * m": masked, "ours, dense-stored": stored, "ours": packed}


def training_step(model: nn.Module, input: torch.Tensor) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def call() -> torch.Tensor:
        loss = model(input).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # at the end, so that no gradients are there where the peak of the next step begins
        return loss.detach()

    return call


def measure(cell: Cell, clock: gpu.Clock, roof: dict[str, float]) -> dict[str, Any]:
    precision = DTYPES[cell.kind][1]
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = precision
    dense, input = build(cell)
    models = variants(cell, dense)
    calls = {name: training_step(model, input) for name, model in models.items()}
    peaks = {name: _peak_bytes(call) for name, call in calls.items()}
    ms = clock.medians_ms(calls)
    vectors = input.numel() // cell.width
    active = sum(layer.pattern.nnz for layer in models["ours"].modules() if hasattr(layer, "pattern"))
    tflops = roof["unstructured_tflops" if cell.block == 1 else f"{cell.kind}_tflops"]
    roof_ms = 6 * vectors * active / tflops / 1e9
    return {
        **cell._asdict(),
        "ms": ms,
        "roof_ms": roof_ms,
        "times_dense": {name: ms["dense"] / value for name, value in ms.items()},
        "of_roof": roof_ms / ms["ours"],
        "peak_bytes": peaks,
    }


def _peak_bytes(call: Callable[[], Any]) -> int:
    """The most that was allocated in a step, over what was before its first; 0 where nobody counts."""
    if gpu.DEVICE != "cuda":
        return 0
    call()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    arguments = gpu.parser(__doc__).parse_args()
    gpu.run_suite("gpu-step", gpu.only(cells(), arguments), measure, show, arguments)


if __name__ == "__main__":
    main()
