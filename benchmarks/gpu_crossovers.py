"""Measures the crossovers of this GPU, keeps them where the dispatch finds them, and a copy with the other results.

python -m benchmarks.gpu_crossovers [--seconds 60] [--folder DIR]
"""

from __future__ import annotations

import json

import torch

from benchmarks import gpu
from uasparse_kernels import _crossovers
from uasparse_kernels.ops._cuda_crossovers import measure_crossovers


def main() -> None:
    arguments = gpu.parser(__doc__).parse_args()
    name = torch.cuda.get_device_name()
    copy = arguments.folder / "gpu-crossovers.json"

    def keep(table: _crossovers.Table) -> None:
        copy.write_text(json.dumps({name: table}, indent=1) + "\n")
        _crossovers.save(name, table)

    table = measure_crossovers(gpu.DEVICE, seconds=arguments.seconds, report=keep)
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
