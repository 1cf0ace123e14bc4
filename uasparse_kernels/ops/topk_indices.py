"""The indices of the k largest or smallest scores: exact, deterministic, without a sort."""

from __future__ import annotations

import torch
from torch import Tensor

from uasparse_kernels import _library


def topk_indices(scores: Tensor, k: int, *, largest: bool = True, magnitude: bool = False) -> Tensor:
    """Indices of the ``k`` largest (or smallest) of ``scores [n]``, or of their absolute values: int64, ascending.

    Exactly ``k``; of equal scores the lower index is taken first (-0 equals 0), and NaN comes after every number,
    whether the largest or the smallest are asked for. The result does not depend on the number of threads. Linear time:
    on the CPU about one pass over the scores.

    Raises:
        ValueError, TypeError: if ``scores`` is not a row of floating-point numbers or ``k`` is not in ``[0, n]``.
    """
    if scores.dim() != 1:
        raise ValueError(f"topk_indices: expected scores of one dimension, got shape {tuple(scores.shape)}.")
    if not scores.is_floating_point():
        raise TypeError(f"topk_indices: expected floating-point scores, got {scores.dtype}.")
    if not 0 <= k <= scores.numel():
        raise ValueError(f"topk_indices: expected k in [0, {scores.numel()}], got {k}.")
    if not _library.has_kernel("topk_indices", scores):
        return topk_indices_reference(scores, k, largest=largest, magnitude=magnitude)
    return torch.ops.uasparse.topk_indices(scores.detach(), k, largest, magnitude)


def topk_indices_reference(scores: Tensor, k: int, *, largest: bool = True, magnitude: bool = False) -> Tensor:
    """What :func:`topk_indices` computes, in plain torch, by two stable sorts."""
    scores = scores.detach().abs() if magnitude else scores.detach()
    order = scores.argsort(descending=largest, stable=True)
    # torch sorts NaN as the largest number: a second stable sort puts it last.
    order = order[scores[order].isnan().to(torch.uint8).argsort(stable=True)]
    return order[:k].sort().values


@_library.register_fake("topk_indices")
def _fake(scores, k, largest, magnitude=False):
    return scores.new_empty((k,), dtype=torch.int64)
