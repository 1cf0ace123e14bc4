"""The indices of the k largest or smallest scores: exact, deterministic, without a sort."""

from __future__ import annotations

from collections.abc import Sequence

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
    _check(scores, k)
    if not _library.has_kernel("topk_indices", scores):
        return topk_indices_reference(scores, k, largest=largest, magnitude=magnitude)
    return torch.ops.uasparse.topk_indices(scores.detach(), k, largest, magnitude)


def topk_indices_many(
    scores: Sequence[Tensor], k: Sequence[int], *, largest: bool = True, magnitude: bool = False
) -> list[Tensor]:
    """:func:`topk_indices` of many layers, ``k[i]`` of ``scores[i]``: on a GPU in one set of launches for up to 64.

    Raises:
        ValueError, TypeError: as :func:`topk_indices`; and if there is not one ``k`` for each, or several devices.
    """
    if len(scores) != len(k):
        raise ValueError(f"topk_indices_many: expected one k for each of {len(scores)} layers, got {len(k)}.")
    for one, count in zip(scores, k, strict=True):
        _check(one, count)
        if one.device != scores[0].device:
            raise ValueError(f"topk_indices_many: expected one device, got {scores[0].device} and {one.device}.")
    if not scores:
        return []
    if not _library.has_kernel("topk_indices_many", scores[0]):
        return [topk_indices(s, n, largest=largest, magnitude=magnitude) for s, n in zip(scores, k, strict=True)]
    return torch.ops.uasparse.topk_indices_many([s.detach() for s in scores], list(k), largest, magnitude)


def topk_indices_reference(scores: Tensor, k: int, *, largest: bool = True, magnitude: bool = False) -> Tensor:
    """What :func:`topk_indices` computes, in plain torch, by two stable sorts."""
    scores = scores.detach().abs() if magnitude else scores.detach()
    order = scores.argsort(descending=largest, stable=True)
    # torch sorts NaN as the largest number: a second stable sort puts it last.
    order = order[scores[order].isnan().to(torch.uint8).argsort(stable=True)]
    return order[:k].sort().values


def _check(scores: Tensor, k: int) -> None:
    if scores.dim() != 1:
        raise ValueError(f"topk_indices: expected scores of one dimension, got shape {tuple(scores.shape)}.")
    if not scores.is_floating_point():
        raise TypeError(f"topk_indices: expected floating-point scores, got {scores.dtype}.")
    if not 0 <= k <= scores.numel():
        raise ValueError(f"topk_indices: expected k in [0, {scores.numel()}], got {k}.")


@_library.register_fake("topk_indices")
def _fake(scores, k, largest, magnitude=False):
    return scores.new_empty((k,), dtype=torch.int64)


@_library.register_fake("topk_indices_many")
def _many_fake(scores, k, largest, magnitude=False):
    return [s.new_empty((n,), dtype=torch.int64) for s, n in zip(scores, k, strict=True)]
