"""Compiles what the GPU suites will run, before they are timed.

Triton compiles one kernel at a time in a process, and a cell has dozens of tiles to choose from. One process for each
kind and block runs its first cell, all at once; what they time is thrown away, what they compile stays in the cache.

    python -m benchmarks.gpu_warm
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

from benchmarks import bench_gpu_masked_conv2d, bench_gpu_masked_linear

SUITES = (bench_gpu_masked_linear, bench_gpu_masked_conv2d)


def commands(folder: str) -> list[list[str]]:
    """For each suite, the kinds and blocks of its cells (unstructured kernels are compiled already)."""
    return [
        [sys.executable, "-m", suite.__name__, "--only", kind, block, "--seconds", "0", "--steps", "--folder", folder]
        for suite in SUITES
        for kind, block in sorted({(cell.kind, str(cell.block)) for cell in suite.cells() if cell.block > 1})
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes = [subprocess.Popen(command) for command in commands(folder)]
        sys.exit(max(process.wait() for process in processes))


if __name__ == "__main__":
    main()
