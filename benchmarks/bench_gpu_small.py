"""Suite gpu-small: unstructured layers on 1 to 16 tokens, as in generating text, beside cuBLAS; in CUDA graphs.

    python -m benchmarks.bench_gpu_small [--seconds 60] [--folder DIR]

Both are bound by the bytes of the weights: a packed value brings its index along. The roof is a copy's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks import gpu
from benchmarks.bench_gpu_masked_linear import Cell, measure, show


def cells() -> Iterator[Cell]:
    shapes, densities = ((4096, 4096), (4096, 16384)), (0.1, 0.2, 0.5, 0.05, 0.01)
    for tokens, kind, shape, density in itertools.product((1, 16, 4), ("bf16", "fp16", "fp32"), shapes, densities):
        yield Cell(*shape, tokens, kind, density, 1)


def main() -> None:
    arguments = gpu.parser(__doc__).parse_args()
    gpu.run_suite("gpu-small", gpu.only(cells(), arguments), measure, show, arguments)


if __name__ == "__main__":
    main()
