"""Suite gpu-topk: topk_indices and topk_indices_many, the selection of prune and grow, beside torch.topk.

    python -m benchmarks.bench_gpu_topk_indices [--seconds 30] [--folder DIR]

One layer of n scores, and all layers of a ResNet-50 at once. The roof reads the scores once and writes the indices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from benchmarks import gpu
from benchmarks.bench_prune_grow import resnet50_shapes
from uasparse_kernels.ops import topk_indices, topk_indices_many


class Cell(NamedTuple):
    what: str
    sizes: tuple[int, ...]
    share: float


def cells() -> Iterator[Cell]:
    for n in (10**6, 10**7, 10**8):
        for share in (0.1, 0.01):
            yield Cell("one layer", (n,), share)
    yield Cell("ResNet-50", tuple(math.prod(shape) for shape in resnet50_shapes()), 0.1)


def measure(cell: Cell, clock: gpu.Clock, roof: dict[str, float]) -> dict[str, Any]:
    scores = [torch.randn(n, device=gpu.DEVICE) for n in cell.sizes]
    counts = [round(n * cell.share) for n in cell.sizes]
    # float64 tells whether the same are chosen: the order among equal sums is another matter.
    want = [torch.topk(s, k).values.double().sum() for s, k in zip(scores, counts, strict=True)]
    got = [s[i].double().sum() for s, i in zip(scores, topk_indices_many(scores, counts), strict=True)]
    if not torch.allclose(torch.stack(got), torch.stack(want), rtol=1e-12):
        raise RuntimeError("other entries were chosen than by torch.topk")

    def ours() -> Any:
        return topk_indices(scores[0], counts[0]) if len(scores) == 1 else topk_indices_many(scores, counts)

    def theirs() -> Any:
        return [torch.topk(s, k, sorted=False) for s, k in zip(scores, counts, strict=True)]

    ms = clock.medians_ms({"ours": ours, "torch.topk": theirs}, rounds=15)
    roof_ms = (4 * sum(cell.sizes) + 8 * sum(counts)) / roof["copy_gbs"] / 1e6
    facts = {"what": cell.what, "n": sum(cell.sizes), "layers": len(scores), "share": cell.share}
    ratio = {"torch.topk": ms["torch.topk"] / ms["ours"]}
    return facts | {"ms": ms, "roof_ms": roof_ms, "times_faster_than": ratio, "of_roof": roof_ms / ms["ours"]}


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['share']:.0%} of {row['what']}, {row['n']:.2g}: {row['ms']['ours']:.4f} ms, "
        f"{row['times_faster_than']['torch.topk']:.1f}x torch.topk, {row['of_roof']:.0%} of roof",
        flush=True,
    )


def main() -> None:
    arguments = gpu.parser(__doc__).parse_args()
    gpu.run_suite("gpu-topk", cells(), measure, show, arguments)


if __name__ == "__main__":
    main()
